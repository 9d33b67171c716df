"""How much a caller may ask for: counted in Redis, so that the replicas count together.

All that one turn of the event loop asks for is one command for each caller and class, in one round
trip (see `RedisLink.run`). A window begins with its first request: within it the limit is exact.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import RateLimited
from ..metrics import Metrics
from ..settings import Settings
from ..storage.link import RedisLink
from .operations import Traffic

WINDOW = 60
MAX_LOCAL = 10_000

_TAKE = """
local used = redis.call('INCRBY', KEYS[1], ARGV[1])
if used == tonumber(ARGV[1]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return {used, redis.call('PTTL', KEYS[1])}
"""

# Not where the window is over meanwhile: the next one would begin with more than there is.
_GIVE_BACK = "return redis.call('EXISTS', KEYS[1]) == 1 and redis.call('DECR', KEYS[1])"


class Quota(NamedTuple):
    """What is left of a limit, as `RateLimit` and `RateLimit-Policy` tell it.

    The fields are those of draft-ietf-httpapi-ratelimit-headers.
    """

    name: str
    limit: int
    window: int
    left: int
    resets_in: float

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the two headers."""
        policy = f'"{self.name}";q={self.limit};w={self.window}'
        state = f'"{self.name}";r={max(0, self.left)};t={math.ceil(self.resets_in)}'
        return [(b"ratelimit-policy", policy.encode()), (b"ratelimit", state.encode())]


class _Window:
    """Counts in this process, where Redis cannot."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, float]] = {}

    def take(self, key: str, count: int, window: float) -> tuple[int, float]:
        now = time.monotonic()
        used, ends = self._counts.pop(key, (0, 0.0))
        if ends <= now:
            used, ends = 0, now + window
        self._counts[key] = (used + count, ends)
        if len(self._counts) > MAX_LOCAL:
            del self._counts[next(iter(self._counts))]
        return used + count, ends - now

    def give_back(self, key: str) -> None:
        used, ends = self._counts.get(key, (0, 0.0))
        if used > 0:
            self._counts[key] = (used - 1, ends)


class RateLimits:
    """The limits of all callers."""

    def __init__(self, settings: Settings, link: RedisLink, metrics: Metrics) -> None:
        self._link = link
        self._limits: Mapping[Traffic, int] = {
            Traffic.READ: settings.rate_limit_read,
            Traffic.WRITE: settings.rate_limit_write,
            Traffic.CREDENTIALS: settings.rate_limit_credentials,
        }
        self._refused = metrics.rate_limited
        self._uncounted = metrics.rate_limits_uncounted
        self._local = _Window()
        self._waiting: dict[tuple[str, int], list[asyncio.Future[tuple[int, float] | None]]] = {}
        self._flushes: set[asyncio.Task[None]] = set()

    async def take(self, caller: str, traffic: Traffic) -> Quota | None:
        """Count a request of a caller; None where there is no limit, or nobody could count.

        Without Redis reads and writes pass, and what tries passwords is counted in this process.

        Raises:
            RateLimited
        """
        limit = self._limits[traffic]
        if not limit:
            return None
        strict = traffic is Traffic.CREDENTIALS
        counted = await self._count(f"{traffic}:{caller}", WINDOW, strict=strict)
        if counted is None:
            return None
        used, resets_in = counted
        quota = Quota(traffic, limit, WINDOW, limit - used, resets_in)
        if used > limit:
            self._refused.labels(traffic).inc()
            raise RateLimited(retry_after=resets_in, quota=quota.headers())
        return quota

    async def take_strictly(self, key: str, limit: int, window: int) -> None:
        """Count something that must be bounded also without Redis; raises `RateLimited`."""
        counted = await self._count(key, window, strict=True)
        if counted is not None and counted[0] > limit:
            self._refused.labels(Traffic.CREDENTIALS).inc()
            raise RateLimited(retry_after=counted[1])

    async def give_back(self, key: str) -> None:
        """Take back one that was counted."""
        self._local.give_back(key)
        await self._link.run([("EVAL", _GIVE_BACK, 1, _key(key))])

    async def _count(self, key: str, window: int, *, strict: bool) -> tuple[int, float] | None:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._flush)
        future: asyncio.Future[tuple[int, float] | None] = loop.create_future()
        self._waiting.setdefault((key, window), []).append(future)
        counted = await future
        if counted is None:
            self._uncounted.inc()
            return self._local.take(key, 1, window) if strict else None
        return counted

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        task = asyncio.create_task(self._answer(waiting))
        self._flushes.add(task)
        task.add_done_callback(self._flushes.discard)

    async def _answer(
        self, waiting: Mapping[tuple[str, int], list[asyncio.Future[tuple[int, float] | None]]]
    ) -> None:
        replies: list[Any] = await self._link.run(
            [
                ("EVAL", _TAKE, 1, _key(key), len(futures), window * 1000)
                for (key, window), futures in waiting.items()
            ]
        )
        for futures, reply in zip(waiting.values(), replies, strict=True):
            used, ttl = reply if isinstance(reply, list) else (None, 0)
            for before, future in enumerate(reversed(futures)):
                if not future.done():
                    future.set_result(None if used is None else (used - before, ttl / 1000))


def _key(key: str) -> str:
    return f"user-service:limit:{key}"
