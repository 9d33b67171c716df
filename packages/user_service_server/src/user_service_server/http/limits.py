"""How much a caller may ask for: counted in Redis, so that the replicas count together.

A window begins with its first request. Far from a limit a process takes some of it at once and
deals it out without asking (0.1 % of what is left, so limits below 1,000 are counted one by one);
near it each is counted, all that one turn of the event loop asks for by one command for each
caller and class. So never more than the limit pass, and at most 0.1 % a replica fewer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from contextvars import Context
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

from ..errors import RateLimited
from ..metrics import Metrics
from ..settings import Settings
from ..storage.link import RedisLink
from .operations import Traffic

WINDOW = 60
MAX_LOCAL = 10_000
SHARE = 1000
"""A process takes this part of what is left, and no more than `MAX_SHARE`."""
MAX_SHARE = 100

# Where Redis lost the end of a window, it gets another: nobody is refused for ever.
_TAKE = """
local used = redis.call('INCRBY', KEYS[1], ARGV[1])
local left = redis.call('PTTL', KEYS[1])
if left < 0 then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  left = tonumber(ARGV[2])
end
return {used, left}
"""

# Not where the window is over meanwhile: the next one would begin with more than there is.
_GIVE_BACK = "return redis.call('EXISTS', KEYS[1]) == 1 and redis.call('DECR', KEYS[1])"


class Limit:
    """How many requests of a class a caller may make in a window."""

    def __init__(self, traffic: Traffic, number: int) -> None:
        self.number = number
        self.name = traffic.encode()
        self.policy = (b"ratelimit-policy", b'"%b";q=%d;w=%d' % (self.name, number, WINDOW))


class Quota(NamedTuple):
    """What is left of a limit, and in how many seconds all of it is there again."""

    limit: Limit
    left: int
    resets_in: float

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return `RateLimit-Policy` and `RateLimit` of draft-ietf-httpapi-ratelimit-headers."""
        limit, left = self.limit, max(0, self.left)
        state = b'"%b";r=%d;t=%d' % (limit.name, left, math.ceil(self.resets_in))
        return [limit.policy, (b"ratelimit", state)]


@dataclass(slots=True)
class _Share:
    """What a process has taken of a window and not dealt out yet; and what is left besides."""

    mine: int
    left: int
    ends: float


@dataclass(slots=True)
class _Asked:
    """What is to be counted for one key: for those who wait, and `more` of `limit` for a share."""

    window: int
    limit: int | None
    more: int
    waiting: list[asyncio.Future[_Counted | None]] = field(default_factory=list)


class _Counted(NamedTuple):
    used: int
    resets_in: float


class _Window:
    """Counts in this process, where Redis cannot."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, float]] = {}

    def take(self, key: str, window: float) -> _Counted:
        now = monotonic()
        used, ends = self._counts.pop(key, (0, 0.0))
        if ends <= now:
            used, ends = 0, now + window
        self._counts[key] = (used + 1, ends)
        if len(self._counts) > MAX_LOCAL:
            del self._counts[next(iter(self._counts))]
        return _Counted(used + 1, ends - now)

    def give_back(self, key: str) -> None:
        used, ends = self._counts.get(key, (0, 0.0))
        if used > 0:
            self._counts[key] = (used - 1, ends)


class RateLimits:
    """The limits of all callers."""

    def __init__(self, settings: Settings, link: RedisLink, metrics: Metrics) -> None:
        self._link = link
        self._limits = {
            Traffic.READ: Limit(Traffic.READ, settings.rate_limit_read),
            Traffic.WRITE: Limit(Traffic.WRITE, settings.rate_limit_write),
            Traffic.CREDENTIALS: Limit(Traffic.CREDENTIALS, settings.rate_limit_credentials),
        }
        self._refusals = metrics.rate_limited
        self._uncounted = metrics.rate_limits_uncounted
        self._local = _Window()
        # By key: of callers that are known, so there are few.
        self._shares: dict[str, _Share] = {}
        self._asked: dict[str, _Asked] = {}
        self._sharing: set[str] = set()
        self._flushes: set[asyncio.Task[None]] = set()

    def deal(self, caller: str, traffic: Traffic) -> Quota | None:
        """Count a request against what this process has taken; None where that is to be asked for.

        Raises:
            RateLimited
        """
        share = self._shares.get(f"{traffic}:{caller}")
        if share is None:
            return None
        resets_in = share.ends - monotonic()
        if resets_in <= 0:
            return None
        if share.mine:
            share.mine -= 1
            return Quota(self._limits[traffic], share.left + share.mine, resets_in)
        if share.left:
            return None
        # Nothing is given back within a window, so that Redis need not be asked in vain.
        raise self._refused(traffic, Quota(self._limits[traffic], -1, resets_in))

    async def take(self, caller: str, traffic: Traffic) -> Quota | None:
        """Count a request of a caller; None where there is no limit, or nobody could count.

        Without Redis reads and writes pass, and what tries passwords is counted in this process.

        Raises:
            RateLimited
        """
        limit = self._limits[traffic]
        if not limit.number:
            return None
        quota = self.deal(caller, traffic)
        if quota is not None:
            return quota
        key = f"{traffic}:{caller}"
        counted = await self._count(key, WINDOW, limit.number)
        if counted is None and traffic is Traffic.CREDENTIALS:
            counted = self._local.take(key, WINDOW)
        if counted is None:
            return None
        quota = Quota(limit, limit.number - counted.used, counted.resets_in)
        if quota.left < 0:
            raise self._refused(traffic, quota)
        return quota

    def _refused(self, traffic: Traffic, quota: Quota) -> RateLimited:
        self._refusals.labels(traffic).inc()
        return RateLimited(retry_after=quota.resets_in, quota=quota.headers())

    async def take_strictly(self, key: str, limit: int, window: int) -> None:
        """Count something that must be bounded also without Redis; raises `RateLimited`."""
        counted = await self._count(key, window) or self._local.take(key, window)
        if counted.used > limit:
            self._refusals.labels(Traffic.CREDENTIALS).inc()
            raise RateLimited(retry_after=counted.resets_in)

    async def give_back(self, key: str) -> None:
        """Take back one that was counted strictly."""
        self._local.give_back(key)
        await self._link.run([("EVAL", _GIVE_BACK, 1, _key(key))])

    async def _count(self, key: str, window: int, limit: int | None = None) -> _Counted | None:
        """Count one, and a share for this process where there is a `limit` to share."""
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._flush)
        asked = self._asked.get(key)
        if asked is None:
            more = 0 if limit is None else self._size_of_share(key, limit)
            asked = self._asked[key] = _Asked(window, limit, more)
        future: asyncio.Future[_Counted | None] = loop.create_future()
        asked.waiting.append(future)
        counted = await future
        if counted is None:
            self._uncounted.inc()
        return counted

    def _size_of_share(self, key: str, limit: int) -> int:
        if key in self._sharing:
            return 0
        share = self._shares.get(key)
        left = limit if share is None or share.ends <= monotonic() else share.left
        return min(left // SHARE, MAX_SHARE)

    def _flush(self) -> None:
        asked, self._asked = self._asked, {}
        self._sharing.update(key for key, some in asked.items() if some.more)
        # In a context of its own: it is for many requests.
        task = asyncio.create_task(self._answer(asked), context=Context())
        self._flushes.add(task)
        task.add_done_callback(self._flushes.discard)

    async def _answer(self, asked: Mapping[str, _Asked]) -> None:
        replies: list[Any] = await self._link.run(
            [
                ("EVAL", _TAKE, 1, _key(key), len(some.waiting) + some.more, some.window * 1000)
                for key, some in asked.items()
            ]
        )
        for (key, some), reply in zip(asked.items(), replies, strict=True):
            if some.more:
                self._sharing.discard(key)
            counted: list[_Counted | None] = [None] * len(some.waiting)
            if isinstance(reply, list):
                used, resets_in = reply[0], reply[1] / 1000
                before = used - some.more - len(some.waiting)
                counted = [_Counted(before + n, resets_in) for n in range(1, len(counted) + 1)]
                if some.limit is not None:
                    # Those who wait come first; of what is beyond the limit nobody has a share.
                    mine = max(0, min(some.more, some.limit - before - len(counted)))
                    self._keep(
                        key, _Share(mine, max(0, some.limit - used), monotonic() + resets_in)
                    )
            for future, one in zip(some.waiting, counted, strict=True):
                if not future.done():
                    future.set_result(one)

    def _keep(self, key: str, new: _Share) -> None:
        old = self._shares.get(key)
        # Of the same window, unless their ends are apart: a reply may be late.
        if old is not None and old.ends > monotonic() and abs(old.ends - new.ends) < 1:
            new = _Share(old.mine + new.mine, min(old.left, new.left), min(old.ends, new.ends))
        self._shares[key] = new


def _key(key: str) -> str:
    return f"user-service:limit:{key}"
