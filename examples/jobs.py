"""Owns the jobs: a Redis stream of what is to be sent, and what waits for its time.

All keys of a channel, `push` say, have one hash tag, so that a cluster keeps them together:

    {push}:jobs       the stream; producers: XADD {push}:jobs * job '{"id": …, "user_id": …, …}'
    {push}:later      a sorted set: jobs by the millisecond at which to ask again
    {push}:sent:<id>  a set: to whom a job was sent already, kept for a week
    {push}:feedback   a stream: what the provider said, until the User Service was told
    {push}:dead       a stream: jobs that nobody can do, and why, for somebody to look at

The jobs are the truth about what is still to be sent, so this must be a Redis that keeps what it
is told (`appendonly yes`, no eviction): not the one that the User Service has as its cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Annotated, NamedTuple, Protocol, cast
from uuid import UUID

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from user_service_schemas import FeedbackItem, Priority

GROUP = "workers"
REMEMBERED_FOR = timedelta(days=7)
DEAD_KEPT = 10_000

# One step, so that of two workers one puts a job back, and none is lost between the two keys.
_RELEASE = """
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, ARGV[2])
for _, job in ipairs(due) do
    redis.call('XADD', KEYS[2], '*', 'job', job)
    redis.call('ZREM', KEYS[1], job)
end
return #due
"""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A message for a user. `id` is the producer's: jobs with the same one are the same job."""

    id: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._:-]{1,64}$")]
    user_id: UUID
    title: str
    body: str
    category: str | None = None
    priority: Priority = "normal"
    attempts: int = 0


class Entry(NamedTuple):
    """A job in hand, and its id in the stream."""

    id: str
    job: Job


class Feedback(NamedTuple):
    """What a provider said. The key says of which job and device; it holds nothing personal."""

    id: str
    key: str
    item: FeedbackItem


class Queue(Protocol):
    """What a worker needs of its jobs. Each method is one step: all of it happens, or nothing."""

    async def take(self, count: int, now: datetime) -> Sequence[Entry]:
        """Return some jobs: what a crashed worker left first, then new ones; waits a moment."""
        ...

    async def done(self, entry: Entry) -> None:
        """The job is over."""
        ...

    async def later(self, entry: Entry, job: Job, at: datetime) -> None:
        """Take the job, as it is now, again when it is `at`."""
        ...

    async def bury(self, entry: Entry, why: str) -> None:
        """Nobody can do this job."""
        ...

    async def sent(self, job: Job) -> set[str]:
        """Return to which of its targets a job was sent."""
        ...

    async def mark_sent(self, job: Job, target: str, feedback: FeedbackItem | None) -> None:
        """Note that a job was sent to a target, and what is to be reported of it."""
        ...

    async def feedback(self, count: int) -> Sequence[Feedback]:
        """Return the oldest feedback that was not reported."""
        ...

    async def reported(self, feedback: Iterable[Feedback]) -> None:
        """Forget this feedback."""
        ...


class RedisQueue:
    """The jobs of one channel. `consumer` is this worker's name, the same after a restart."""

    def __init__(self, redis: Redis, name: str, *, consumer: str, claim_after: float) -> None:
        self._redis = redis
        self._consumer = consumer
        self._claim_after = int(claim_after * 1000)
        self._jobs = f"{{{name}}}:jobs"
        self._later = f"{{{name}}}:later"
        self._sent = f"{{{name}}}:sent:"
        self._feedback = f"{{{name}}}:feedback"
        self._dead = f"{{{name}}}:dead"
        self._release = redis.register_script(_RELEASE)

    async def take(self, count: int, now: datetime) -> Sequence[Entry]:
        try:
            return await self._take(count, now)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            # The first worker is here before the first job; it begins with the oldest.
            await self._redis.xgroup_create(self._jobs, GROUP, id="0", mkstream=True)
            return []

    async def _take(self, count: int, now: datetime) -> Sequence[Entry]:
        due = math.floor(now.timestamp() * 1000)
        await self._release(keys=[self._later, self._jobs], args=[due, count])
        claimed = await self._redis.xautoclaim(
            self._jobs, GROUP, self._consumer, self._claim_after, count=count
        )
        found = cast("list[tuple[str, dict[str, str]]]", claimed[1])
        if not found:
            wait = await self._milliseconds_to_wait(due)
            read = await self._redis.xreadgroup(
                GROUP, self._consumer, {self._jobs: ">"}, count=count, block=wait
            )
            found = _entries(read)
        return [entry for id_, fields in found if (entry := await self._entry(id_, fields))]

    async def _milliseconds_to_wait(self, now: int) -> int:
        """At most a quarter of a second, so that a worker that is to end sees it soon."""
        first = await self._redis.zrange(self._later, 0, 0, withscores=True)
        until = float(first[0][1]) - now if first else math.inf
        return int(max(1, min(250, until)))  # 0 would be for ever

    async def _entry(self, id_: str, fields: dict[str, str]) -> Entry | None:
        try:
            return Entry(id_, msgspec.json.decode(fields.get("job", ""), type=Job))
        except msgspec.DecodeError:
            await self._bury(id_, fields.get("job", ""), "unreadable")
            return None

    async def done(self, entry: Entry) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.xack(self._jobs, GROUP, entry.id)
            pipe.xdel(self._jobs, entry.id)
            await pipe.execute()

    async def later(self, entry: Entry, job: Job, at: datetime) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zadd(self._later, {_text(job): math.ceil(at.timestamp() * 1000)})
            pipe.xack(self._jobs, GROUP, entry.id)
            pipe.xdel(self._jobs, entry.id)
            await pipe.execute()

    async def bury(self, entry: Entry, why: str) -> None:
        await self._bury(entry.id, _text(entry.job), why)

    async def _bury(self, id_: str, job: str, why: str) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.xadd(self._dead, {"job": job, "why": why}, maxlen=DEAD_KEPT, approximate=True)
            pipe.xack(self._jobs, GROUP, id_)
            pipe.xdel(self._jobs, id_)
            await pipe.execute()

    async def sent(self, job: Job) -> set[str]:
        return cast("set[str]", await self._redis.smembers(self._sent + job.id))

    async def mark_sent(self, job: Job, target: str, feedback: FeedbackItem | None) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.sadd(self._sent + job.id, target)
            pipe.expire(self._sent + job.id, REMEMBERED_FOR)
            if feedback is not None:
                pipe.xadd(self._feedback, {"key": f"{job.id}/{target}", "item": _text(feedback)})
            await pipe.execute()

    async def feedback(self, count: int) -> Sequence[Feedback]:
        found = await self._redis.xrange(self._feedback, count=count)
        return [
            Feedback(id_, fields["key"], msgspec.json.decode(fields["item"], type=FeedbackItem))
            for id_, fields in cast("list[tuple[str, dict[str, str]]]", found)
        ]

    async def reported(self, feedback: Iterable[Feedback]) -> None:
        await self._redis.xdel(self._feedback, *(one.id for one in feedback))


def _text(value: Job | FeedbackItem) -> str:
    return msgspec.json.encode(value).decode()


def _entries(read: object) -> list[tuple[str, dict[str, str]]]:
    """Return what XREADGROUP found: RESP2 and RESP3 shape it differently."""
    if isinstance(read, dict):
        return [entry for some in read.values() for part in some for entry in part]
    streams = cast("list[tuple[str, list[tuple[str, dict[str, str]]]]]", read or [])
    return [entry for _, entries in streams for entry in entries]
