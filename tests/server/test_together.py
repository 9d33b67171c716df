"""Statements that many share: each gets what is its own, and none is held up by another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from sqlalchemy import text
from structlog.testing import capture_logs
from user_service_schemas import RegisterDevice, token_digest
from user_service_server.devices.repository import touch
from user_service_server.preferences import repository
from user_service_server.settings import Settings
from user_service_server.storage import together
from user_service_server.storage.database import lock_key
from user_service_server.storage.direct import Direct, rows_of
from user_service_server.storage.together import Together

from ..engines import settings_for
from ..system.subscribers import connected
from ..system.trouble import until
from .statements import around_direct
from .test_devices import listed, new_token, shown
from .test_feedback import new_address
from .test_preferences import history
from .test_revisions import (
    READ,
    WRITE,
    add,
    assert_same_bytes,
    counted,
    once_before,
    prefer,
    someone,
)
from .test_users import assert_failed, changes_of, fetch, is_waiting, rows

TOUCH = "UPDATE devices SET last_seen_at"
LOCK = "SELECT FROM {table} WHERE {column} = $1 FOR UPDATE"


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    """With patience with Redis: a machine that is busy is not the trouble that is tested here."""
    return settings_for(database_url, redis_url, PASSWORD_REQUIRED="false", REDIS_TIMEOUT_MS="5000")


async def some(http: httpx.AsyncClient, number: int) -> list[str]:
    return [await someone(http) for _ in range(number)]


@asynccontextmanager
async def locked(database_url: str, table: str, column: str, value: object) -> AsyncIterator[None]:
    """Hold the lock on rows of another's transaction."""
    async with connected(database_url) as other, other.transaction():
        await other.execute(LOCK.format(table=table, column=column), value)
        yield


async def assert_only_the_first_waits(
    requests: Iterable[Coroutine[Any, Any, httpx.Response]], status: int
) -> asyncio.Task[httpx.Response]:
    """The others are answered so meanwhile; returns the first, for when nothing is in its way."""
    waiting, *others = map(asyncio.create_task, requests)
    answers = await asyncio.gather(*others)
    assert [answer.status_code for answer in answers] == [status] * len(others)
    assert not waiting.done()
    return waiting


@pytest.mark.parametrize("most", [together.MOST, 3])
async def test_changes_of_the_same_moment_share_their_statements(
    most: int, http: httpx.AsyncClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets what it asked for, and whoever has a key is answered with the same again."""
    monkeypatch.setattr(together, "MOST", most)
    users = await some(http, 10)

    def change(number: int) -> Any:
        key = f"{users[number]}" if number % 2 else ""
        said = {"quiet_hours_start": f"20:{number:02}", "quiet_hours_end": "07:00"}
        return prefer(http, users[number], **said, key=key)

    with counted() as statements:
        answers = await asyncio.gather(*map(change, range(10)))
    assert [answer.status_code for answer in answers] == [200] * 10
    for part in (READ, WRITE):
        assert 1 <= sum(part in statement for statement in statements) <= 6
    for number, (user, answer) in enumerate(zip(users, answers, strict=True)):
        said = answer.json()["data"]
        assert said["quiet_hours_start"] == f"20:{number:02}"
        assert (await fetch(http, user))["preferences"] == said
        assert await changes_of(database_url, user) == [
            (1, "user.created"),
            (2, "preferences.updated"),
        ]
        noted = (await history(http, f"/api/v1/users/{user}/preferences"))["items"]
        assert [entry["version"] for entry in noted] == [2, 1]
        await assert_same_bytes(http, user)
        if number % 2:
            again = await change(number)
            assert again.headers["Idempotency-Replayed"] == "true"
            assert again.content == answer.content


async def test_devices_of_the_same_moment_go_to_their_users(http: httpx.AsyncClient) -> None:
    """And so do those that were seen again."""
    users, tokens = await some(http, 8), [new_token() for _ in range(8)]

    async def register_all() -> list[httpx.Response]:
        return await asyncio.gather(*map(add, [http] * 8, users, tokens))

    with counted() as statements:
        first, second = await register_all(), await register_all()
    assert [answer.status_code for answer in (*first, *second)] == [201] * 8 + [200] * 8
    assert sum(TOUCH in statement for statement in statements) <= 8
    assert sum(READ in statement for statement in statements) <= 6
    for user, token, one, other in zip(users, tokens, first, second, strict=True):
        assert await shown(http, user) == [token]
        assert one.json()["data"]["id"] == other.json()["data"]["id"]
        assert one.headers["ETag"] == other.headers["ETag"]
        (device,) = await listed(http, user)
        assert device["last_seen_at"] > device["registered_at"]


async def test_who_is_locked_holds_up_no_other(http: httpx.AsyncClient, database_url: str) -> None:
    users = await some(http, 6)
    async with locked(database_url, "users", "id", users[0]):
        changes = (prefer(http, user, push=False) for user in users)
        waiting = await assert_only_the_first_waits(changes, 200)
    assert (await waiting).status_code == 200
    assert (await fetch(http, users[0]))["preferences"]["push"] is False


async def test_a_token_that_is_locked_holds_up_no_other(
    http: httpx.AsyncClient, database_url: str
) -> None:
    users, tokens = await some(http, 4), [new_token() for _ in range(4)]
    for user, token in zip(users, tokens, strict=True):
        assert (await add(http, user, token)).status_code == 201
    async with locked(database_url, "devices", "token", tokens[0]):
        waiting = await assert_only_the_first_waits(map(add, [http] * 4, users, tokens), 200)
    assert (await waiting).status_code == 200
    assert await shown(http, users[0]) == [tokens[0]]


async def test_a_name_that_is_locked_holds_up_no_other(
    http: httpx.AsyncClient, database_url: str
) -> None:
    users, tokens = await some(http, 4), [new_token() for _ in range(4)]
    async with connected(database_url) as other, other.transaction():
        name = lock_key(token_digest(tokens[0]))
        await other.execute("SELECT pg_advisory_xact_lock($1)", name)
        waiting = await assert_only_the_first_waits(map(add, [http] * 4, users, tokens), 201)
    assert (await waiting).status_code == 201
    assert await shown(http, users[0]) == [tokens[0]]


async def test_a_duplicate_whose_owner_is_locked_holds_up_no_other(
    http: httpx.AsyncClient, database_url: str
) -> None:
    """An insert would wait for what may become of the address."""
    people = [{"name": "Jane Roe", "email": new_address()} for _ in range(4)]
    first = await http.post("/api/v1/users/", json=people[0])
    owner = first.json()["data"]["id"]
    async with connected(database_url) as other, other.transaction():
        await other.execute("UPDATE users SET version = version WHERE id = $1", owner)
        registrations = (http.post("/api/v1/users/", json=person) for person in people)
        waiting = await assert_only_the_first_waits(registrations, 201)
    assert_failed(await waiting, 409, "email_taken", "email")


async def test_what_postgres_refuses_to_one_costs_no_other(
    http: httpx.AsyncClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them go the way of the general shape, which knows of no other. The log tells."""
    users = await some(http, 5)
    encode, encoded = repository._to_json, count()
    # Of one change categories and what has changed, and so the first statement's.
    monkeypatch.setattr(
        repository, "_to_json", lambda value: "no JSON" if next(encoded) < 2 else encode(value)
    )
    with capture_logs() as told, counted() as statements:
        answers = await asyncio.gather(*(prefer(http, user, push=False) for user in users))
    assert [answer.status_code for answer in answers] == [200] * 5
    assert sum("WITH changed AS" in statement for statement in statements) >= 1
    (refusal,) = [entry for entry in told if entry["event"] == "postgres.refused"]
    assert "InvalidTextRepresentation" in refusal["error"]
    assert "no JSON" not in str(refusal)
    for user in users:
        assert len(await changes_of(database_url, user)) == 2
        assert (await fetch(http, user))["preferences"]["push"] is False


async def test_a_key_that_got_an_answer_meanwhile_takes_back_what_shares_its_statement(
    http: httpx.AsyncClient, database_url: str
) -> None:
    """And each of the others is done after that, once."""
    users, keys = await some(http, 5), [str(uuid4()) for _ in range(5)]
    with once_before(WRITE, lambda: prefer(http, users[0], push=False, key=keys[0])):
        answers = await asyncio.gather(
            *(
                prefer(http, user, push=False, key=key)
                for user, key in zip(users, keys, strict=True)
            )
        )
    assert [answer.status_code for answer in answers] == [200] * 5
    replayed = ["Idempotency-Replayed" in answer.headers for answer in answers]
    assert replayed == [True] + [False] * 4
    for user, answer in zip(users, answers, strict=True):
        assert [version for version, _ in await changes_of(database_url, user)] == [1, 2]
        assert answer.headers["ETag"].endswith('.2"')
        await assert_same_bytes(http, user)


async def test_a_deadlock_of_a_shared_statement_is_nobodys_failure(
    http: httpx.AsyncClient, database_url: str
) -> None:
    """Keys that are a day old are used again while they are deleted, crosswise."""
    users, keys = await some(http, 5), [str(uuid4()) for _ in range(5)]

    async def change_all(push: bool) -> list[int]:
        answers = await asyncio.gather(
            *(prefer(http, users[n], push=push, key=keys[n]) for n in range(5))
        )
        return [answer.status_code for answer in answers]

    assert await change_all(False) == [200] * 5
    async with connected(database_url) as other:
        aged = "UPDATE recorded_answers SET at = now() - interval '25 h' WHERE key = ANY($1)"
        await other.execute(aged, keys)
        async with other.transaction():
            await other.execute("DELETE FROM recorded_answers WHERE key = $1", keys[-1])
            changing = asyncio.create_task(change_all(True))
            await until(partial(is_waiting, database_url, "WITH asked AS MATERIALIZED"), 3)
            await other.execute("DELETE FROM recorded_answers WHERE key = ANY($1)", keys)
    assert await changing == [200] * 5
    for user in users:
        assert len(await changes_of(database_url, user)) == 3


@pytest.mark.parametrize("same", ["user", "key", "token"])
async def test_who_would_meet_in_a_statement_does_not_come_to_it(
    same: str, http: httpx.AsyncClient, database_url: str
) -> None:
    """All that share it would be taken back: so those who meet nobody share it still."""
    users, keys, tokens = await some(http, 4), [""] * 4, [new_token() for _ in range(4)]
    if same == "user":
        users = users[:1] * 4
    elif same == "key":
        keys = [str(uuid4())] * 4
    else:
        tokens = tokens[:1] * 4
    strangers = await some(http, 3)
    with counted() as statements:
        answers, unmet = await asyncio.gather(
            asyncio.gather(*map(add, [http] * 4, users, tokens, keys)),
            asyncio.gather(*(prefer(http, user, push=False) for user in strangers)),
        )
    assert [answer.status_code for answer in unmet] == [200] * 3
    assert sum("WITH changed AS" in statement for statement in statements) <= 4
    statuses = sorted(answer.status_code for answer in answers)
    held = [await shown(http, user) for user in users]
    if same == "user":
        assert statuses == [201] * 4
        assert sorted(held[0]) == sorted(tokens)
        assert [version for version, _ in await changes_of(database_url, users[0])] == [
            *range(1, 6)
        ]
    elif same == "key":
        assert statuses[0] == 201
        assert set(statuses[1:]) <= {409, 422}
        assert sorted(map(len, held)) == [0, 0, 0, 1]
    else:
        assert statuses == [201] * 4
        assert sorted(map(len, held)) == [0, 0, 0, 1]
        assert len(await rows(database_url, "SELECT FROM devices WHERE token = $1", tokens[0])) == 1


async def test_after_a_shared_write_of_unknown_outcome_nobody_reads_what_was_before(
    http: httpx.AsyncClient,
) -> None:
    users = await some(http, 5)
    for user in users:
        assert (await fetch(http, user))["preferences"]["push"] is True

    async def lose(statement: str, _connection: object) -> None:
        if WRITE in statement:
            raise ConnectionResetError

    with around_direct(after=lose):
        answers = await asyncio.gather(*(prefer(http, user, push=False) for user in users))
    for user, answer in zip(users, answers, strict=True):
        assert_failed(answer, 503, "dependency_unavailable")
        assert (await fetch(http, user))["preferences"]["push"] is False


@pytest.fixture
async def asks(database_url: str) -> AsyncIterator[Together]:
    """Asks of one connection, one statement after the other."""
    free = asyncio.Lock()
    async with connected(database_url) as connection:

        @asynccontextmanager
        async def give() -> AsyncIterator[asyncpg.Connection]:
            async with free:
                yield connection

        yield Together(give)


ASKED = f"WITH asked AS ({rows_of({'said': 'text'})})"
ECHO = Direct(text(f"{ASKED} SELECT n, id, said FROM asked"))  # noqa: S608
SLEEP = Direct(text(f"{ASKED} SELECT n, pg_sleep(0.05), said FROM asked"))  # noqa: S608


def asking(said: str | None) -> dict[str, Any]:
    return {"id": str(uuid4()), "said": said}


async def test_each_gets_its_own_row(asks: Together) -> None:
    """Also those who ask for the same, and of a statement that is asked beside another."""
    many = [asking(f"{number % 7}") for number in range(2 * together.MOST + 1)]
    some = [asking(None), asking("{,}"), asking("")]
    answers, others = await asyncio.gather(
        asyncio.gather(*(asks.fetch(ECHO, one) for one in many)),
        asyncio.gather(*(asks.fetch(SLEEP, one) for one in some)),
    )
    assert [(str(row["id"]), row["said"]) for row in answers if row] == [
        (one["id"], one["said"]) for one in many
    ]
    assert [row["said"] for row in others if row] == [None, "{,}", ""]


async def test_who_hangs_up_disturbs_no_other(asks: Together) -> None:
    first, second, third = (asks.fetch(SLEEP, asking(said)) for said in "abc")
    second.cancel()
    assert [row and row["said"] for row in await asyncio.gather(first, third)] == ["a", "c"]
    assert second.cancelled()


async def test_a_failure_is_told_to_all_who_share_it(asks: Together) -> None:
    """One of ours is not hidden, whatever it is."""
    both = [asks.fetch(ECHO, asking("a")), asks.fetch(ECHO, {"id": "nobody"})]
    failures = await asyncio.gather(*both, return_exceptions=True)
    assert [type(failure) for failure in failures] == [KeyError] * 2
    row = await asks.fetch(ECHO, asking("b"))
    assert row is not None


async def test_closing_waits_for_what_is_under_way(asks: Together) -> None:
    answer = asks.fetch(SLEEP, asking("a"))
    await asyncio.sleep(0)

    async def is_under_way() -> bool:
        return bool(asks._under_way)

    await until(is_under_way, 1)
    await asks.close()
    assert answer.done()


async def test_a_token_that_is_seen_many_times_in_one_turn_is_touched_for_all(
    http: httpx.AsyncClient, asks: Together
) -> None:
    """An app that repeats itself costs no more than one that does not."""
    user, token = await someone(http), new_token()
    assert (await add(http, user, token)).status_code == 201
    request, digest = RegisterDevice(token=token, platform="ios"), token_digest(token)
    (first, *others) = await asyncio.gather(
        *(touch(asks, user, digest, request) for _ in range(6)), touch(asks, user, b"", request)
    )
    assert first is not None
    assert others == [first] * 5 + [None]
    (device,) = await listed(http, user)
    assert device["id"] == first[0].id
    assert device["last_seen_at"] > device["registered_at"]
