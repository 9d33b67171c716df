"""Idempotency-Key: a write that is repeated with the same key happens once (api.md, section 8)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import asyncpg
import httpx
import pytest
from sqlalchemy.engine import make_url
from user_service_server import upkeep
from user_service_server.app import create_app
from user_service_server.embedded import EmbeddedPostgres
from user_service_server.http.idempotency import Idempotency
from user_service_server.metrics import Metrics
from user_service_server.settings import Settings
from user_service_server.storage import recorded_answers
from user_service_server.storage.database import Database

from ..engines import open_dir, settings_for
from ..servers import Server
from ..system.subscribers import connected
from ..system.trouble import until
from .test_users import assert_failed

PASSWORD = "StrongPass123!"
USERS = "/api/v1/users/"


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    return settings_for(database_url, redis_url, SECRET_KEY="the first secret key of this test 1")


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    async with connected(database_url) as connection:
        yield connection


def person(name: str = "Somebody", **others: Any) -> dict[str, Any]:
    email = f"{uuid4()}@example.com"
    return {"name": name, "email": email, "password": PASSWORD, **others}


def keyed(key: str | None = None, **headers: str) -> dict[str, str]:
    return {"Idempotency-Key": key or str(uuid4()), **headers}


async def register(http: httpx.AsyncClient, **others: Any) -> dict[str, Any]:
    answer = await http.post(USERS, json=person(**others))
    assert answer.status_code == 201, answer.text
    user: dict[str, Any] = answer.json()["data"]
    return user


def assert_replayed(first: httpx.Response, again: httpx.Response) -> None:
    """The same answer, byte by byte, and said to be a repeat."""
    assert first.is_success, first.text
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers.get("Idempotency-Replayed") == "true", again.text
    assert (again.status_code, again.content) == (first.status_code, first.content)
    for name in ("ETag", "Location", "Content-Type", "Cache-Control"):
        assert again.headers.get(name) == first.headers.get(name), name


async def recorded(sql: asyncpg.Connection, key: str) -> int:
    return int(await sql.fetchval("SELECT count(*) FROM recorded_answers WHERE key = $1", key))


async def test_fifty_parallel_repeats_make_one_user(
    http: httpx.AsyncClient, sql: asyncpg.Connection
) -> None:
    body, headers = person(), keyed()
    answers = await asyncio.gather(
        *(http.post(USERS, json=body, headers=headers) for _ in range(50))
    )
    told = Counter(answer.status_code for answer in answers)
    assert set(told) <= {201, 409}
    assert told[201] >= 1
    for answer in answers:
        if answer.status_code == 409:
            assert_failed(answer, 409, "idempotency_in_progress")
            assert int(answer.headers["Retry-After"]) >= 1
    made = [answer for answer in answers if answer.status_code == 201]
    assert len({answer.content for answer in made}) == 1
    assert [a for a in made if "Idempotency-Replayed" not in a.headers][1:] == []
    again = await asyncio.gather(*(http.post(USERS, json=body, headers=headers) for _ in range(50)))
    for answer in again:
        assert answer.headers["Idempotency-Replayed"] == "true"
        assert answer.content == made[0].content
    assert await sql.fetchval("SELECT count(*) FROM users WHERE email = $1", body["email"]) == 1


async def test_parallel_repeats_of_what_its_own_success_refuses(http: httpx.AsyncClient) -> None:
    """A current password is current no more once the first of them has set the next."""
    user = await register(http)
    headers = keyed()
    body = {"password": "Another-Pass-456", "current_password": PASSWORD}
    answers = await asyncio.gather(
        *(http.put(f"{USERS}{user['id']}/password", json=body, headers=headers) for _ in range(8))
    )
    assert {answer.status_code for answer in answers} <= {200, 409}, [a.text for a in answers]


class Routes:
    """All operations that write, each with requests that succeed when they are first made."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def request(self, operation: str, path: str) -> tuple[str, Any]:
        """Return the path and the body of a request of this operation."""
        user = await register(self._http)
        path = path.replace("{user_id}", user["id"])
        if "{device_id}" in path:
            device = {"token": str(uuid4()), "platform": "ios"}
            answer = await self._http.post(f"{USERS}{user['id']}/devices", json=device)
            path = path.replace("{device_id}", answer.json()["data"]["id"])
        return path, self._bodies()[operation.removesuffix("_by_put")]

    @staticmethod
    def _bodies() -> dict[str, Any]:
        return {
            "create_user": person(),
            "update_user": {"name": "Other"},
            "delete_user": None,
            "set_password": {"password": "Another-Pass-456"},
            "update_preferences": {"push": False},
            "register_device": {"token": str(uuid4()), "platform": "web"},
            "update_device": {"active": False},
            "delete_device": None,
            "restore_address": None,
            "report_feedback": {
                "items": [
                    {
                        "channel": "push",
                        "token": str(uuid4()),
                        "reason": "expired",
                        "at": "2026-01-02T03:04:05Z",
                    }
                ]
            },
        }


READING = {"lookup_users", "batch_users", "resolve_deliveries", "verify_credentials"}
"""Operations that are sent by POST and write nothing."""


async def writes(http: httpx.AsyncClient) -> list[tuple[str, str, str]]:
    """Return (method, path, operation id) of each operation that takes an Idempotency-Key."""
    document = (await http.get("/openapi.json")).json()
    return [
        (method, path, operation["operationId"])
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if any(parameter["name"] == "Idempotency-Key" for parameter in operation["parameters"])
    ]


async def test_every_write_and_nothing_else_takes_a_key(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    unsafe = {
        operation["operationId"]
        for operations in document["paths"].values()
        for method, operation in operations.items()
        if method in {"post", "put", "patch", "delete"}
    }
    assert {operation for _, _, operation in await writes(http)} == unsafe - READING


async def test_every_write_happens_once(http: httpx.AsyncClient, sql: asyncpg.Connection) -> None:
    for method, route, operation in await writes(http):
        path, body = await Routes(http).request(operation, route)
        headers = keyed()
        first = await http.request(method, path, json=body, headers=headers)
        changes = await sql.fetchval("SELECT count(*) FROM changes")
        for _ in range(2):
            again = await http.request(method, path, json=body, headers=headers)
            assert_replayed(first, again)
        assert await sql.fetchval("SELECT count(*) FROM changes") == changes, operation


async def test_a_write_that_changed_nothing_is_recorded_too(http: httpx.AsyncClient) -> None:
    user = await register(http)
    headers = keyed()
    path = f"{USERS}{user['id']}"
    first = await http.patch(path, json={"name": user["name"]}, headers=headers)
    await http.patch(path, json={"name": "Meanwhile"})
    again = await http.patch(path, json={"name": user["name"]}, headers=headers)
    assert_replayed(first, again)
    assert (await http.get(path)).json()["data"]["name"] == "Meanwhile"


async def test_a_device_that_is_known_is_replayed_with_its_status(http: httpx.AsyncClient) -> None:
    user = await register(http)
    path, body = f"{USERS}{user['id']}/devices", {"token": str(uuid4()), "platform": "ios"}
    new, known = keyed(), keyed()
    first = await http.post(path, json=body, headers=new)
    second = await http.post(path, json=body, headers=known)
    assert (first.status_code, second.status_code) == (201, 200)
    assert_replayed(first, await http.post(path, json=body, headers=new))
    assert_replayed(second, await http.post(path, json=body, headers=known))


async def test_a_key_that_was_used_for_something_else_is_refused(http: httpx.AsyncClient) -> None:
    user, other = await register(http), await register(http)
    path, body = f"{USERS}{user['id']}", {"name": "Other"}
    etag = (await http.get(path)).headers["ETag"]
    headers = keyed()
    first = await http.patch(path, json=body, headers={**headers, "If-Match": etag})
    others = [
        ("PATCH", path, {"name": "Another"}, etag),
        ("PATCH", path, body, None),
        ("PATCH", path, body, "*"),
        ("PUT", path, body, etag),
        ("PATCH", f"{USERS}{other['id']}", body, etag),
        ("PATCH", f"{path}/preferences", {"push": False}, etag),
        ("DELETE", path, None, etag),
    ]
    for method, elsewhere, what, condition in others:
        condition_header = {"If-Match": condition} if condition else {}
        answer = await http.request(
            method, elsewhere, json=what, headers={**headers, **condition_header}
        )
        assert_failed(answer, 422, "idempotency_key_reused")
    # Its own version is another by now, which a repeat need not know.
    again = await http.patch(path, json=body, headers={**headers, "If-Match": etag})
    assert_replayed(first, again)


async def test_the_digest_is_of_the_bytes_of_the_body(http: httpx.AsyncClient) -> None:
    headers = keyed() | {"Content-Type": "application/json"}
    user = await register(http)
    path = f"{USERS}{user['id']}"
    await http.patch(path, content=b'{"name":"Other"}', headers=headers)
    answer = await http.patch(path, content=b'{"name": "Other"}', headers=headers)
    assert_failed(answer, 422, "idempotency_key_reused")


async def test_what_was_refused_is_not_recorded(
    http: httpx.AsyncClient, sql: asyncpg.Connection
) -> None:
    taken, user = await register(http), await register(http)
    path = f"{USERS}{user['id']}"
    key = str(uuid4())
    refusals = [
        ("POST", USERS, person() | {"email": taken["email"]}, 409),
        ("POST", USERS, person() | {"name": ""}, 422),
        ("POST", USERS, person() | {"password": "password"}, 422),
        ("PATCH", f"{USERS}{uuid4()}", {"name": "X"}, 404),
        ("PUT", f"{path}/password", {"password": "Another-Pass-456", "current_password": "x"}, 401),
        ("DELETE", f"{path}/devices/{uuid4()}", None, 404),
    ]
    for method, where, body, status in refusals:
        answer = await http.request(method, where, json=body, headers=keyed(key))
        assert answer.status_code == status, answer.text
        assert await recorded(sql, key) == 0
    stale = keyed(key, **{"If-Match": '"00000000.00000000.1"'})
    assert_failed(
        await http.patch(path, json={"name": "X"}, headers=stale), 412, "version_mismatch"
    )
    # The key is still free for what succeeds.
    first = await http.patch(path, json={"name": "X"}, headers=keyed(key))
    assert first.status_code == 200
    assert await recorded(sql, key) == 1


async def test_what_failed_is_not_recorded(
    http: httpx.AsyncClient, sql: asyncpg.Connection
) -> None:
    """A row that somebody holds is not got within the time for locks: a 503, and then it is."""
    user = await register(http)
    path, headers = f"{USERS}{user['id']}", keyed("held row")
    async with sql.transaction():
        await sql.execute("SELECT FROM users WHERE id = $1 FOR UPDATE", user["id"])
        answer = await http.patch(path, json={"name": "Other"}, headers=headers)
        assert_failed(answer, 503, "overloaded")
    assert await recorded(sql, "held row") == 0
    first = await http.patch(path, json={"name": "Other"}, headers=headers)
    assert_replayed(first, await http.patch(path, json={"name": "Other"}, headers=headers))


async def test_a_repeat_of_what_is_under_way_is_told_so_at_once(
    http: httpx.AsyncClient, sql: asyncpg.Connection
) -> None:
    user = await register(http)
    path, headers = f"{USERS}{user['id']}", keyed()

    async def is_waiting() -> bool:
        return bool(
            await sql.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                " AND datname = current_database()"
            )
        )

    async with sql.transaction():
        await sql.execute("SELECT FROM users WHERE id = $1 FOR UPDATE", user["id"])
        first = asyncio.create_task(http.patch(path, json={"name": "Other"}, headers=headers))
        await until(is_waiting, 3)
        async with asyncio.timeout(1):  # less than a lock is waited for
            answer = await http.patch(path, json={"name": "Other"}, headers=headers)
        assert_failed(answer, 409, "idempotency_in_progress")
        assert int(answer.headers["Retry-After"]) >= 1
    assert_replayed(await first, await http.patch(path, json={"name": "Other"}, headers=headers))


async def test_a_repeat_that_looked_before_the_first_had_committed_happens_once(
    http: httpx.AsyncClient, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement that gets the lock sees what was there before: the record looks again."""

    async def look_too_early(*_: object) -> tuple[bool, None]:
        return True, None

    user = await register(http)
    path, headers = f"{USERS}{user['id']}", keyed()
    first = await http.patch(path, json={"name": "Once"}, headers=headers)
    await http.patch(path, json={"name": "Meanwhile"})
    changes = await sql.fetchval("SELECT count(*) FROM changes")
    monkeypatch.setattr(recorded_answers, "lock_and_find", look_too_early)
    assert_replayed(first, await http.patch(path, json={"name": "Once"}, headers=headers))
    assert await sql.fetchval("SELECT count(*) FROM changes") == changes
    assert (await http.get(path)).json()["data"]["name"] == "Meanwhile"


async def test_erasing_a_user_erases_the_records(
    http: httpx.AsyncClient, sql: asyncpg.Connection
) -> None:
    name, token = f"Name {uuid4()}", f"token {uuid4()}"
    body = person(name)
    answer = await http.post(USERS, json=body, headers=keyed())
    path = f"{USERS}{answer.json()['data']['id']}"
    await http.patch(path, json={"phone": "+48221234567"}, headers=keyed())
    device = {"token": token, "platform": "ios"}
    await http.post(f"{path}/devices", json=device, headers=keyed())
    await http.put(f"{path}/password", json={"password": "Another-Pass-456"}, headers=keyed())

    async def found(text: str) -> list[str]:
        """Return the tables of this database that have this text in any column, bytes included."""
        tables = await sql.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        as_bytes = text.encode().hex()
        return [
            row[0]
            for row in tables
            if await sql.fetchval(
                f"SELECT count(*) FROM {row[0]} AS t WHERE strpos(t::text, $1) > 0"  # noqa: S608
                " OR strpos(t::text, $2) > 0",
                text,
                as_bytes,
            )
        ]

    assert "recorded_answers" in await found(name)
    assert "recorded_answers" in await found(token)
    for secret in (PASSWORD, "Another-Pass-456"):
        assert await found(secret) == []
    erased = keyed()
    first = await http.delete(path, headers=erased)
    for personal in (name, str(body["email"]), token):
        assert await found(personal) == []
    assert_replayed(first, await http.delete(path, headers=erased))


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "tab\there", "é", "nul\x00"])
async def test_key_that_is_none_is_refused(http: httpx.AsyncClient, key: str) -> None:
    headers = [(b"idempotency-key", key.encode())]
    answer = await http.post(USERS, json=person(), headers=headers)
    assert_failed(answer, 422, "validation_failed", "Idempotency-Key")


@pytest.mark.parametrize("key", ["x", "x" * 255, "a key with spaces", '"quoted"', "~!@#$%^&*()"])
async def test_key_may_be_any_printable_text(http: httpx.AsyncClient, key: str) -> None:
    body = person()
    first = await http.post(USERS, json=body, headers=keyed(key))
    assert_replayed(first, await http.post(USERS, json=body, headers=keyed(key)))


async def test_keys_that_differ_in_case_are_two(http: httpx.AsyncClient) -> None:
    first = await http.post(USERS, json=person(), headers=keyed("Case"))
    second = await http.post(USERS, json=person(), headers=keyed("case"))
    assert (first.status_code, second.status_code) == (201, 201)


async def test_a_record_survives_a_change_of_the_secret_key(
    http: httpx.AsyncClient, database_url: str, redis_url: str
) -> None:
    """In the order of security.md servers of before and after a step understand each other."""
    body, headers = person(), keyed()
    first = await http.post(USERS, json=body, headers=headers)
    new = "the second secret key of this test"

    @asynccontextmanager
    async def another(**secrets: str) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(settings_for(database_url, redis_url, **secrets))
        async with app.lifespan():
            transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # see conftest
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                yield client

    previous = "the first secret key of this test 1"
    async with (
        another(SECRET_KEY=previous, SECRET_KEY_PREVIOUS=new) as before,
        another(SECRET_KEY=new, SECRET_KEY_PREVIOUS=previous) as client,
    ):
        further, once_more = person(), keyed()
        answer = await client.post(USERS, json=further, headers=once_more)
        assert_replayed(answer, await before.post(USERS, json=further, headers=once_more))
        assert_replayed(first, await client.post(USERS, json=body, headers=headers))
        other = await client.post(USERS, json=person(), headers=headers)
        assert_failed(other, 422, "idempotency_key_reused")
    async with another(SECRET_KEY=new) as client:
        answer = await client.post(USERS, json=body, headers=headers)
        assert_failed(answer, 422, "idempotency_key_reused")


async def test_a_record_is_kept_for_24_hours_and_then_cleared_away(
    http: httpx.AsyncClient, sql: asyncpg.Connection, settings: Settings
) -> None:
    user = await register(http)
    path = f"{USERS}{user['id']}"
    key = str(uuid4())
    age = "UPDATE recorded_answers SET at = now() - CAST($1 AS interval) WHERE key = $2"
    first = await http.patch(path, json={"name": "Other"}, headers=keyed(key))
    await sql.execute(age, timedelta(hours=23, minutes=59), key)
    assert_replayed(first, await http.patch(path, json={"name": "Other"}, headers=keyed(key)))

    await sql.execute(age, timedelta(hours=24, seconds=1), key)
    anew = await http.patch(path, json={"name": "Third"}, headers=keyed(key))
    assert (anew.status_code, "Idempotency-Replayed" in anew.headers) == (200, False)
    assert_replayed(anew, await http.patch(path, json={"name": "Third"}, headers=keyed(key)))

    fresh = str(uuid4())
    await http.patch(path, json={"name": "Fourth"}, headers=keyed(fresh))
    await sql.execute(age, timedelta(hours=24, seconds=1), key)
    database = Database(settings)
    try:
        job = Idempotency(settings, database, Metrics()).prune
        assert await job() >= 1
        assert await job() == 0
    finally:
        await database.close()
    assert (await recorded(sql, key), await recorded(sql, fresh)) == (0, 1)


async def test_upkeep_clears_away_records(
    settings: Settings, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "INTERVAL", 0.1)
    await sql.execute(
        "INSERT INTO recorded_answers (caller, key, digest, status, headers, body, user_id, at)"
        " SELECT 'x', n, '', 200, '[]', '', gen_random_uuid(), now() - interval '25 hours'"
        " FROM generate_series(1, 2500) n"
    )

    async def are_gone() -> bool:
        return not await sql.fetchval("SELECT count(*) FROM recorded_answers WHERE caller = 'x'")

    async with create_app(settings).lifespan():
        await until(are_gone, 5)


class CommitProxy:
    """Stands between a server and Postgres, and calls out around a write that records its answer.

    That is one statement, which is parsed first, and bound and run by the next message.

    Args:
        directory: where its socket is made.
        target: the socket of Postgres.
        key: of whose write.
        on_commit: called with `before` when the write was asked for and not passed on, and with
            `after` when Postgres has committed it and the server was not told.
    """

    def __init__(
        self, directory: Path, target: Path, key: str, on_commit: Callable[[str], bool]
    ) -> None:
        self._path = directory / ".s.PGSQL.5432"
        self._target = target
        self._key = key.encode()
        self._on_commit = on_commit
        self._connections: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.append(task)
        from_postgres, to_postgres = await asyncio.open_unix_connection(self._target)
        records = commits = False

        async def forth() -> None:
            nonlocal records, commits
            while chunk := await reader.read(65536):
                if records and self._key in chunk:
                    commits = True
                    if self._on_commit("before"):
                        return
                records = records or b"INSERT INTO recorded_answers" in chunk
                to_postgres.write(chunk)

        async def back() -> None:
            while chunk := await from_postgres.read(65536):
                if commits and b"SELECT 1\0" in chunk and self._on_commit("after"):
                    return
                writer.write(chunk)

        ways = [asyncio.create_task(forth()), asyncio.create_task(back())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (writer, to_postgres):
                end.close()
                with suppress(OSError):
                    await end.wait_closed()


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_server_killed_around_the_commit(
    database_url: str, redis_url: str, postgres: EmbeddedPostgres, moment: str
) -> None:
    """SIGKILL when the commit was asked for, or when it was done and nobody knows: then repeat."""
    killed = asyncio.Event()

    def on_commit(when: str) -> bool:
        if killed.is_set() or when != moment:
            return False
        server.kill()
        killed.set()
        return True

    target = postgres.socket_dir / ".s.PGSQL.5432"
    with open_dir() as directory:
        through_proxy = make_url(database_url).update_query_dict({"host": str(directory)})
        server = Server(
            {
                "DATABASE_URL": through_proxy.render_as_string(hide_password=False),
                "REDIS_URL": redis_url,
                "SECRET_KEY": "the secret key of a server that dies",
            }
        )
        body, headers = person(), keyed()
        async with CommitProxy(directory, target, headers["Idempotency-Key"], on_commit):
            await asyncio.to_thread(server.start)
            try:
                async with httpx.AsyncClient(base_url=server.url, timeout=15) as http:
                    with pytest.raises(httpx.TransportError):
                        await http.post(USERS, json=body, headers=headers)
                    assert killed.is_set()
                    async with connected(database_url) as sql:
                        made = await sql.fetchval(
                            "SELECT count(*) FROM users WHERE email = $1", body["email"]
                        )
                        assert made == (moment == "after")
                    await asyncio.to_thread(server.start)
                    again = await http.post(USERS, json=body, headers=headers)
                    assert again.status_code == 201, again.text
                    replayed = again.headers.get("Idempotency-Replayed")
                    assert replayed == ("true" if moment == "after" else None)
                    assert again.headers["Location"].endswith(again.json()["data"]["id"])
                    shown = await http.get(again.headers["Location"])
                    assert shown.headers["ETag"] == again.headers["ETag"]
                    assert shown.json()["data"] == again.json()["data"]
                    found = await http.post(f"{USERS}lookup", json={"email": body["email"]})
                    assert len(found.json()["data"]["users"]) == 1
            finally:
                if server.process is not None:
                    await asyncio.to_thread(server.kill)
                server.log.unlink()
