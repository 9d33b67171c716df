"""The document under its versions: parallel writes, and the cache's rules 1 to 3 and 5."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
import redis.asyncio
from sqlalchemy import Engine, event
from sqlalchemy.util import await_only
from user_service_server.metrics import Metrics
from user_service_server.settings import Settings
from user_service_server.storage.buckets import BUCKETS, bucket_of
from user_service_server.storage.cache import (
    BYPASS,
    FOREIGN,
    LEASE_TTL_MS,
    MARKER_TTL_MS,
    MISS,
    SCRIPT_LIMIT,
    Announcement,
    DocumentCache,
    Lease,
    Outcome,
    Said,
)
from user_service_server.storage.document import DocumentShape, StoredDocument
from user_service_server.storage.link import RedisLink
from user_service_server.storage.state import Generation, SharedState, StateWatcher
from user_service_server.storage.wire import UNREACHABLE, Command

from ..engines import settings_for
from ..system.subscribers import connected, insert_users
from .statements import around_direct, in_background
from .test_users import assert_failed, changes_of, fetch, register

ANY_VERSION = {"X-Min-Version": str(10**9)}
"""Passes over every cached copy."""
U = str(uuid4())
"""Whoever the cache by itself is asked for."""


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    """Connections for thirty writes at once, so that they wait for each other in Postgres.

    And patience with Redis: a machine that is busy is not the trouble that is tested here.
    """
    return settings_for(
        database_url,
        redis_url,
        PASSWORD_REQUIRED="false",
        DATABASE_POOL_SIZE="50",
        REDIS_TIMEOUT_MS="5000",
    )


class Held:
    """Something that a task of the server came to, and waits at until it is let go."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._go = asyncio.Event()

    async def pass_(self) -> None:
        """Called in the server's task: the first who comes waits, later ones do not."""
        if not self.reached.is_set() and not in_background():
            self.reached.set()
            await self._go.wait()

    def let_go(self) -> None:
        self._go.set()


@contextmanager
def _listening(name: str, listener: Callable[..., None]) -> Iterator[None]:
    event.listen(Engine, name, listener)
    try:
        yield
    finally:
        event.remove(Engine, name, listener)


@contextmanager
def counted() -> Iterator[list[str]]:
    """Collect the statements that the server sends."""
    statements: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if not in_background():
            statements.append(statement)

    async def note_direct(statement: str, _connection: Any) -> None:
        note(None, None, statement)

    with _listening("before_cursor_execute", note), around_direct(note_direct):
        yield statements


@contextmanager
def held_after(part: str) -> Iterator[Held]:
    """Hold the first task that has run a statement with `part` in it."""
    held = Held()

    async def hold_direct(statement: str, _connection: Any) -> None:
        if part in statement:
            await held.pass_()

    def hold(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        await_only(hold_direct(statement, None))

    with _listening("after_cursor_execute", hold), around_direct(after=hold_direct):
        try:
            yield held
        finally:
            held.let_go()


@contextmanager
def held_at_commit() -> Iterator[Held]:
    """Hold the first task that is about to commit."""
    held = Held()
    with _listening("commit", lambda _connection: await_only(held.pass_())):
        try:
            yield held
        finally:
            held.let_go()


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what another task brings about in Redis, where nothing announces it."""
    async with asyncio.timeout(5):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
async def stored(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """Looks into the cache, beside the server."""
    async with redis.asyncio.Redis.from_url(redis_url) as connection:
        yield connection


@dataclass
class Someone:
    """A user, with the place of the document in the cache."""

    document: dict[str, Any]
    cache: redis.asyncio.Redis

    @property
    def id(self) -> str:
        return str(self.document["id"])

    @property
    def path(self) -> str:
        return f"/api/v1/users/{self.id}"

    async def key(self) -> Any:
        """Return the key under which something of the user lies, or None."""
        keys = await self.cache.keys(f"*{self.id}*")
        assert len(keys) <= 1
        return keys[0] if keys else None

    async def kind(self) -> str:
        """Return what the cache holds: a document and its version, a lease, a marker, nothing."""
        key = await self.key()
        if key is None:
            return "nothing"
        if await self.cache.type(key) == b"hash":
            return "marker"
        value: Any = await self.cache.get(key)
        if value is None:
            return "nothing"
        head = value.split(b"\n")[0].decode()
        return f"version {head[1:].split()[0]}" if head[:1] == "D" else "lease"

    async def evict(self) -> None:
        key = await self.key()
        assert key is not None
        await self.cache.delete(key)


async def someone(http: httpx.AsyncClient, cache: redis.asyncio.Redis) -> Someone:
    return Someone(await register(http, password=None), cache)


def essence(document: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a document that the parallel writes change."""
    return {
        "name": document["name"],
        "phone": document["phone"],
        "timezone": document["preferences"]["timezone"],
        "categories": set(document["preferences"]["categories"]),
        "tokens": [device["token"] for device in document["devices"]],
    }


@dataclass(frozen=True)
class ParallelWrite:
    """One of thirty writes, and what it makes of the essence of the version before."""

    method: str
    path: str
    body: dict[str, Any]
    kind: str
    part: str
    change: Callable[[Any], Any]


def thirty_writes(devices: list[dict[str, Any]]) -> list[ParallelWrite]:
    """Make writes to profile, preferences and devices, of which four are there already."""

    def profile(**said: str) -> ParallelWrite:
        ((part, value),) = said.items()
        return ParallelWrite("PATCH", "", said, "user.updated", part, lambda _: value)

    def preference(part: str, said: Any, change: Callable[[Any], Any]) -> ParallelWrite:
        kind = "preferences.updated"
        return ParallelWrite("PUT", "/preferences", {part: said}, kind, part, change)

    def category(name: str) -> ParallelWrite:
        return preference("categories", {name: {"push": False}}, lambda before: {*before, name})

    def zone(name: str) -> ParallelWrite:
        return preference("timezone", name, lambda _: name)

    def arrival(token: str) -> ParallelWrite:
        body, kind = {"token": token, "platform": "ios"}, "device.registered"
        return ParallelWrite("POST", "/devices", body, kind, "tokens", lambda old: [token, *old])

    def departure(device: dict[str, Any]) -> ParallelWrite:
        return ParallelWrite(
            *("PATCH", f"/devices/{device['id']}", {"active": False}, "device.updated", "tokens"),
            lambda before: [token for token in before if token != device["token"]],
        )

    return [
        *(profile(name=f"name {i}") for i in range(6)),
        *(profile(phone=f"+4822123456{i}") for i in range(4)),
        *(category(f"c{i}") for i in range(8)),
        *(zone(name) for name in ("Asia/Tokyo", "Europe/Paris")),
        *(arrival(f"new-{i}") for i in range(6)),
        *(departure(device) for device in devices),
    ]


def version_of(answer: httpx.Response) -> int:
    return int(answer.headers["etag"].strip('"').split(".")[2])


async def test_thirty_parallel_writes_lose_nothing_and_each_version_is_what_was_committed(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis, database_url: str
) -> None:
    user = await someone(http, stored)
    for i in range(4):
        await http.post(f"{user.path}/devices", json={"token": f"old-{i}", "platform": "ios"})
    before = await fetch(http, user.id)
    writes = thirty_writes(before["devices"])
    assert len(writes) == 30
    # What was seen under each version: whole documents, or parts of them.
    seen: list[tuple[int, dict[str, Any]]] = []

    def see(document: dict[str, Any]) -> int:
        seen.append((document["version"], essence(document)))
        return int(document["version"])

    async def run(write: ParallelWrite) -> int:
        answer = await http.request(write.method, f"{user.path}{write.path}", json=write.body)
        assert answer.is_success, answer.text
        version, data = version_of(answer), answer.json()["data"]
        if write.path == "":
            assert see(data) == version
        elif write.path == "/preferences":
            parts = {"timezone": data["timezone"], "categories": set(data["categories"])}
            seen.append((version, parts))
        assert see(await fetch(http, user.id)) >= version, "one's own write is seen"
        return version

    async def from_anywhere() -> None:
        see(await fetch(http, user.id))

    async def from_postgres() -> None:
        see((await http.get(user.path, headers=ANY_VERSION)).json()["data"])

    async def in_a_batch() -> None:
        answer = await http.post("/api/v1/users/batch", json={"ids": [user.id]})
        see(answer.json()["data"]["users"][0])

    async def preferences() -> None:
        answer = await http.get(f"{user.path}/preferences")
        seen.append((version_of(answer), {"timezone": answer.json()["data"]["timezone"]}))

    async def devices() -> None:
        answer = await http.get(f"{user.path}/devices")
        active = [device["token"] for device in answer.json()["data"] if device["active"]]
        seen.append((version_of(answer), {"tokens": active}))

    writing = asyncio.gather(*map(run, writes))

    async def watch(read: Callable[[], Awaitable[None]]) -> int:
        times = 0
        while not writing.done():
            await read()
            times += 1
        return times

    reads = (from_anywhere, from_postgres, in_a_batch, preferences, devices)
    assert all(await asyncio.gather(*map(watch, reads))), "reads went on beside the writes"
    versions = await writing
    last = before["version"] + 30
    assert sorted(versions) == list(range(before["version"] + 1, last + 1))
    assert see(await fetch(http, user.id)) == last

    in_order = sorted(zip(versions, writes, strict=True), key=lambda written: written[0])
    committed = {before["version"]: essence(before)}
    for version, write in in_order:
        earlier = committed[version - 1]
        committed[version] = {**earlier, write.part: write.change(earlier[write.part])}
    for version, parts in seen:
        assert parts == {part: committed[version][part] for part in parts}, version
    logged = await changes_of(database_url, user.id)
    assert logged[before["version"] :] == [(version, write.kind) for version, write in in_order]
    assert await user.kind() == f"version {last}"


async def test_what_was_written_is_read_without_sql(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    user = await someone(http, stored)
    assert await user.kind() == "version 1"
    await http.patch(f"{user.path}/preferences", json={"push": False})
    await http.post(f"{user.path}/devices", json={"token": "cached", "platform": "ios"})
    assert await user.kind() == "version 3"
    with counted() as statements:
        document = await fetch(http, user.id)
        await http.get(f"{user.path}/preferences")
        await http.head(user.path)
        await http.post("/api/v1/users/batch", json={"ids": [user.id]})
    assert statements == []
    fresh = await http.get(user.path, headers=ANY_VERSION)
    assert fresh.json()["data"] == document


async def test_a_miss_is_one_statement_and_fills_the_cache(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    user = await someone(http, stored)
    await user.evict()
    with counted() as statements:
        assert await fetch(http, user.id) == user.document
        assert len(statements) == 1
        assert await user.kind() == "version 1"
        assert await fetch(http, user.id) == user.document
    assert len(statements) == 1


async def test_the_plan_of_a_miss_is_made_once(database_url: str, settings: Settings) -> None:
    """Postgres makes five to learn what one costs, whatever happens after."""
    async with connected(database_url) as sql:
        await insert_users(sql, 1000)
        await sql.execute("ANALYZE users, preferences, devices")
        for asked in (1, 2, 500, 3, 1, 1, 7, 1, 1):
            await DocumentShape(settings).read_by_id(sql, [str(uuid4()) for _ in range(asked)])
        plans = await sql.fetchrow(
            "SELECT custom_plans, generic_plans FROM pg_prepared_statements"
            " WHERE statement LIKE 'SELECT users.id%JOIN preferences%'"
        )
    assert (plans["custom_plans"], plans["generic_plans"]) == (5, 4)


async def test_those_who_miss_a_document_at_once_share_one_statement(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    user = await someone(http, stored)
    await user.evict()
    with counted() as statements:
        documents = await asyncio.gather(*(fetch(http, user.id) for _ in range(20)))
    assert len(statements) == 1
    assert documents == [user.document] * 20


async def test_who_leaves_does_not_take_the_shared_read_along(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    user = await someone(http, stored)
    await user.evict()
    with counted() as statements, held_after("FROM users") as held:
        leaver = asyncio.create_task(fetch(http, user.id))
        await held.reached.wait()
        stayer = asyncio.create_task(http.get(user.path))
        await eventually(lambda: _is(user, "lease"))
        leaver.cancel()
        await asyncio.wait([leaver])
        assert leaver.cancelled()
        held.let_go()
        assert (await stayer).json()["data"] == user.document
    assert await user.kind() == "version 1"
    assert len(statements) <= 2


async def _is(user: Someone, kind: str) -> bool:
    return await user.kind() == kind


async def test_a_batch_reads_all_it_misses_in_one_statement(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    users = [await someone(http, stored) for _ in range(4)]
    for user in users[:3]:
        await user.evict()
    body = {"ids": [user.id for user in users]}
    for expected in (1, 0):
        with counted() as statements:
            answer = await http.post("/api/v1/users/batch", json=body)
        assert answer.json()["data"]["users"] == [user.document for user in users]
        assert len(statements) == expected
        # What was missed is filled while the answer is on its way.
        async with asyncio.timeout(5):
            while {await user.kind() for user in users} != {"version 1"}:
                pass


async def test_while_a_write_is_announced_nobody_caches_and_afterwards_it_is_published(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    user = await someone(http, stored)
    with held_at_commit() as held:
        writing = asyncio.create_task(http.patch(user.path, json={"name": "Announced"}))
        await held.reached.wait()
        assert await user.kind() == "marker"
        with counted() as statements:
            for _ in range(2):
                assert await fetch(http, user.id) == user.document
            batch = await http.post("/api/v1/users/batch", json={"ids": [user.id]})
            assert batch.json()["data"]["users"] == [user.document]
        assert len(statements) == 3
        assert await user.kind() == "marker"
        held.let_go()
        written = (await writing).json()["data"]
    assert await user.kind() == "version 2"
    with counted() as statements:
        assert await fetch(http, user.id) == written
    assert statements == []


async def test_a_reader_whose_lease_is_gone_fills_nothing(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    user = await someone(http, stored)
    await user.evict()
    with held_after("FROM users") as held:
        reading = asyncio.create_task(fetch(http, user.id))
        await held.reached.wait()
        assert await user.kind() == "lease"
        await user.evict()
        held.let_go()
        assert await reading == user.document
    assert await user.kind() == "nothing"


async def test_a_read_after_a_write_never_joins_a_read_from_before(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    user = await someone(http, stored)
    await user.evict()
    with held_after("FROM users") as held:
        early = asyncio.create_task(fetch(http, user.id))
        await held.reached.wait()
        written = (await http.patch(user.path, json={"name": "Later"})).json()["data"]
        await user.evict()
        assert await asyncio.wait_for(fetch(http, user.id), 5) == written
        held.let_go()
        assert (await early)["version"] == 1
    assert await user.kind() == "version 2"
    assert await fetch(http, user.id) == written


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        pytest.param({"If-Match": '"0.0.0"'}, {"name": "Refused"}, 412, id="condition"),
        pytest.param({}, {"email": "rolled.back@example.com"}, 409, id="taken"),
    ],
)
async def test_a_write_that_is_rolled_back_leaves_no_trace_in_the_cache(
    http: httpx.AsyncClient,
    stored: redis.asyncio.Redis,
    headers: dict[str, str],
    body: dict[str, str],
    status: int,
) -> None:
    if status == 409:
        await register(http, password=None, email=body["email"])
    user = await someone(http, stored)
    assert (await http.patch(user.path, json=body, headers=headers)).status_code == status
    assert await user.kind() == "nothing"
    assert await fetch(http, user.id) == user.document
    assert await user.kind() == "version 1"


async def test_a_registration_that_is_refused_leaves_no_trace_in_the_cache(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    user = await someone(http, stored)
    before = await stored.dbsize()
    body = {"name": "Late", "email": user.document["email"]}
    assert (await http.post("/api/v1/users/", json=body)).status_code == 409
    assert await stored.dbsize() == before


async def test_a_write_that_changes_nothing_publishes_what_is_there(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    user = await someone(http, stored)
    await http.patch(user.path, json={"name": user.document["name"]})
    assert await user.kind() == "version 1"


async def test_who_goes_away_at_the_commit_has_written_and_published(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    user = await someone(http, stored)
    with held_at_commit() as held:
        writing = asyncio.create_task(http.patch(user.path, json={"name": "Cancelled"}))
        await held.reached.wait()
        writing.cancel()
        await asyncio.wait([writing])
        assert writing.cancelled()
        assert await user.kind() == "marker"
        held.let_go()
        await eventually(lambda: _is(user, "version 2"))
    with counted() as statements:
        document = await fetch(http, user.id)
    assert (document["name"], statements) == ("Cancelled", [])


async def test_who_goes_away_before_the_commit_has_written_nothing(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis, database_url: str
) -> None:
    user = await someone(http, stored)
    with held_after("INSERT INTO changes") as held:
        writing = asyncio.create_task(http.patch(user.path, json={"name": "Cancelled"}))
        await held.reached.wait()
        writing.cancel()
        await asyncio.wait([writing])
        assert writing.cancelled()
        await eventually(lambda: _is(user, "nothing"))
    assert await fetch(http, user.id) == user.document
    assert await changes_of(database_url, user.id) == [(1, "user.created")]
    assert (await http.patch(user.path, json={"name": "Again"})).status_code == 200


async def test_an_email_that_becomes_free_during_a_registration_is_no_crash(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    owner = await someone(http, stored)
    body = {"name": "Heir", "email": owner.document["email"]}
    with held_after("INSERT INTO users") as held:
        registering = asyncio.create_task(http.post("/api/v1/users/", json=body))
        await held.reached.wait()
        given_up = await http.patch(owner.path, json={"email": f"{uuid4().hex}@example.com"})
        assert given_up.status_code == 200
        held.let_go()
        answer = await registering
    if answer.status_code != 201:
        assert_failed(answer, 409, "email_taken", "email")


async def test_a_minimal_version_passes_over_an_old_copy(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    user = await someone(http, stored)
    key = await user.key()
    assert key is not None
    old: Any = await stored.get(key)
    new = (await http.patch(user.path, json={"name": "Newer"})).json()["data"]
    await stored.set(key, old)

    async def got(rest: str = "", **headers: str) -> httpx.Response:
        return await http.get(f"{user.path}{rest}", headers=headers)

    assert (await got()).json()["data"] == user.document, "the planted copy is believed"
    passed_over = await got(**{"X-Min-Version": "2"})
    assert passed_over.json()["data"] == new
    assert version_of(passed_over) == 2
    assert version_of(await got("/preferences", **{"X-Min-Version": "2"})) == 2
    assert (await got(**{"X-Min-Version": "1"})).json()["data"] == user.document
    assert (await got(**{"X-Min-Version": "3"})).json()["data"] == new, "the newest there is"
    not_held = await got(**{"X-Min-Version": "2", "If-None-Match": (await got()).headers["etag"]})
    assert not_held.status_code == 200
    for wrong in ("two", "-1", "1.5", ""):
        assert_failed(
            await got(**{"X-Min-Version": wrong}), 422, "validation_failed", "X-Min-Version"
        )


async def test_nobodys_id_is_asked_of_postgres_once_and_not_kept_in_redis(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    nobody = str(uuid4())
    with counted() as statements:
        answers = await asyncio.gather(*(http.get(f"/api/v1/users/{nobody}") for _ in range(10)))
        answers += [await http.get(f"/api/v1/users/{nobody}/preferences") for _ in range(3)]
    assert {answer.status_code for answer in answers} == {404}
    assert len(statements) == 1
    for key in await stored.keys(f"*{nobody}*"):
        value: Any = await stored.get(key)
        assert value is None or value.startswith(b"L"), "a lease, which expires by itself"
        assert await stored.pttl(key) <= LEASE_TTL_MS


async def test_who_was_erased_is_not_in_the_cache(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    user = await someone(http, stored)
    with held_at_commit() as held:
        erasing = asyncio.create_task(http.delete(user.path))
        await held.reached.wait()
        assert await fetch(http, user.id) == user.document
        held.let_go()
        assert (await erasing).status_code == 200
    assert await user.kind() == "nothing"
    assert (await http.get(user.path)).status_code == 404


async def test_a_move_publishes_both_documents(
    http: httpx.AsyncClient, stored: redis.asyncio.Redis
) -> None:
    former, heir = await someone(http, stored), await someone(http, stored)
    device = {"token": "published", "platform": "ios"}
    await http.post(f"{former.path}/devices", json=device)
    await http.post(f"{heir.path}/devices", json=device)
    assert (await former.kind(), await heir.kind()) == ("version 3", "version 2")
    with counted() as statements:
        assert (await fetch(http, former.id))["devices"] == []
        assert len((await fetch(http, heir.id))["devices"]) == 1
    assert statements == []


@dataclass
class State:
    """The shared state, as far as the cache looks at it."""

    epoch: str
    quiet: bool = False
    is_outdated: bool = False

    def generation(self, _bucket: int) -> int:
        return 1

    def is_quiet(self, _bucket: int) -> bool:
        return self.quiet

    async def catch_up(self) -> None:
        """Nothing is new."""

    @property
    def namespaces(self) -> Sequence[str]:
        return SharedState(self.epoch, (Generation(1),) * BUCKETS).namespaces


@pytest.fixture
async def cache(settings: Settings) -> AsyncIterator[DocumentCache]:
    """The cache by itself, at keys of its own."""

    async def recognise(_server: str, _buckets: Collection[int]) -> None:
        """Whatever answers is the right one."""

    link = RedisLink(settings, recognise)
    await link.start(5)
    state = cast("StateWatcher", State(uuid4().hex))
    yield DocumentCache(link, state, document_format="format", ttl=300, metrics=Metrics())
    await link.close()


def said(cache: DocumentCache, token: str) -> Announcement:
    """What a write has announced with its token."""
    return Announcement(token, {U: cache._key(U)}, {bucket_of(U): Said(1)})


async def announce(cache: DocumentCache, token: str) -> None:
    announcement = Announcement(token)
    await cache.announce([U], announcement)
    assert announcement == said(cache, token)


async def publish(cache: DocumentCache, document: StoredDocument | None, token: str) -> None:
    outcomes = {U: Outcome(document.version, document)} if document else {}
    assert await cache.publish(said(cache, token), outcomes) == set()


def at(version: int) -> StoredDocument:
    return StoredDocument(version=version, body=b'{"version":%d}' % version)


async def is_announced(cache: DocumentCache) -> bool:
    """Whether there is no document, and nobody is let to fill one."""
    found = await cache.get(U)
    return not isinstance(found, StoredDocument | Lease) and not await cache.lease({U: MISS})


async def test_the_last_writer_publishes(cache: DocumentCache) -> None:
    await announce(cache, "one")
    await announce(cache, "other")
    await publish(cache, at(2), "one")
    assert await is_announced(cache)
    await publish(cache, at(3), "other")
    assert await cache.get(U) == at(3)


@pytest.mark.parametrize(
    "last", [pytest.param(at(2), id="older"), pytest.param(None, id="rolled-back")]
)
async def test_a_last_writer_who_knows_of_a_higher_version_stores_nothing(
    cache: DocumentCache, last: StoredDocument | None
) -> None:
    await announce(cache, "one")
    await announce(cache, "other")
    await publish(cache, at(3), "one")
    await publish(cache, last, "other")
    assert await cache.get(U) is MISS


async def test_a_writer_who_rolls_back_leaves_the_publishing_to_the_other(
    cache: DocumentCache,
) -> None:
    await announce(cache, "one")
    await announce(cache, "other")
    await publish(cache, None, "one")
    assert await is_announced(cache)
    await publish(cache, at(2), "other")
    assert await cache.get(U) == at(2)


async def test_an_update_that_publishes_after_a_deletion_brings_nobody_back(
    cache: DocumentCache,
) -> None:
    await announce(cache, "update")
    await announce(cache, "deletion")
    await cache.publish(said(cache, "deletion"), {U: Outcome(3, None)})
    await publish(cache, at(2), "update")
    assert await cache.get(U) is MISS


async def test_a_deletion_whose_announcement_was_evicted_leaves_no_document(
    cache: DocumentCache,
) -> None:
    leases = await cache.lease({U: MISS})
    await cache.fill({U: at(2)}, leases)
    await cache.publish(said(cache, "deletion"), {U: Outcome(3, None)})
    assert await cache.get(U) is MISS


async def test_a_write_that_began_in_a_quiet_time_stores_nothing(cache: DocumentCache) -> None:
    """In a quiet time others commit without an announcement, since nothing is cached."""
    announcement = Announcement("quiet", buckets={bucket_of(U): Said(1, quiet=True)})
    await cache.announce([U], announcement)
    await cache.publish(announcement, {U: Outcome(2, at(2))})
    assert await cache.get(U) is MISS


async def test_an_announcement_takes_document_and_lease_away(cache: DocumentCache) -> None:
    leases = await cache.lease({U: MISS})
    await announce(cache, "writer")
    await cache.fill({U: at(1)}, leases)
    assert await is_announced(cache)
    await publish(cache, at(2), "writer")
    await announce(cache, "next")
    assert await is_announced(cache)
    await publish(cache, None, "next")
    assert await cache.get(U) is MISS


async def test_a_writer_whose_announcement_was_evicted_stores_nothing(
    cache: DocumentCache, stored: redis.asyncio.Redis
) -> None:
    async def evict() -> None:
        (key,) = await stored.keys(f"*{cache._state.epoch}*")
        await stored.delete(key)

    await announce(cache, "writer")
    await evict()
    await publish(cache, at(2), "writer")
    assert await cache.get(U) is MISS

    await announce(cache, "writer")
    await evict()
    leases = await cache.lease({U: MISS})
    await cache.fill({U: at(2)}, leases)
    await publish(cache, at(3), "writer")
    assert await cache.get_many([U]) == [MISS], "an older document is removed"

    leases = await cache.lease({U: MISS})
    await publish(cache, at(3), "writer")
    await cache.fill({U: at(2)}, leases)
    assert await cache.get_many([U]) == [MISS], "and so is the lease of who may have read it"

    leases = await cache.lease({U: MISS})
    await cache.fill({U: at(4)}, leases)
    await publish(cache, at(3), "writer")
    assert await cache.get(U) == at(4), "a newer one stays"


async def test_a_lease_is_one_readers(cache: DocumentCache, stored: redis.asyncio.Redis) -> None:
    stalled = await cache.lease({U: MISS})
    assert set(stalled) == {U}
    assert await cache.lease({U: MISS}) == {}
    assert await cache.get(U) is BYPASS
    (key,) = await stored.keys(f"*{cache._state.epoch}*")
    assert 0 < await stored.pttl(key) <= LEASE_TTL_MS
    await stored.delete(key)
    prompt = await cache.lease({U: MISS})
    await cache.fill({U: at(5)}, stalled)
    assert await cache.get(U) is BYPASS
    await cache.fill({U: at(6)}, prompt)
    assert await cache.get(U) == at(6)
    await cache.fill({U: at(5)}, stalled)
    assert await cache.get(U) == at(6)
    assert 270_000 <= await stored.pttl(key) <= 300_000


async def test_a_document_of_another_format_is_anybodys_to_replace(
    cache: DocumentCache, stored: redis.asyncio.Redis
) -> None:
    """As after a release, or a setting that shapes documents: not after five minutes, but now."""
    await cache.fill({U: at(1)}, await cache.lease({U: MISS}))
    (key,) = await stored.keys(f"*{cache._state.epoch}*")
    await stored.set(key, b"D1 other\n{}")
    assert await cache.get(U) is FOREIGN
    assert await cache.get_many([U]) == [FOREIGN]
    leases = await cache.lease({U: FOREIGN})
    assert await cache.lease({U: FOREIGN}) == {}, "it is leased already"
    await cache.fill({U: at(2)}, leases)
    assert await cache.get(U) == at(2)
    assert await cache.lease({U: FOREIGN}) == {}, "another reader has replaced it"
    await announce(cache, "writer")
    assert await cache.lease({U: FOREIGN}) == {}, "a writer is at it"


async def test_the_announcement_of_a_crashed_writer_expires_for_the_others(
    cache: DocumentCache, stored: redis.asyncio.Redis
) -> None:
    await announce(cache, "crashed")
    (key,) = await stored.keys(f"*{cache._state.epoch}*")
    assert 0 < await stored.pttl(key) <= MARKER_TTL_MS
    await stored.hset(key, "crashed", "1")  # its time is over
    await announce(cache, "writer")
    await publish(cache, at(2), "writer")
    assert await cache.get(U) == at(2)


async def test_gets_of_one_turn_share_a_round_trip(
    cache: DocumentCache, stored: redis.asyncio.Redis
) -> None:
    ids = [str(uuid4()) for _ in range(50)]
    leases = await cache.lease(dict.fromkeys(ids[:25], MISS))
    await cache.fill({user_id: at(1) for user_id in leases}, leases)
    before = await stored.info("commandstats")
    found = await cache.get_many(ids)
    after = await stored.info("commandstats")
    assert found == [at(1)] * 25 + [MISS] * 25
    calls = [int(stats.get("cmdstat_mget", {"calls": 0})["calls"]) for stats in (before, after)]
    assert calls[1] - calls[0] == 1


async def cold(cache: DocumentCache) -> None:
    """Let a turn find nothing."""
    await cache.get(str(uuid4()))


async def test_where_most_is_missing_who_looks_leases(
    cache: DocumentCache, stored: redis.asyncio.Redis
) -> None:
    """And may fill what was leased so; what is there, or leased, or announced, is left alone."""
    kept, foreign, leased, announced, free = (str(uuid4()) for _ in range(5))
    await cache.fill({kept: at(1)}, await cache.lease({kept: MISS}))
    await stored.set(cache._key(foreign), b"D1 other\n{}")
    assert await cache.lease({leased: MISS})
    await cache.announce([announced], Announcement("writer"))
    await cold(cache)
    *others, lease = await asyncio.gather(*map(cache.get, (kept, foreign, leased, announced, free)))
    assert others == [at(1), FOREIGN, BYPASS, BYPASS]
    assert isinstance(lease, Lease)
    assert 0 < await stored.pttl(cache._key(free)) <= LEASE_TTL_MS
    leases = await cache.lease({free: lease, foreign: FOREIGN, leased: BYPASS})
    assert leases.keys() == {free, foreign}
    await cache.fill({free: at(2), foreign: at(3)}, leases)
    assert await cache.get_many([free, foreign, leased]) == [at(2), at(3), BYPASS]


async def test_what_is_left_behind_as_somebody_looks_is_not_leased_anew(
    cache: DocumentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the new generation nothing may be filled yet, whoever is about to ask for a lease."""
    await cold(cache)
    looking = cache.get(U)

    def leave_behind() -> None:
        monkeypatch.setattr(cache._state, "epoch", uuid4().hex)
        monkeypatch.setattr(cache._state, "quiet", True)

    asyncio.get_running_loop().call_soon(leave_behind)
    await cache.fill({U: at(1)}, await cache.lease({U: await looking}))  # type: ignore[dict-item]
    assert await cache.get_many([U]) == [MISS]


async def test_a_lease_of_who_looked_is_wiped_by_a_writer(cache: DocumentCache) -> None:
    await cold(cache)
    lease = await cache.get(U)
    await announce(cache, "writer")
    await cache.fill({U: at(1)}, await cache.lease({U: lease}))  # type: ignore[dict-item]
    assert await is_announced(cache)
    await publish(cache, at(2), "writer")
    await cache.fill({U: at(1)}, await cache.lease({U: lease}))  # type: ignore[dict-item]
    assert await cache.get(U) == at(2)


async def test_where_most_is_there_who_looks_leases_nothing(cache: DocumentCache) -> None:
    """It takes Redis longer to look so."""
    ids = [str(uuid4()) for _ in range(3)]
    leases = await cache.lease(dict.fromkeys(ids, MISS))
    await cache.fill(dict.fromkeys(ids, at(1)), leases)
    await cold(cache)
    assert isinstance(await cache.get(str(uuid4())), Lease)
    assert await asyncio.gather(*map(cache.get, ids)) == [at(1)] * 3
    assert await cache.get(str(uuid4())) is MISS


@pytest.mark.parametrize("reason", ["quiet", "outdated", "cluster", "crowd"])
async def test_who_may_not_lease_looks_only(
    reason: str, cache: DocumentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cold(cache)
    if reason == "quiet":
        monkeypatch.setattr(cache._state, "quiet", True)
    elif reason == "outdated":
        monkeypatch.setattr(cache._state, "is_outdated", True)
    elif reason == "cluster":
        monkeypatch.setattr(RedisLink, "is_one", False)
    number = SCRIPT_LIMIT + 1 if reason == "crowd" else 2
    assert set(await asyncio.gather(*(cache.get(str(uuid4())) for _ in range(number)))) == {MISS}


async def test_a_redis_that_is_away_gives_no_lease(
    cache: DocumentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cold(cache)

    async def run(commands: Sequence[Command]) -> list[Any]:
        return [UNREACHABLE] * len(commands)

    monkeypatch.setattr(cache._link, "run", run)
    found = await asyncio.gather(cache.get(U), cache.get(str(uuid4())))
    assert set(found) == {BYPASS}


@pytest.mark.parametrize("is_one", [True, False])
async def test_many_are_filled_by_few_scripts_and_each_under_its_own_lease(
    is_one: bool, cache: DocumentCache, stored: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cluster a script has one key."""
    monkeypatch.setattr(RedisLink, "is_one", is_one)
    ids = [str(uuid4()) for _ in range(2 * SCRIPT_LIMIT + 1)]
    leases = await cache.lease(dict.fromkeys(ids, MISS))
    for lost in ids[::3]:
        leases[lost] = "L0"
    before = await stored.info("commandstats")
    await cache.fill({user_id: at(n) for n, user_id in enumerate(ids)}, leases)
    after = await stored.info("commandstats")
    assert await cache.get_many(ids) == [BYPASS if n % 3 == 0 else at(n) for n in range(len(ids))]
    calls = [int(stats.get("cmdstat_eval", {"calls": 0})["calls"]) for stats in (before, after)]
    assert calls[1] - calls[0] == (3 if is_one else len(ids))


async def test_who_waits_for_the_cache_is_told_of_a_fault_of_ours(
    cache: DocumentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fault(Exception):
        pass

    async def fail_later(_keys: Sequence[str]) -> list[Any]:
        raise Fault

    def fail(_keys: Sequence[str]) -> list[Any]:
        raise Fault

    for strings in (fail, fail_later):
        monkeypatch.setattr(cache._link, "strings", strings)
        found = await asyncio.gather(cache.get(U), cache.get(U), return_exceptions=True)
        assert [type(error) for error in found] == [Fault] * 2


async def test_who_may_not_be_leased_is_not_asked_for(
    cache: DocumentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(commands: Sequence[object]) -> list[object]:
        raise AssertionError(commands)

    monkeypatch.setattr(cache._link, "run", run)
    assert await cache.lease({U: BYPASS}) == {}
    monkeypatch.setattr(cache._state, "quiet", True)
    assert await cache.lease({U: MISS}) == {}
