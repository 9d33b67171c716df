"""Owns the work: what is asked of the User Service, what becomes of each job, and in which order.

A job is **sent at least once**, and as far as that is possible once:

* What was sent is noted in Redis at once, by job and device (`mark_sent`), before the job is over.
  A worker that is killed is followed by one that finds its jobs still pending, and skips what is
  noted. So does a job that its producer put in twice.
* What is left is the moment between the provider's yes and the note. Who dies then, or loses the
  answer on the way, cannot know, and the message is sent again, which nobody wants less than that
  it is lost. It carries the job's id (`Message-ID`, the notification's tag), by which mail programs
  and telephones put the second in the place of the first.
* A pending job is taken over after `CLAIM_AFTER` seconds, whether its worker is dead or slow. So
  that is longer than a batch can take: BATCH / CONCURRENCY x the provider's time-out.

What becomes of an error of the User Service:

* It refuses what the job asks for (`Invalid`, `BadRequest`: an unknown category, say): the job is
  put aside, for it would be refused for ever.
* All others, a refused key included, are not the job's fault. It is asked again, after
  `retry_after` where that is said, and until then nothing is read: whether a message may go out is
  never guessed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import signal
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Generic, NamedTuple, TypeVar

import msgspec
from jobs import Entry, Job, Queue
from redis.exceptions import RedisError
from user_service_client import BadRequest, Invalid, UserServiceClient, UserServiceError
from user_service_schemas import MAX_FEEDBACK, Channel, Decision, FeedbackItem

T = TypeVar("T")

PAUSE = 2.0
"""Seconds until the User Service, or Redis, is asked again that has failed."""

# Nothing personal: ids, reasons and the kinds of errors, never what an error says.
log = logging.getLogger("worker")


class TryAgain(Exception):
    """The provider does not take the message now. `after`: seconds that it asks for."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class Refused(Exception):
    """The provider will never take the message, and it is not the address's or token's fault."""


class Pace(NamedTuple):
    """How much at once, and how soon again: after `retry_after` seconds, then twice as long…"""

    batch: int = 100
    concurrency: int = 10
    retry_after: float = 30.0
    max_attempts: int = 8


def utc_now() -> datetime:
    return datetime.now(UTC)


class Worker(ABC, Generic[T]):
    """Sends the jobs of one channel to targets of type `T`."""

    channel: Channel

    def __init__(
        self,
        client: UserServiceClient,
        queue: Queue,
        pace: Pace,
        *,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self.client = client
        self.queue = queue
        self.now = now
        self._pace = pace
        self._turns = asyncio.Semaphore(pace.concurrency)
        self._pause = 0.0

    @abstractmethod
    def targets(self, decision: Decision) -> Mapping[str, T]:
        """Return where a message goes to, under ids that may be kept and logged."""

    @abstractmethod
    async def send(self, job: Job, target: T) -> FeedbackItem | None:
        """Send a message; returns what it said about the address or token if that is to blame.

        Raises:
            TryAgain: it may be taken later.
            Refused: it never will be.
        """

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT; what is in hand then is finished."""
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        log.info("%s: begins", self.channel)
        while not stopping.is_set():
            try:
                await self.work()
            except RedisError as error:
                log.error("the queue failed: %s", type(error).__name__)  # noqa: TRY400 - no text
                self._pause = PAUSE
            if self._pause:
                await _wait(stopping, self._pause)
        log.info("%s: ends", self.channel)

    async def work(self) -> int:
        """Do what is there to be done, once; returns how many jobs that were."""
        self._pause = 0.0
        entries = await self.queue.take(self._pace.batch, self.now())
        alike: defaultdict[tuple[object, ...], list[Entry]] = defaultdict(list)
        for entry in entries:
            alike[entry.job.category, entry.job.priority].append(entry)
        for some in alike.values():  # mostly one kind, and so one batch
            await self._settle(some)
        await self._report()
        return len(entries)

    async def _settle(self, entries: Sequence[Entry]) -> None:
        try:
            decisions = await self.resolve(entries)
        except (BadRequest, Invalid) as error:
            log.warning("%s jobs ask for what there is not: %s", len(entries), error.code)
            for entry in entries:
                await self.queue.bury(entry, error.code or "refused")
        except UserServiceError as error:
            self._pause_for(error)
            again = self.now() + timedelta(seconds=self._pause)
            for entry in entries:
                await self.queue.later(entry, entry.job, again)
        else:
            follow = map(self.follow, entries, decisions)
            # No task group, which would cancel what is being sent because another job failed.
            for result in await asyncio.gather(*follow, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result

    async def resolve(self, entries: Sequence[Entry]) -> Sequence[Decision]:
        """Ask for jobs of one category and priority whether they may go out now."""
        return await self.client.deliveries.resolve(
            [entry.job.user_id for entry in entries],
            channel=self.channel,
            category=entries[0].job.category,
            priority=entries[0].job.priority,
            at=self.now(),
        )

    def _pause_for(self, error: UserServiceError) -> None:
        log.error(
            "the user service failed: %s %s, request %s",
            *(type(error).__name__, error.code, error.request_id),
        )
        self._pause = max(PAUSE, getattr(error, "retry_after", None) or 0.0)

    async def follow(self, entry: Entry, decision: Decision) -> None:
        """Do with a job what was decided."""
        async with self._turns:
            said = f"{decision.decision}: {decision.reason}"
            if decision.decision == "allow":
                said = await self._deliver(entry, decision)
            elif decision.deferred_until is not None:
                await self.queue.later(entry, entry.job, decision.deferred_until)
            elif decision.decision == "suppress":
                await self.queue.done(entry)
            else:  # a newer service's, which is not for guessing
                await self.queue.bury(entry, "unknown_decision")
            log.info("job %s: %s", entry.job.id, said)

    async def _deliver(self, entry: Entry, decision: Decision) -> str:
        job, refused, again = entry.job, "", None
        sent = await self.queue.sent(job)
        for id_, target in self.targets(decision).items():
            if id_ in sent:
                continue
            try:
                feedback = await self.send(job, target)
            except TryAgain as error:
                again = error
            except Refused as error:
                refused = str(error)
                await self.queue.mark_sent(job, id_, None)
            else:
                await self.queue.mark_sent(job, id_, feedback)
                if feedback is not None:  # once it is reported, this copy is old
                    self.client.cache.invalidate(job.user_id)
        if again is not None and job.attempts + 1 < self._pace.max_attempts:
            wait = max(again.after, self._pace.retry_after * 2**job.attempts)
            next_one = msgspec.structs.replace(job, attempts=job.attempts + 1)
            await self.queue.later(entry, next_one, self.now() + timedelta(seconds=wait))
            return f"again in {wait:.1f} s: {again}"
        if refused or again is not None:
            await self.queue.bury(entry, refused or str(again))
            return f"given up: {refused or again}"
        await self.queue.done(entry)
        return "delivered"

    async def _report(self) -> None:
        """Report what providers said; what cannot be reported now stays until it can."""
        feedback = await self.queue.feedback(MAX_FEEDBACK)
        if not feedback:
            return
        # The same reports have the same key, whoever repeats them.
        key = hashlib.sha256("\n".join(one.id + one.key for one in feedback).encode()).hexdigest()
        try:
            await self.client.feedback.report([one.item for one in feedback], idempotency_key=key)
        except (BadRequest, Invalid) as error:
            log.error("%s reports were refused: %s", len(feedback), error.code)  # noqa: TRY400
        except UserServiceError as error:
            self._pause_for(error)
            return
        await self.queue.reported(feedback)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
