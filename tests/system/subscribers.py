"""Owns those who change users by SQL and those who follow the change feed, and their checker."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import asyncpg
import httpx
import msgspec

STREAM = "/api/v1/changes/stream"


def stream_scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    """Return what an app in this process is asked for its stream with, by ASGI."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": STREAM,
        "raw_path": STREAM.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
        "state": {},
        "extensions": {},
    }


_INSERT_USERS = """
WITH made AS (
    INSERT INTO users (id, name, email, email_key, version, created_at, updated_at)
    SELECT id, 'Name', id || '@example.com', id || '@example.com', 0, now(), now()
    FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, $1)) AS ids
    RETURNING id
)
INSERT INTO preferences (user_id, email, push) SELECT id, true, true FROM made
RETURNING CAST(user_id AS text)
"""
# As the server does it: the lock, and in a later statement the version and the change.
_LOCK = "SELECT FROM users WHERE id = ANY($1::uuid[]) ORDER BY id FOR NO KEY UPDATE"
_CHANGE = """
WITH raised AS (
    UPDATE users SET version = version + 1 WHERE id = ANY($1::uuid[]) RETURNING id, version
)
INSERT INTO changes (user_id, version, kind, at)
SELECT id, version, 'user.updated', clock_timestamp() FROM raised
RETURNING CAST(user_id AS text), version
"""
_CHANGE_OFTEN = """
WITH raised AS (
    UPDATE users SET version = version + $2 WHERE id = $1::uuid RETURNING id, version
)
INSERT INTO changes (user_id, version, kind, at)
SELECT id, version - $2 + n, 'user.updated', clock_timestamp()
FROM raised, generate_series(1, $2) AS n
"""


Version = tuple[str, int]
"""A user's id and one of its versions: what a change is known by."""


@asynccontextmanager
async def connected(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """Connect to a database of the tests, as asyncpg does."""
    connection = await asyncpg.connect(database_url.replace("+asyncpg", ""))
    try:
        yield connection
    finally:
        await connection.close()


async def insert_users(connection: asyncpg.Connection, count: int) -> list[str]:
    """Insert users of version 0, without a change, and return their ids."""
    return [row[0] for row in await connection.fetch(_INSERT_USERS, count)]


async def change(
    connection: asyncpg.Connection, *user_ids: str, held: float = 0.0, late: float = 0.0
) -> list[Version]:
    """Change users in one transaction, and return who has which version now.

    Args:
        connection: nobody else's meanwhile.
        user_ids: who is changed; nobody twice.
        held: seconds from the change to the commit.
        late: seconds from the beginning, with a transaction id, to the lock.
    """
    async with connection.transaction():
        if late:
            await connection.fetchval("SELECT pg_current_xact_id()")
            await asyncio.sleep(late)
        await connection.execute(_LOCK, user_ids)
        changed = await connection.fetch(_CHANGE, user_ids)
        if held:
            await asyncio.sleep(held)
    return [(row[0], row[1]) for row in changed]


async def change_often(connection: asyncpg.Connection, user_id: str, times: int) -> None:
    """Change a user many times over in one statement."""
    await connection.execute(_CHANGE_OFTEN, user_id, times)


class Event(NamedTuple):
    """One Server-Sent Event, and when it came (`time.time`, as Postgres on this machine has it)."""

    name: str
    id: str | None
    data: Any
    at: float


class EventParser:
    """Makes events of bytes, as the HTML standard has it (section 9.2.6)."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that `chunk` completes."""
        *blocks, self._rest = (self._rest + chunk).split(b"\n\n")
        now = time.time()
        return [event for block in blocks if (event := self._parse(block, now)) is not None]

    def _parse(self, block: bytes, now: float) -> Event | None:
        fields = dict(line.split(b": ", 1) for line in block.split(b"\n"))
        if b"data" not in fields:
            return None
        identity = fields[b"id"].decode() if b"id" in fields else None
        return Event(fields[b"event"].decode(), identity, msgspec.json.decode(fields[b"data"]), now)


async def follow(
    http: httpx.AsyncClient, last_event_id: str | None = None
) -> AsyncGenerator[Event, None]:
    """Follow the stream of a server until it ends."""
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    parser = EventParser()
    async with http.stream("GET", STREAM, headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for chunk in answer.aiter_raw():
            for event in parser.feed(chunk):
                yield event


@dataclass
class Received:
    """What one reader got of the feed, in the order in which it came."""

    changes: list[Version] = field(default_factory=list)
    first_at: dict[Version, float] = field(default_factory=dict)
    """When each first came (`time.time`)."""
    cursor: str | None = None
    resets: int = 0

    def note(self, one: Mapping[str, Any], at: float) -> None:
        """Take one change."""
        version = (one["user_id"], one["version"])
        self.changes.append(version)
        self.first_at.setdefault(version, at)
        self.cursor = one["position"]


def faults(received: Iterable[Version], made: Iterable[Version]) -> list[str]:
    """Return what is wrong with what one reader received, a line for each fault.

    A change may come twice, and never not at all; a version that is new comes right after the one
    before it of its user.
    """
    found: list[str] = []
    newest: dict[str, int] = {}
    seen: set[Version] = set()
    for user_id, version in received:
        before = newest.get(user_id, 0)
        if (user_id, version) not in seen and version != before + 1:
            found.append(f"{user_id}: version {version} came after {before}")
        newest[user_id] = max(version, before)
        seen.add((user_id, version))
    found += [f"{user_id}: version {version} never came" for user_id, version in set(made) - seen]
    return found


async def follow_restlessly(urls: Sequence[str], received: Received, chance: random.Random) -> None:
    """Follow the feed, disconnect at random, and go on from the last event at any server."""
    while True:
        leave_at = time.monotonic() + chance.uniform(0.1, 3.0)
        async with (
            httpx.AsyncClient(base_url=chance.choice(urls), timeout=30) as http,
            aclosing(follow(http, received.cursor)) as events,
        ):
            async for event in events:
                if event.name == "change":
                    received.note(event.data, event.at)
                elif event.name == "ready":
                    received.cursor = event.id
                elif event.name == "reset":
                    received.resets += 1
                if time.monotonic() > leave_at:
                    break


async def poll(url: str, received: Received) -> None:
    """Ask for changes again and again, each time from where the last answer ended."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        while True:
            query = {"limit": "1000"} | ({"after": received.cursor} if received.cursor else {})
            answer = await http.get("/api/v1/changes", params=query)
            page = answer.raise_for_status().json()["data"]
            for one in page["items"]:
                received.note(one, time.time())
            received.cursor = page["next"]
            if not page["items"]:
                await asyncio.sleep(0.1)
