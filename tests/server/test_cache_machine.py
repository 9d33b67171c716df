"""The cache's protocol under whatever order of reads, writes, losses and deaths hypothesis finds.

Everything is the server's own, on the real Postgres and Valkey: two replicas, one user. Each errand
goes on by one or more effects at a time, and the network, time and deaths come in between. Two
things must hold: no read returns less than what was acknowledged before it began, and, after every
single step, what is cached is what is committed.

A wrong order needs a few rare things in one example, so each example has habits: of all that can
happen, a few things that happen again and again.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest.mock import patch
from uuid import uuid4

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from user_service_server.errors import UserNotFound
from user_service_server.settings import Settings
from user_service_server.storage import documents, state
from user_service_server.storage.buckets import ALL_BUCKETS

from .stepped import READING, WRITING, Errand, World, a_world

BOTH = (0, 1)
AT_ONCE = 3
TROUBLE = (
    "a writer dies",
    "a server restarts",
    "redis evicts",
    *("redis evicts even a marker",) * 3,
    "redis is cut off, or back",
    "redis restarts with old data",
    "the servers look",
    "3 s pass",
    "10 s pass",
)
KINDS_OF_STEPS = (("read", "write", "write", "write", "trouble"), ("read", "write", "trouble"))
WRITES = (("rename",), ("rename", "erase"), ("rename", "erase"), ("rename", "erase", "refuse"))
# Where an errand stops: most often where another one in between matters.
STOPS_OF_READS = ("end", "fill", "fill", "answer", "answer", "read", "lease")
STOPS_OF_WRITES = (
    *("publish",) * 3,
    "commit",
    "conclude",
    "lock",
    "lock",
    "lock_names",
    "leave_behind",
)
MOMENTS = ((None,), (None,), (None,), (None, "cut"), ("cut",), ("cut",), (None, None, "deaf"))
GONE = math.inf
"""The version of who was erased: above all others."""


class Broken(AssertionError):
    """What the protocol promises does not hold."""


@dataclass(frozen=True)
class Habits:
    """What happens in one example: few kinds of things, so that they meet."""

    kinds_of_steps: Sequence[str]
    writers_at_once: int
    readers: Sequence[int]
    writers: Sequence[int]
    writes: Sequence[str]
    stops_of_reads: Sequence[str]
    stops_of_writes: Sequence[str]
    troubles: Sequence[str]
    moments: Sequence[str | None]
    """What keeps a server from Redis while a write under way takes its next steps."""
    told_at_once: bool
    """Whether the servers learn at once that their cache was left behind."""
    caches_again: bool
    """Whether the time without fills that follows is over as soon as that may be."""


def _some(of: Sequence[Any], most: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(of), min_size=1, max_size=most)


HABITS = st.builds(
    Habits,
    kinds_of_steps=st.sampled_from(KINDS_OF_STEPS),
    writers_at_once=st.sampled_from((1, 2, AT_ONCE, AT_ONCE)),
    readers=st.sampled_from((BOTH, BOTH, (0,), (1,))),
    writers=st.sampled_from((BOTH, BOTH, (0,), (1,))),
    writes=st.sampled_from(WRITES),
    stops_of_reads=_some(STOPS_OF_READS, 3),
    stops_of_writes=_some(STOPS_OF_WRITES, 3),
    troubles=_some(TROUBLE, 4),
    moments=st.sampled_from(MOMENTS),
    told_at_once=st.sampled_from((True, True, False)),
    caches_again=st.sampled_from((True, True, False)),
)


@dataclass(frozen=True)
class Step:
    """What happens next: an errand begins, or one of those under way goes on; or trouble.

    It is drawn without a look at what is under way: an example that is run again, and goes another
    way since Postgres or Redis was quicker, still draws the same.
    """

    what: str
    replica: int
    until: str
    begins: bool
    number: int
    moment: str | None


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Draw a step out of the habits of the example."""
    habits: Habits = draw(st.runner()).habits
    kind = draw(st.sampled_from(habits.kinds_of_steps))
    number = draw(st.integers(0, 5))
    if kind == "trouble":
        what = draw(st.sampled_from(habits.troubles))
        return Step(what, draw(st.sampled_from(BOTH)), "", begins=False, number=number, moment=None)
    reads = kind == "read"
    stops = habits.stops_of_reads if reads else habits.stops_of_writes
    begins = draw(st.booleans())
    return Step(
        "read" if reads else draw(st.sampled_from(habits.writes)),
        draw(st.sampled_from(habits.readers if reads else habits.writers)),
        draw(st.sampled_from(stops)) if begins or draw(st.booleans()) else "end",
        begins,
        number,
        draw(st.sampled_from(habits.moments)),
    )


@dataclass
class Read:
    """A read under way, and what it may not be older than."""

    errand: Errand
    replica: int
    floor: float
    floor_of_a_joined: float
    """One that joins another read of its server may miss what other servers wrote since that began;
    the server bounds this by `FLIGHT_AGE`."""

    @property
    def waits(self) -> bool:
        """Whether it goes on with the one that it has joined."""
        return self.errand.joined and self.errand.at is None


@dataclass
class Writer:
    """A write under way."""

    errand: Errand
    replica: int
    erases: bool

    @property
    def locks(self) -> bool:
        """Whether its transaction has the user's lock, and perhaps the generation's."""
        return self.errand.at in {"conclude", "commit"}


class CacheMachine(RuleBasedStateMachine):
    """Reads and writes of one user by two replicas."""

    world: World
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    begun: ClassVar = itertools.count(1)

    @initialize(
        habits=HABITS,
        cached=st.sampled_from((True, True, False)),
        cut_off=st.sampled_from((None, None, None, None, 0, 1)),
        left_behind=st.booleans(),
    )
    def begin(self, habits: Habits, cached: bool, cut_off: int | None, left_behind: bool) -> None:
        """Begin with what most wrong orders need: a cached document, a server without Redis."""
        self.number = next(self.begun)
        self.habits = habits
        self.reads: list[Read] = []
        self.writers: list[Writer] = []
        # Redis may lose a marker; then what was not acknowledged may be cached over.
        self.lost_marker: str | None = None
        self.strangers: set[int] = set()
        self.quiet = False
        self.restarted = False
        self.broken = False
        self.run(self._begin(cached, cut_off, left_behind))

    async def _begin(self, cached: bool, cut_off: int | None, left_behind: bool) -> None:
        await self.world.age(60)
        await self._meet_a_user()
        if cached:
            await self.world.replicas[0].read(self.user)
        await self._save()
        if cut_off is not None:
            self.world.replicas[cut_off].link.cut = True
            if left_behind:
                await self._write(cut_off, "rename", "end")

    async def _meet_a_user(self) -> None:
        self.user: str = await self.world.user()
        self.acknowledged: float = 1
        self.acknowledged_by: list[float] = [1, 1]
        self.key = await self.world.key(self.user)

    @rule(step=steps())
    def step(self, step: Step) -> None:
        """One rule, so that what happens is as likely as the habits say."""
        if step.what in TROUBLE:
            self.run(self._trouble(step))
        elif step.what == "read":
            self.run(self._read_on(step))
        else:
            self.run(self._write_on(step))

    # Reads and writes

    async def _read_on(self, step: Step) -> None:
        able = [read for read in self.reads if not read.waits]
        if len(self.reads) < AT_ONCE and (step.begins or not able):
            await self._read(step.replica, step.until)
        elif able:
            read = able[step.number % len(able)]
            await self._go_on_reading(read, step.until)

    async def _read(self, number: int, until: str) -> None:
        replica = self.world.replicas[number]
        mine = floor = self.acknowledged_by[number]
        if await self.world.is_up_to_date(replica, self.user):
            floor = self.acknowledged
        read = Read(replica.reading(self.user, *READING), number, floor, mine)
        self.reads.append(read)
        await self._go_on_reading(read, until)

    async def _go_on_reading(self, read: Read, until: str) -> None:
        begins_at = read.errand.at
        while (at := await read.errand.rest()) is not None and (at != until or at == begins_at):
            await read.errand.step()
        self._judge_reads()

    def _judge_reads(self) -> None:
        for read in list(self.reads):
            if read.errand.task.done():
                found = read.errand.task.result()
                version = GONE if found is None else found
                floor = read.floor_of_a_joined if read.errand.joined else read.floor
                self._demand(version >= floor, f"read {version} after {floor} was acknowledged")
                if read.errand.at is None:
                    self.reads.remove(read)

    async def _write_on(self, step: Step) -> None:
        if self.acknowledged == GONE and not self.writers:
            # Of who was erased there is no more to see.
            for read in list(self.reads):
                await self._go_on_reading(read, "end")
            await self._look_at_what_is_cached()
            await self._meet_a_user()
        able = [writer for writer in self.writers if not self._is_blocked(writer)]
        if len(self.writers) < self.habits.writers_at_once and (step.begins or not able):
            await self._write(step.replica, step.what, step.until)
        else:
            writer = able[step.number % len(able)]
            with self._moment(writer.replica, step.moment):
                await self._go_on_writing(writer, step.until)

    async def _write(self, number: int, kind: str, until: str) -> None:
        replica = self.world.replicas[number]
        if kind == "rename":
            errand = replica.writing(self.user, stops=WRITING)
        elif kind == "erase":
            errand = replica.erasing(self.user, *WRITING)
        else:
            errand = replica.refusing(self.user, *WRITING)
        writer = Writer(errand, number, kind == "erase")
        self.writers.append(writer)
        await self._go_on_writing(writer, until)

    def _is_blocked(self, writer: Writer) -> bool:
        """Whether it would wait for another writer."""
        at = writer.errand.at
        others = [other for other in self.writers if other is not writer]
        locked = any(other.locks for other in others)
        link = self.world.replicas[writer.replica].link
        if at == "publish" and (link.cut or link.deaf):
            # It leaves the cache behind next, and a server has few connections for that.
            return locked or any(other.errand.at == "leave_behind" for other in others)
        return locked and at in {"lock", "leave_behind"}

    async def _go_on_writing(self, writer: Writer, until: str) -> None:
        begins_at = writer.errand.at
        while (at := await writer.errand.rest()) is not None and (at != until or at == begins_at):
            if self._is_blocked(writer):
                return
            await writer.errand.step()
        if writer.errand.at is None:
            await self._end(writer)

    async def _end(self, writer: Writer) -> None:
        self.writers.remove(writer)
        try:
            version = await writer.errand.finish()
        except UserNotFound:
            return
        if version is not None or writer.erases:
            acknowledged = GONE if version is None else version
            self.acknowledged = max(self.acknowledged, acknowledged)
            mine = max(self.acknowledged_by[writer.replica], acknowledged)
            self.acknowledged_by[writer.replica] = mine

    @contextmanager
    def _moment(self, number: int, moment: str | None) -> Iterator[None]:
        """Keep a server from Redis for a moment, if it is not kept from it anyway."""
        link = self.world.replicas[number].link
        before = link.cut, link.deaf
        link.cut, link.deaf = link.cut or moment == "cut", link.deaf or moment == "deaf"
        try:
            yield
        finally:
            link.cut, link.deaf = before

    # What goes wrong, and time

    async def _trouble(self, step: Step) -> None:
        number, place = step.number, step.replica
        replica = self.world.replicas[place]
        # Whose row may be locked; nothing happens in between.
        meets_a_stranger = place in self.strangers and self._locked()
        match step.what:
            case "a writer dies" if self.writers:
                await self.writers.pop(number % len(self.writers)).errand.crash()
            case "a server restarts" if not (meets_a_stranger or self.restarted):
                self.restarted = True  # once, since it takes as long as all else
                self.reads = [read for read in self.reads if not replica.has(read.errand)]
                self.writers = [writer for writer in self.writers if writer.replica != place]
                await self.world.restart(place)
            case "redis evicts":
                await self._forget({"document", "lease"})
            case "redis evicts even a marker":
                await self._forget({"document", "lease", "marker"})
            case "redis is cut off, or back" if not meets_a_stranger:
                replica.link.cut = not replica.link.cut
            case "redis restarts with old data" if not self._locked():
                await self._restart_redis()
            case "the servers look":
                await self.world.look()
            case "3 s pass" if not self._locked():
                # Longer than a lease lives, a raise counts for others, and a server does not look.
                await self._pass(3.1)
            case "10 s pass" if self._may_take_long():
                # Longer than a transaction, a marker, and the time after a raise without fills.
                await self._pass(10.1)
        await self._recognise()

    def _locked(self) -> bool:
        return any(writer.locks for writer in self.writers)

    def _may_take_long(self) -> bool:
        return all(writer.errand.at == "publish" for writer in self.writers)

    async def _forget(self, what: set[str]) -> None:
        held = await self.world.cached(self.user)
        if (held if isinstance(held, str) else "document") in what:
            if held == "marker":
                self.lost_marker = await self.world.key(self.user)
            await self.world.evict(self.user)

    async def _pass(self, seconds: float) -> None:
        await self._forget({"lease"})
        if seconds > 10 and not self.writers and await self.world.cached(self.user) == "marker":
            await self.world.evict(self.user)
        await self.world.age(seconds)

    async def _save(self) -> None:
        """Let Redis save what it holds of the user, as it does now and then."""
        self.saved_key = await self.world.key(self.user)
        self.old_data = await self.world.stored.dump(self.saved_key)

    async def _restart_redis(self) -> None:
        """It has lost what came since its last save; it saves when it has restarted."""
        await self.world.stored.delete(await self.world.key(self.user))
        if self.old_data is not None:
            ttl = 300_000
            await self.world.stored.restore(self.saved_key, ttl, self.old_data, replace=True)
        await self._save()
        self.server = uuid4().hex
        self.strangers = set(BOTH)

    async def _recognise(self) -> None:
        """Let servers that can reach Redis meet it: it is a new one since it has restarted."""
        for number in sorted(self.strangers):
            replica = self.world.replicas[number]
            if not replica.link.cut and not self._locked():
                await replica.state.recognise(self.server, ALL_BUCKETS)
                self.strangers.discard(number)

    # What must hold

    def _demand(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.broken = True
            raise Broken(f"{otherwise} (example {self.number})")

    @invariant()
    def what_is_cached_is_what_is_committed(self) -> None:
        self.run(self._look_at_what_is_cached())

    async def _look_at_what_is_cached(self) -> None:
        key = await self.world.key(self.user)
        if key != self.key:
            self.key, self.quiet = key, True
            if self.habits.told_at_once:
                await self.world.look()
        if self.quiet and self.habits.caches_again and self._may_take_long():
            self.quiet = False
            await self._pass(10.1)
        held = await self.world.held(key)
        if isinstance(held, int) and key != self.saved_key:
            await self._save()
        if held in {"nothing", "marker"} and not self.writers:
            self.lost_marker = None  # who was not announced has ended
        # Nobody has seen what a Redis holds that all are still to meet.
        if isinstance(held, int) and self.strangers != set(BOTH):
            if key == self.lost_marker:
                known = self.acknowledged
                self._demand(held >= known, f"cached {held} after {known} was acknowledged")
            else:
                committed = await self.world.committed(self.user)
                self._demand(held == committed, f"cached {held}, committed {committed}")

    def teardown(self) -> None:
        if hasattr(self, "user"):
            self.run(self._end_example())

    async def _end_example(self) -> None:
        try:
            if not self.broken:
                await self._come_to_rest()
        finally:
            for replica in self.world.replicas:
                await replica.crash()
                replica.link.cut = replica.link.deaf = False

    async def _come_to_rest(self) -> None:
        # Whoever has the lock first; of the others the last first, which is the harder order.
        for writer in [writer for writer in self.writers if writer.locks]:
            await self._go_on_writing(writer, "end")
        for replica in self.world.replicas:
            replica.link.cut = replica.link.deaf = False
        await self._recognise()
        for writer in list(reversed(self.writers)):
            await self._go_on_writing(writer, "end")
        for read in list(self.reads):
            await self._go_on_reading(read, "end")
        await self.world.age(11)
        await self._look_at_what_is_cached()
        for number in BOTH:
            await self._read(number, "end")
        await self._look_at_what_is_cached()


@contextmanager
def a_machine(settings: Settings) -> Iterator[type[CacheMachine]]:
    """Make machines on two replicas that live as long as all examples."""
    with asyncio.Runner() as runner:
        opened = a_world(settings)
        world = runner.run(_entered(opened))
        for _ in range(2):
            runner.run(world.replica())

        class Machine(CacheMachine):
            pass

        Machine.world = world
        Machine.run = staticmethod(runner.run)
        try:
            # What happens must not hang on how long an example takes on a busy machine.
            with (
                patch.object(documents, "FLIGHT_AGE", 60),
                patch.object(documents, "CONCLUSION_TIMEOUT", 60),
                patch.object(documents, "TRANSACTION_TIMEOUT", 60),
                patch.object(state, "POLL_TIMEOUT", 60),
            ):
                yield Machine
        finally:
            runner.run(_left(opened))


async def _entered(manager: Any) -> World:
    world: World = await manager.__aenter__()
    return world


async def _left(manager: Any) -> None:
    await manager.__aexit__(None, None, None)


def search(settings: Settings, steps: int, **how: Any) -> None:
    """Look for an order of things that goes wrong, in examples of so many steps."""
    with a_machine(settings) as machine:
        run_machine(
            machine,
            settings=hypothesis.settings(
                deadline=None,
                database=None,
                stateful_step_count=steps,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
                **how,
            ),
        )


def test_no_read_is_older_than_what_was_acknowledged_in_whatever_order(settings: Settings) -> None:
    search(settings, 25, max_examples=30, derandomize=True, phases=(Phase.generate, Phase.shrink))
