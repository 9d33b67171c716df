"""A registration in two statements: what comes between them is never lost, and nobody twice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

import httpx
import pytest
from user_service_server.settings import Settings
from user_service_server.storage.cache import Announcement, DocumentCache, Outcome
from user_service_server.storage.database import lock_key
from user_service_server.storage.link import RedisLink
from user_service_server.storage.wire import UNREACHABLE, Command
from user_service_server.users import repository
from user_service_server.users.repository import email_name

from ..engines import settings_for
from ..system.subscribers import connected
from ..system.trouble import until
from .statements import around_direct
from .test_feedback import email, new_address, report
from .test_revisions import READ, WRITE, assert_same_bytes, counted, once_before
from .test_users import assert_failed, changes_of, fetch, is_waiting, rows

USERS = "/api/v1/users/"


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    """With patience with Redis: a machine that is busy is not the trouble that is tested here."""
    return settings_for(database_url, redis_url, PASSWORD_REQUIRED="false", REDIS_TIMEOUT_MS="5000")


def person(**others: Any) -> dict[str, Any]:
    return {"name": "Jane Roe", "email": new_address(), **others}


async def register(http: httpx.AsyncClient, body: dict[str, Any], key: str = "") -> httpx.Response:
    return await http.post(USERS, json=body, headers={"Idempotency-Key": key} if key else {})


async def found(http: httpx.AsyncClient, address: str) -> list[dict[str, Any]]:
    """Return the users who have an address."""
    answer = await http.post(f"{USERS}lookup", json={"email": address})
    users: list[dict[str, Any]] = answer.json()["data"]["users"]
    return users


async def test_a_registration_takes_two_statements(http: httpx.AsyncClient) -> None:
    """And what it answers is read without a third."""
    with counted() as statements:
        first = await register(http, person())
        second = await register(
            http, person(password="correct horse battery", phone="+48221234567")
        )
        for answer in (first, second):
            assert answer.status_code == 201, answer.text
            shown = await http.get(answer.headers["Location"])
            assert (shown.json()["data"], shown.headers["ETag"]) == (
                answer.json()["data"],
                answer.headers["ETag"],
            )
    assert [(READ in s, WRITE in s) for s in statements] == [(True, False), (False, True)] * 2


async def test_with_a_key_it_takes_as_many_and_is_answered_once(http: httpx.AsyncClient) -> None:
    """Before the password is hashed, one more looks whether it has been already."""
    body, key = person(), str(uuid4())
    with counted() as statements:
        answer = await register(http, body, key)
    assert len(statements) == 3, statements
    again = await register(http, body, key)
    assert (again.status_code, again.content) == (201, answer.content)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert len(await found(http, body["email"])) == 1


async def test_what_is_answered_is_what_postgres_has(
    http: httpx.AsyncClient, database_url: str
) -> None:
    """From the cache and from Postgres the same bytes, whatever was said."""
    consent = {"source": "sign-up form", "policy_version": "2026-11"}
    for others in (
        {},
        {"phone": "+48221234567", "locale": "pl-pl", "external_id": uuid4().hex},
        {"preferences": {"email": False, "categories": {"b": {"push": False}, "a": {}}}},
        {
            "password": "correct horse battery",
            "preferences": {
                "quiet_hours_start": "22:00",
                "quiet_hours_end": "07:00",
                "timezone": "Europe/Warsaw",
                "muted_until": "2031-01-01T12:00:00.120+01:00",
                "consent": consent,
            },
        },
    ):
        answer = await register(http, person(**others))
        assert answer.status_code == 201, answer.text
        user_id = answer.json()["data"]["id"]
        await assert_same_bytes(http, user_id)
        assert await changes_of(database_url, user_id) == [(1, "user.created")]
        ((version, source),) = await rows(
            database_url,
            "SELECT version, source FROM preference_history WHERE user_id = $1",
            user_id,
        )
        assert (version, source) == (1, "sign-up form" if "password" in others else None)
        ((has_password,),) = await rows(
            database_url, "SELECT password_hash IS NOT NULL FROM users WHERE id = $1", user_id
        )
        assert has_password is ("password" in others)


@pytest.mark.parametrize("field", ["email", "external_id"])
async def test_what_another_took_meanwhile_is_refused(field: str, http: httpx.AsyncClient) -> None:
    taken = new_address() if field == "email" else uuid4().hex
    with once_before(WRITE, lambda: register(http, person(**{field: taken}))):
        answer = await register(http, person(**{field: taken}))
    assert_failed(answer, 409, f"{field}_taken", field)


async def test_of_many_who_want_one_address_one_gets_it(
    http: httpx.AsyncClient, database_url: str
) -> None:
    """Nobody waits for more than the one; who is refused leaves nothing."""
    address = new_address()
    answers = await asyncio.gather(
        *(register(http, person(email=address, external_id=uuid4().hex)) for _ in range(12))
    )
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 11
    (user,) = await found(http, address)
    counts = "SELECT count(*) FROM users WHERE email_key = $1"
    assert await rows(database_url, counts, address) == [(1,)]
    assert await changes_of(database_url, user["id"]) == [(1, "user.created")]


async def test_of_many_repeats_at_once_one_registers(http: httpx.AsyncClient) -> None:
    body, key = person(), str(uuid4())
    answers = await asyncio.gather(*(register(http, body, key) for _ in range(12)))
    assert {answer.status_code for answer in answers} <= {201, 409}
    ids = {answer.json()["data"]["id"] for answer in answers if answer.status_code == 201}
    for answer in answers:
        if answer.status_code == 409:
            assert_failed(answer, 409, "idempotency_in_progress")
    assert {user["id"] for user in await found(http, body["email"])} == ids
    assert len(ids) == 1


async def test_a_key_that_got_an_answer_meanwhile_registers_nobody(
    http: httpx.AsyncClient,
) -> None:
    """Its row is met, and all that the statement has done is taken back."""
    first, second, key = person(), person(), str(uuid4())
    with once_before(WRITE, lambda: register(http, first, key)):
        answer = await register(http, second, key)
    assert_failed(answer, 422, "idempotency_key_reused")
    assert await found(http, second["email"]) == []
    assert (await register(http, second)).status_code == 201


async def test_an_address_that_was_suppressed_meanwhile_is_not_written_to(
    http: httpx.AsyncClient,
) -> None:
    address = new_address()
    with once_before(WRITE, lambda: report(http, email(address))):
        answer = await register(http, person(email=address))
    assert answer.json()["data"]["email_deliverable"] is False
    assert (await fetch(http, answer.json()["data"]["id"]))["email_deliverable"] is False


async def test_what_was_suppressed_after_the_statement_began_is_seen(
    http: httpx.AsyncClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then it has its snapshot, and is about to lock the name, for which it is made to wait."""
    statement = repository._REGISTER
    waits = statement.text.replace(
        "pg_try_advisory_xact_lock(name)", "pg_advisory_xact_lock(name) IS NOT NULL"
    )
    assert waits != statement.text
    monkeypatch.setattr(statement, "text", waits)
    address = new_address()
    name = email_name(address)
    async with connected(database_url) as other:
        async with other.transaction():
            await other.execute("SELECT pg_advisory_xact_lock($1)", lock_key(name))
            await other.execute(
                "INSERT INTO suppressed_addresses (digest, reason, at)"
                " VALUES ($1, 'bounce', now())",
                name,
            )
            registering = asyncio.create_task(register(http, person(email=address)))
            await until(partial(is_waiting, database_url, "WITH asked AS MATERIALIZED"), 3)
        answer = await registering
    assert answer.status_code == 201, answer.text
    assert answer.json()["data"]["email_deliverable"] is False
    assert len(await found(http, address)) == 1


async def test_a_registration_of_unknown_outcome_is_found_by_its_key(
    http: httpx.AsyncClient,
) -> None:
    """The statement is carried out, and its answer gets lost on the way."""
    body, other, key = person(), person(), str(uuid4())

    async def lose(statement: str, _connection: object) -> None:
        if WRITE in statement:
            raise ConnectionResetError

    with around_direct(after=lose):
        assert_failed(await register(http, other), 503, "dependency_unavailable")
        answer = await register(http, body, key)
    assert (answer.status_code, answer.headers["Idempotency-Replayed"]) == (201, "true")
    (user,) = await found(http, body["email"])
    assert user == answer.json()["data"] == await fetch(http, user["id"])
    assert len(await found(http, other["email"])) == 1


async def test_who_hangs_up_in_the_middle_has_registered(http: httpx.AsyncClient) -> None:
    """What was sent to Postgres is done and published, whether anybody waits for it or not."""
    body, sent = person(), asyncio.Event()

    async def note(statement: str, _connection: object) -> None:
        if WRITE in statement:
            sent.set()

    with around_direct(note):
        registering = asyncio.create_task(register(http, body))
        await sent.wait()
        registering.cancel()

        async def is_there() -> bool:
            return bool(await found(http, body["email"]))

        await until(is_there, 3)
    (user,) = await found(http, body["email"])
    assert await fetch(http, user["id"]) == user


async def test_an_announcement_that_comes_late_brings_no_old_version_back(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis does not answer the registration's, and hears it after another's whole write."""
    body = person()
    run, commands = RedisLink.run, list[Sequence[Command]]()

    def stuck(link: RedisLink, some: Sequence[Command]) -> Awaitable[list[Any]]:
        if commands:
            return run(link, some)
        commands.append(some)
        lost: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        lost.set_result([UNREACHABLE] * len(some))
        return lost

    publish = DocumentCache.publish

    async def late(
        cache: DocumentCache, announcement: Announcement, outcomes: Mapping[str, Outcome]
    ) -> set[int]:
        monkeypatch.setattr(DocumentCache, "publish", publish)
        (user_id,) = outcomes
        changed = await http.patch(f"{USERS}{user_id}/preferences", json={"push": False})
        assert changed.status_code == 200, changed.text
        await run(cache._link, commands[0])
        return await publish(cache, announcement, outcomes)

    monkeypatch.setattr(RedisLink, "run", stuck)
    monkeypatch.setattr(DocumentCache, "publish", late)
    answer = await register(http, body)
    assert (answer.status_code, answer.json()["data"]["version"]) == (201, 1)
    assert len(commands) == 1
    document = await fetch(http, answer.json()["data"]["id"])
    assert (document["version"], document["preferences"]["push"]) == (2, False)
