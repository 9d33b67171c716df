"""The cache of encoded documents in Redis: announce, lease, fill, publish.

A write announces itself before it commits; while it is announced nobody caches; after the commit
the last writer publishes. Under a document's key lies one of

- a document: `D<version>\\n<encoded document>`,
- a lease of a reader that is about to fill it: `L<random>`,
- a marker of writers: a hash of their tokens with the time (ms) until which each counts, and `top`,
  the highest version published so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any, Final, TypeVar, cast

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from ..metrics import Metrics
from ..settings import Settings
from .document import StoredDocument

T = TypeVar("T")

MARKER_TTL_MS = 10_000
"""How long a marker lives: longer than a transaction may (`database.TRANSACTION_TIMEOUT`)."""
LEASE_TTL_MS = 3_000
PROBE_INTERVAL = 0.1
"""Seconds between two looks at a Redis that failed."""
MGET_LIMIT = 500

_log = structlog.get_logger()


class Absence(Enum):
    """Why there is no document."""

    MISS = "miss"
    """Nothing is there: who reads it from Postgres may fill it."""
    BYPASS = "bypass"
    """A writer or another reader is at it, or Redis cannot be reached: read, do not fill."""


MISS: Final = Absence.MISS
BYPASS: Final = Absence.BYPASS

# A reader's `SET NX` fails on a marker, and MGET answers nil for it, since it is a hash.
_ANNOUNCE = """
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then redis.call('DEL', KEYS[1]) end
local now = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
_FILL = """
if redis.call('TYPE', KEYS[1]).ok ~= 'string' or redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""
# ARGV: token, version ('' where nothing was committed or the user is gone), document, ttl (ms).
_PUBLISH = """
local kind = redis.call('TYPE', KEYS[1]).ok
local version = tonumber(ARGV[2])
if kind == 'string' then
  local held = redis.call('GET', KEYS[1])
  local cached = tonumber(string.match(held, '^D(%d+)'))
  if not cached or (version and cached < version) then redis.call('DEL', KEYS[1]) end
  return 'lost'
end
if kind == 'none' then return 'lost' end
local top = tonumber(redis.call('HGET', KEYS[1], 'top') or '0')
local mine = redis.call('HDEL', KEYS[1], ARGV[1])
if version and version > top then redis.call('HSET', KEYS[1], 'top', version) end
if mine == 0 then return 'lost' end
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
local fields = redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
  if fields[i] ~= 'top' and tonumber(fields[i + 1]) > ms then return 'noted' end
end
redis.call('DEL', KEYS[1])
if version and version >= top then
  redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
  return 'stored'
end
return 'cleared'
"""


class RedisLink:
    """The connection to Redis: every call bounded in time, and none made while it is down.

    After one failure the link is open; a probe in the background closes it again, so that no
    request waits for a Redis that is known not to answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._timeout = settings.redis_timeout_ms / 1000
        self.client = Redis.from_url(
            settings.redis_url,
            socket_timeout=self._timeout,
            socket_connect_timeout=self._timeout,
            # One attempt: what fails is answered from Postgres, not waited for.
            retry=Retry(NoBackoff(), 0),
            max_connections=64,
        )
        self.reachable = True
        self._probe: asyncio.Task[None] | None = None

    async def call(self, command: Callable[[Redis], Awaitable[T]]) -> T | None:
        """Run `command`; None when Redis cannot be reached or does not answer in time."""
        if not self.reachable:
            return None
        try:
            async with asyncio.timeout(self._timeout):
                return await command(self.client)
        except (RedisError, OSError, TimeoutError) as error:
            self._failed(error)
            return None

    async def start(self, patience: float) -> None:
        """Wait up to `patience` seconds for Redis, then go on without it."""
        await self.ping()
        if self._probe is not None:
            _log.warning("redis.waiting", up_to_seconds=patience)
            await asyncio.wait([self._probe], timeout=patience)
        if not self.reachable:
            _log.warning("redis.missing", note="serving from Postgres until it comes")

    async def ping(self) -> bool:
        """Whether Redis answers."""
        return bool(await self.call(lambda redis: redis.ping()))

    def _failed(self, error: Exception) -> None:
        if self._probe is None:
            self.reachable = False
            _log.warning("redis.unreachable", error=type(error).__qualname__)
            self._probe = asyncio.create_task(self._recover(), name="redis-probe")

    async def _recover(self) -> None:
        while True:
            await asyncio.sleep(PROBE_INTERVAL)
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(self._timeout):
                    await self.client.ping()
                self.reachable = True
                self._probe = None
                _log.warning("redis.reachable")
                return

    async def close(self) -> None:
        """Close the connections."""
        if self._probe is not None:
            self._probe.cancel()
        await self.client.aclose()


class DocumentCache:
    """Documents in Redis under `user-service:{epoch}:{format}:{id}`."""

    def __init__(
        self,
        link: RedisLink,
        *,
        document_format: str,
        ttl: int,
        epoch: Callable[[], str],
        metrics: Metrics,
    ) -> None:
        self._hits, self._misses, self._bypasses = (
            metrics.cache_reads.labels(result) for result in ("hit", "miss", "bypass")
        )
        self._link = link
        self._format = document_format
        self._ttl_ms = ttl * 1000
        self._epoch = epoch
        self._wanted: dict[str, list[asyncio.Future[StoredDocument | Absence]]] = {}
        self._flushes: set[asyncio.Task[None]] = set()

    def get(self, user_id: str) -> Awaitable[StoredDocument | Absence]:
        """Return the cached document, or why there is none.

        All gets of one turn of the event loop share a round trip: one call of redis-py costs more
        CPU than all of Litestar.
        """
        loop = asyncio.get_running_loop()
        if not self._wanted:
            loop.call_soon(self._flush)
        future: asyncio.Future[StoredDocument | Absence] = loop.create_future()
        self._wanted.setdefault(self._key(user_id), []).append(future)
        return future

    def _flush(self) -> None:
        wanted, self._wanted = self._wanted, {}
        task = asyncio.create_task(self._answer(wanted))
        self._flushes.add(task)
        task.add_done_callback(self._flushes.discard)

    async def _answer(
        self, wanted: Mapping[str, list[asyncio.Future[StoredDocument | Absence]]]
    ) -> None:
        keys = list(wanted)
        for start in range(0, len(keys), MGET_LIMIT):
            some = keys[start : start + MGET_LIMIT]
            values = await self._link.call(partial(_mget, some))
            for key, found in zip(some, _parse(values, len(some)), strict=True):
                self._count(found, len(wanted[key]))
                for future in wanted[key]:
                    if not future.done():
                        future.set_result(found)

    def _count(self, found: StoredDocument | Absence, times: int) -> None:
        if isinstance(found, StoredDocument):
            self._hits.inc(times)
        else:
            (self._misses if found is MISS else self._bypasses).inc(times)

    async def get_many(self, ids: Sequence[str]) -> list[StoredDocument | Absence]:
        """Return what is cached of `ids`, in their order."""
        return list(await asyncio.gather(*(self.get(user_id) for user_id in ids)))

    async def lease(self, ids: Iterable[str]) -> dict[str, str]:
        """Ask to fill `ids`; returns the leases that were got, by id."""
        leases = {user_id: f"L{secrets.token_hex(8)}" for user_id in ids}
        got = await self._pipelined(
            lambda pipe: [
                pipe.set(self._key(user_id), lease, nx=True, px=LEASE_TTL_MS)
                for user_id, lease in leases.items()
            ]
        )
        return {
            user_id: lease
            for (user_id, lease), placed in zip(leases.items(), got or (), strict=False)
            if placed
        }

    async def fill(
        self, documents: Mapping[str, StoredDocument], leases: Mapping[str, str]
    ) -> None:
        """Store what was read, where the reader's lease is still there."""
        await self._pipelined(
            lambda pipe: [
                pipe.eval(
                    *(_FILL, 1, self._key(user_id)),
                    *(leases[user_id], _encode(document), self._some_ttl()),
                )
                for user_id, document in documents.items()
            ]
        )

    async def announce(self, ids: Iterable[str], token: str) -> None:
        """Mark that a write under `token` is about to change `ids`."""
        await self._pipelined(
            lambda pipe: [
                pipe.eval(_ANNOUNCE, 1, self._key(user_id), token, MARKER_TTL_MS) for user_id in ids
            ]
        )

    async def publish(self, documents: Mapping[str, StoredDocument | None], token: str) -> None:
        """Take the announcement of `token` away, and store what it committed.

        None is a user that is gone, or a write that was rolled back: nothing is stored.
        """
        await self._pipelined(
            lambda pipe: [
                pipe.eval(
                    *(_PUBLISH, 1, self._key(user_id), token),
                    *((document.version, _encode(document)) if document else ("", "")),
                    self._some_ttl(),
                )
                for user_id, document in documents.items()
            ]
        )

    async def _pipelined(self, fill: Callable[[Any], list[Any]]) -> list[Any] | None:
        async def run(redis: Redis) -> list[Any]:
            async with redis.pipeline(transaction=False) as pipe:
                return await pipe.execute() if fill(pipe) else []

        return await self._link.call(run)

    def _key(self, user_id: str) -> str:
        return f"user-service:{self._epoch()}:{self._format}:{user_id}"

    def _some_ttl(self) -> int:
        """A time to live in ms, spread by a tenth so that what came together does not go so."""
        return int(self._ttl_ms * random.uniform(0.9, 1.0))  # noqa: S311 - no secret


async def _mget(keys: Sequence[str], redis: Redis) -> list[bytes | None]:
    return cast("list[bytes | None]", await redis.mget(keys))


def _encode(document: StoredDocument) -> bytes:
    return b"D%d\n%b" % (document.version, document.body)


def _parse(values: list[bytes | None] | None, count: int) -> list[StoredDocument | Absence]:
    if values is None:
        return [BYPASS] * count
    return [_parse_one(value) for value in values]


def _parse_one(value: bytes | None) -> StoredDocument | Absence:
    if value is None:
        return MISS
    if value[:1] != b"D":
        return BYPASS
    end = value.index(b"\n")
    return StoredDocument(version=int(value[1:end]), body=value[end + 1 :])
