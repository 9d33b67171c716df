"""Owns the ceilings: bare ASGI applications that are run exactly as the service is run.

    python -m benchmarks.ceilings C0    # answers ready bytes
    python -m benchmarks.ceilings C1    # ready bytes out of Redis, by one GET of redis-py each time
    python -m benchmarks.ceilings C2    # a miss with nothing around it: see `Misses`
    python -m benchmarks.ceilings C6    # a change of preferences with nothing around it: `Changes`

Nothing is parsed but the id in the path, and no header is sent that a client could do without. C2
and C6 take the steps that the service takes, by its own statements, scripts and wire; of what comes
back nothing is made.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import uvloop
from redis.asyncio import ConnectionPool, Redis
from user_service_schemas import ChangeKind, Choices, preference_changes
from user_service_server.preferences import repository
from user_service_server.serving import Application, serve
from user_service_server.settings import Settings, load_settings
from user_service_server.storage import cache, document
from user_service_server.storage.buckets import bucket_of
from user_service_server.storage.recorded_answers import recorded
from user_service_server.storage.together import Together
from user_service_server.storage.wire import UNREACHABLE, Command, Wire

from benchmarks import documents

_TTL_MS = 300_000


async def _send(send: Callable[[dict[str, Any]], Awaitable[None]], body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class ReadyBytes:
    """C0: the same bytes each time."""

    def __init__(self) -> None:
        self._body = documents.success(documents.encoded(0))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002
        await _send(send, self._body)

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Nothing is begun."""
        yield


class OneGet:
    """C1: the bytes that Redis has under the id."""

    def __init__(self, redis_url: str) -> None:
        self._redis = Redis.from_url(redis_url)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002
        body: Any = await self._redis.get(scope["path"].rpartition("/")[2])
        await _send(send, body or b"")

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Put the documents there."""
        ready = {
            documents.user_id(number): documents.success(documents.encoded(number))
            for number in range(documents.WARM)
        }
        async with self._redis:
            await self._redis.mset(ready)
            yield


class _OnEngines:
    """What a ceiling has that asks both: one wire to Redis, and connections to PostgreSQL.

    They lie in a queue: asyncpg's pool asks PostgreSQL once more for each that is given back, which
    the service does not.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ready = documents.success(documents.encoded(0))
        self._idle: asyncio.LifoQueue[asyncpg.Connection] = asyncio.LifoQueue()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].startswith("/api/"):
            await receive()
            await self.answer(scope["path"].split("/")[4])
        await _send(send, self._ready)

    async def answer(self, user_id: str) -> None:
        """Do for a user what is measured; whoever asks is answered with ready bytes."""
        raise NotImplementedError

    async def ask_redis(self, *commands: Command) -> None:
        """Run commands. None of them is refused, or the ceiling would be of less than all."""
        for reply in await self._wire.call(commands):
            if reply is UNREACHABLE or isinstance(reply, Exception):
                raise RuntimeError(f"{commands[0][0]}: {reply}")

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """Give a connection to PostgreSQL."""
        connection = await self._idle.get()
        try:
            yield connection
        finally:
            self._idle.put_nowait(connection)

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Connect."""
        redis = ConnectionPool.from_url(self._settings.redis_url)
        connection = redis.connection_class(**redis.connection_kwargs)
        await connection.connect()  # type: ignore[no-untyped-call]
        self._wire = Wire(connection, timeout=1, lost=lambda _error: None)
        url = self._settings.database_url.replace("+asyncpg", "")
        for _ in range(self._settings.database_pool_size):
            self._idle.put_nowait(await asyncpg.connect(url, server_settings={"timezone": "UTC"}))
        async with self.connection() as one:
            rows = await one.fetch("SELECT bucket, generation FROM cache_generations")
        self._generations = dict(rows)
        yield
        self._wire.close()


class Misses(_OnEngines):
    """C2: all reads of a turn look in Redis, and lease, and ask PostgreSQL; stored behind."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._flights: set[asyncio.Task[None]] = set()

    async def answer(self, user_id: str) -> None:
        """Read somebody, with all who are read in the same turn."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._take_off)
        await self._waiting.setdefault(user_id, loop.create_future())

    def _take_off(self) -> None:
        waiting, self._waiting = self._waiting, {}
        flight = asyncio.create_task(self._fly(waiting))
        self._flights.add(flight)
        flight.add_done_callback(self._flights.discard)

    async def _fly(self, waiting: dict[str, asyncio.Future[None]]) -> None:
        lease = f"L{secrets.token_hex(8)}"
        try:
            await self.ask_redis(
                ("EVAL", cache._LOOK, len(waiting), *waiting, lease, cache.LEASE_TTL_MS)
            )
            async with self.connection() as connection:
                rows = await connection.fetch(document._READ.text, list(waiting))
            assert len(rows) == len(waiting)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is for those who wait
            for future in waiting.values():
                future.set_exception(error)
            return
        for future in waiting.values():
            future.set_result(None)
        filled = (lease, self._ready, _TTL_MS) * len(waiting)
        await self.ask_redis(("EVAL", cache._FILL, len(waiting), *waiting, *filled))


class Changes(_OnEngines):
    """C6: read, announce, write and publish, always the same change; statements are shared."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        choices = Choices(email=True, push=True)
        self._effects = repository.say(choices, preference_changes(None, choices), None)
        self._together = Together(self.connection)

    async def answer(self, user_id: str) -> None:
        """Change somebody's preferences."""
        token, bucket = secrets.token_hex(8), bucket_of(user_id)
        asked = {"id": user_id, **recorded(None, None)}
        row = await self._together.fetch(repository.READ, asked)
        assert row
        version = row["version"] + 1
        await self._eval(cache._ANNOUNCE, user_id, token, cache.MARKER_TTL_MS)
        written = await self._together.fetch(
            self._effects.statement,
            {
                **asked,
                "version": version,
                "at": row["now"],
                "kind": ChangeKind.PREFERENCES_UPDATED.value,
                "actor": None,
                "bucket": bucket,
                "generation": self._generations[bucket],
                "names": "{}",
                **self._effects.said,
            },
        )
        assert written
        await self._eval(cache._PUBLISH, user_id, token, version, self._ready, _TTL_MS)

    async def _eval(self, script: str, key: str, *arguments: object) -> None:
        await self.ask_redis(("EVAL", script, 1, key, *arguments))


async def _run(name: str) -> None:
    settings = load_settings(os.environ, None)
    apps: dict[str, Callable[[], Application]] = {
        "C0": ReadyBytes,
        "C1": lambda: OneGet(settings.redis_url),
        "C2": lambda: Misses(settings),
        "C6": lambda: Changes(settings),
    }
    await serve(apps[name](), settings, draining=asyncio.Event())


if __name__ == "__main__":
    uvloop.run(_run(sys.argv[1]))
