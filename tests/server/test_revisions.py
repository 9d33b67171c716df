"""A change of one user in two statements: what comes between them is never lost or overwritten."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from sqlalchemy import Engine, event
from user_service_server.devices import repository as devices_repository
from user_service_server.errors import DependencyUnavailable
from user_service_server.preferences import repository
from user_service_server.settings import Settings
from user_service_server.storage.database import Database

from ..engines import settings_for
from ..system.subscribers import connected
from ..system.trouble import until
from .statements import around_direct, in_background
from .test_devices import listed, new_token, shown
from .test_users import assert_failed, changes_of, fetch, is_waiting, register, rows

READ, WRITE = "AS is_answered", "taken AS ("


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    """With patience with Redis: a machine that is busy is not the trouble that is tested here."""
    return settings_for(database_url, redis_url, PASSWORD_REQUIRED="false", REDIS_TIMEOUT_MS="5000")


async def someone(http: httpx.AsyncClient) -> str:
    return str((await register(http, password=None))["id"])


async def prefer(http: httpx.AsyncClient, user_id: str, **said: Any) -> httpx.Response:
    """Update preferences; `key` is the Idempotency-Key."""
    key = said.pop("key", None)
    headers = {"Idempotency-Key": key} if key else {}
    path = f"/api/v1/users/{user_id}/preferences"
    return await http.patch(path, json=said, headers=headers)


async def add(http: httpx.AsyncClient, user_id: str, token: str, key: str = "") -> httpx.Response:
    headers = {"Idempotency-Key": key} if key else {}
    body = {"token": token, "platform": "ios"}
    return await http.post(f"/api/v1/users/{user_id}/devices", json=body, headers=headers)


@contextmanager
def once_before(part: str, meanwhile: Callable[[], Awaitable[object]]) -> Iterator[None]:
    """Let something happen before the first statement with `part` in it."""
    met: list[str] = []

    async def meet(statement: str, _connection: object) -> None:
        if part in statement and not met:
            met.append(statement)
            await meanwhile()

    with around_direct(meet):
        yield
    assert met, f"no statement has {part}"


@contextmanager
def counted() -> Iterator[list[str]]:
    """Collect what requests ask of Postgres: the state, the feed and the keys are no request's."""
    seen: list[str] = []

    async def note(statement: str, _connection: object) -> None:
        seen.append(statement)

    def note_other(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        if not in_background():
            seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note_other)
    try:
        with around_direct(note):
            yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", note_other)


async def test_a_change_of_one_user_takes_two_statements(http: httpx.AsyncClient) -> None:
    """With a key and without; the touch of a token that may be known is one more."""
    user = await someone(http)
    with counted() as statements:
        assert (await prefer(http, user, push=False)).status_code == 200
        assert (await prefer(http, user, push=True, key=str(uuid4()))).status_code == 200
        assert (await add(http, user, new_token(), key=str(uuid4()))).status_code == 201
    kinds = [
        next(part for part in (READ, WRITE, "?") if part in s or part == "?") for s in statements
    ]
    assert kinds == [READ, WRITE] * 3


async def test_what_would_change_nothing_takes_one_statement(
    http: httpx.AsyncClient, database_url: str
) -> None:
    """With a key it takes more: the answer is kept."""
    user, key = await someone(http), str(uuid4())
    first = await prefer(http, user, push=False)
    with counted() as statements:
        again = await prefer(http, user, push=False)
    assert [READ in statement for statement in statements] == [True]
    assert (again.status_code, again.json(), again.headers["ETag"]) == (
        200,
        first.json(),
        first.headers["ETag"],
    )
    assert (await prefer(http, user, push=False, key=key)).json() == first.json()
    assert (await prefer(http, user, push=True)).headers["ETag"] != first.headers["ETag"]
    replayed = await prefer(http, user, push=False, key=key)
    assert (replayed.json(), replayed.headers["Idempotency-Replayed"]) == (first.json(), "true")
    assert len(await changes_of(database_url, user)) == 3


async def test_what_is_changed_between_the_statements_is_kept(
    http: httpx.AsyncClient, database_url: str
) -> None:
    """The write is refused, and made anew on what is there now."""
    user = await someone(http)
    with once_before(WRITE, lambda: prefer(http, user, email=False)):
        answer = await prefer(http, user, push=False)
    assert answer.status_code == 200, answer.text
    said = (await fetch(http, user))["preferences"]
    assert (said["email"], said["push"]) == (False, False)
    updated = "preferences.updated"
    assert await changes_of(database_url, user) == [(1, "user.created"), (2, updated), (3, updated)]
    history = await rows(
        database_url, "SELECT version FROM preference_history WHERE user_id = $1 ORDER BY id", user
    )
    assert history == [(1,), (2,), (3,)]


@pytest.mark.parametrize("waits", [False, True])
async def test_a_user_whom_another_has_locked_is_changed_after_that(
    waits: bool, http: httpx.AsyncClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement passes over the user; if it waited it would see that the version has risen.

    It has begun, and so sees what was there before.
    """
    if waits:
        statement = repository._SAY
        waiting = statement.text.replace(" SKIP LOCKED", "")
        assert waiting != statement.text
        monkeypatch.setattr(statement, "text", waiting)
    user = await someone(http)
    held, go_on = asyncio.Event(), asyncio.Event()

    async def hold(statement: str, _connection: object) -> None:
        # The commit of the first is held back: its statement has run, and the user is locked.
        if "WITH changed AS" in statement and not held.is_set():
            held.set()
            await go_on.wait()

    waiting_in = "WITH asked AS MATERIALIZED" if waits else "FOR NO KEY UPDATE"
    with around_direct(after=hold):
        first = asyncio.create_task(http.patch(f"/api/v1/users/{user}", json={"name": "First"}))
        await held.wait()
        second = asyncio.create_task(prefer(http, user, push=False))
        await until(partial(is_waiting, database_url, waiting_in), 3)
        go_on.set()
        assert (await first).status_code == 200
        assert (await second).status_code == 200
    document = await fetch(http, user)
    assert (document["name"], document["version"]) == ("First", 3)
    assert document["preferences"]["push"] is False


@pytest.mark.parametrize("change", ["preferences", "device"])
async def test_a_user_of_the_same_version_after_the_wait_is_revised(
    change: str, http: httpx.AsyncClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changed raises no version, as a password does. The statement is made to wait for it."""
    statement = repository._SAY if change == "preferences" else devices_repository._ADD
    monkeypatch.setattr(statement, "text", statement.text.replace(" SKIP LOCKED", ""))
    user, token = await someone(http), new_token()
    async with connected(database_url) as sql:
        async with sql.transaction():
            await sql.execute("UPDATE users SET password_hash = 'other' WHERE id = $1", user)
            with counted() as statements:
                writing = asyncio.create_task(
                    prefer(http, user, push=False)
                    if change == "preferences"
                    else add(http, user, token)
                )
                await until(partial(is_waiting, database_url, "WITH asked AS MATERIALIZED"), 3)
        answer = await writing
    assert answer.status_code in {200, 201}, answer.text
    assert not any("WITH changed AS" in statement for statement in statements)
    await assert_same_bytes(http, user)
    ((version, password),) = await rows(
        database_url, "SELECT version, password_hash FROM users WHERE id = $1", user
    )
    assert (version, password) == (2, "other")


async def test_an_erased_user_is_not_revised(http: httpx.AsyncClient, database_url: str) -> None:
    user = await someone(http)
    with once_before(WRITE, lambda: http.delete(f"/api/v1/users/{user}")):
        answer = await add(http, user, new_token())
    assert_failed(answer, 404, "user_not_found")
    assert await rows(database_url, "SELECT FROM devices WHERE user_id = $1", user) == []


async def test_a_token_that_another_registered_meanwhile_moves(http: httpx.AsyncClient) -> None:
    """As one that was known before: the last login wins, and it has one owner."""
    mine, theirs, token = await someone(http), await someone(http), new_token()
    with once_before(WRITE, lambda: add(http, theirs, token)):
        answer = await add(http, mine, token)
    assert answer.status_code == 201, answer.text
    assert await shown(http, mine) == [token]
    assert await shown(http, theirs) == []
    assert await listed(http, theirs) == []


@pytest.mark.parametrize("change", ["preferences", "device"])
async def test_a_key_that_got_an_answer_meanwhile_is_not_answered_twice(
    change: str, http: httpx.AsyncClient, database_url: str
) -> None:
    """Its row is met, and all that the statement has done is taken back."""
    mine, theirs, key, token = await someone(http), await someone(http), str(uuid4()), new_token()

    async def write(user: str) -> httpx.Response:
        if change == "device":
            return await add(http, user, token if user == mine else new_token(), key)
        return await prefer(http, user, push=False, key=key)

    with once_before(WRITE, lambda: write(theirs)):
        answer = await write(mine)
    assert_failed(answer, 422, "idempotency_key_reused")
    assert await changes_of(database_url, mine) == [(1, "user.created")]
    document = await fetch(http, mine)
    assert (document["version"], document["devices"]) == (1, [])
    assert document["preferences"]["push"] is True
    assert await listed(http, mine) == []


async def test_a_record_that_is_too_old_is_replaced(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user, key = await someone(http), str(uuid4())
    assert (await prefer(http, user, push=False, key=key)).status_code == 200
    old = (
        "UPDATE recorded_answers SET at = now() - interval '25 hours' WHERE key = $1 RETURNING key"
    )
    assert len(await rows(database_url, old, key)) == 1
    answer = await prefer(http, user, push=True, key=key)
    assert answer.status_code == 200, answer.text
    assert "Idempotency-Replayed" not in answer.headers
    again = await prefer(http, user, push=True, key=key)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.content == answer.content


async def test_after_a_write_of_unknown_outcome_nobody_reads_what_was_before(
    http: httpx.AsyncClient,
) -> None:
    """The statement is carried out, and its answer gets lost on the way."""
    user = await someone(http)
    assert (await fetch(http, user))["preferences"]["push"] is True

    async def lose(statement: str, _connection: object) -> None:
        if WRITE in statement:
            raise ConnectionResetError

    with around_direct(after=lose):
        assert_failed(await prefer(http, user, push=False), 503, "dependency_unavailable")
    assert (await fetch(http, user))["preferences"]["push"] is False


async def test_who_hangs_up_in_the_middle_leaves_no_old_copy(http: httpx.AsyncClient) -> None:
    """What was sent to Postgres is published, whether anybody waits for the answer or not."""
    user = await someone(http)
    assert (await fetch(http, user))["version"] == 1
    sent = asyncio.Event()

    async def note(statement: str, _connection: object) -> None:
        if WRITE in statement:
            sent.set()

    with around_direct(note):
        writing = asyncio.create_task(prefer(http, user, push=False))
        await sent.wait()
        writing.cancel()

        async def is_new() -> bool:
            return bool((await fetch(http, user))["version"] == 2)

        await until(is_new, 3)
    assert (await fetch(http, user))["preferences"]["push"] is False


async def test_a_version_has_the_same_bytes_from_the_cache_and_from_postgres(
    http: httpx.AsyncClient,
) -> None:
    """What a revision makes of the document is what a read of it makes."""
    user = await someone(http)
    both = {"email": False, "push": True}
    for said in (
        {"categories": {"b": both, "longer": {"push": True, "email": False}, "a": {"push": False}}},
        {"categories": {"a": {"email": True}}, "muted_until": "2031-01-01T12:00:00.120+01:00"},
        {"quiet_hours_start": "22:00", "quiet_hours_end": "07:00", "timezone": "Europe/Warsaw"},
    ):
        assert (await prefer(http, user, **said)).status_code == 200
        await assert_same_bytes(http, user)
    for _ in range(3):
        assert (await add(http, user, new_token())).status_code == 201
        await assert_same_bytes(http, user)


async def assert_same_bytes(http: httpx.AsyncClient, user_id: str) -> None:
    path = f"/api/v1/users/{user_id}"
    cached = await http.get(path)
    read = await http.get(path, headers={"X-Min-Version": str(10**9)})
    assert cached.headers["ETag"] == read.headers["ETag"]
    assert cached.content == read.content


@pytest.mark.parametrize(
    "error", [asyncpg.CannotConnectNowError("starting up"), asyncpg.InternalClientError("lost")]
)
async def test_a_postgres_that_cannot_be_connected_to_is_told_as_such(
    error: Exception, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that starts again after a crash says so; the driver's adapter wraps it once."""

    async def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr(asyncpg, "connect", refuse)
    database = Database(settings)
    with pytest.raises(DependencyUnavailable):
        async with database.direct():
            pass
    await database.close()
