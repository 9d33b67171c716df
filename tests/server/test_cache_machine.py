"""The cache's protocol under whatever order of reads, writes, losses and deaths hypothesis finds.

Everything is the server's own, on the real Postgres and Valkey: two replicas, one user. Each errand
goes on by one or more effects at a time, and the network, time and deaths come in between.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from user_service_server.errors import UserNotFound
from user_service_server.settings import Settings
from user_service_server.storage import documents
from user_service_server.storage.buckets import bucket_of

from .stepped import READING, WRITING, Errand, World, a_world

REPLICAS = st.sampled_from((0, 1))
NUMBERS = st.integers(0, 2)
AT_ONCE = 3
TROUBLE = (
    *("a writer dies", "a writer dies", "redis evicts", "redis evicts", "redis is cut off"),
    *("redis evicts even a marker", "redis evicts even a marker"),
    *("redis is back", "the servers look", "10 s pass", "3 s pass", "a server restarts"),
)
TO_WHERE_IT_MATTERS = ("end", "fill", "fill", "lease", "read", "answer")
"""Where a read stops: most often when it has read, and is about to fill."""
GONE = math.inf
"""The version of who was erased: above all others."""


@dataclass
class Read:
    """A read under way, and what it may not be older than."""

    errand: Errand
    floor: float
    floor_of_a_joined: float
    """One that joins another read of its server may miss what other servers wrote since that began;
    the server bounds this by `FLIGHT_AGE`."""


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

    @initialize(cached=st.booleans(), cut_off=st.sampled_from((None, 0, 1)))
    def begin(self, cached: bool, cut_off: int | None) -> None:
        """Begin with what most wrong orders need: a cached document, a server without Redis."""
        self.reads: list[Read] = []
        self.writers: list[Writer] = []
        self.acknowledged: float = 1
        self.acknowledged_by: list[float] = [1, 1]
        # Redis may lose a marker; then what was not acknowledged may be cached over.
        self.lost_a_marker = False
        self.user: str = self.run(self.world.user())
        self.run(self.world.age(60))
        if cached:
            self.run(self.world.replicas[0].read(self.user))
        if cut_off is not None:
            self.world.replicas[cut_off].link.cut = True

    # Reads and writes

    @precondition(lambda self: len(self.reads) < AT_ONCE)
    @rule(replica=REPLICAS, until=st.sampled_from(TO_WHERE_IT_MATTERS))
    def read(self, replica: int, until: str) -> None:
        self.run(self._read(replica, until))

    async def _read(self, number: int, until: str) -> None:
        replica = self.world.replicas[number]
        mine = floor = self.acknowledged_by[number]
        bucket = bucket_of(self.user)
        if replica.state.generation(bucket) == await self.world.generation(bucket):
            floor = self.acknowledged
        read = Read(replica.reading(self.user, *READING), floor, mine)
        self.reads.append(read)
        await self._go_on_reading(read, until)

    @precondition(lambda self: self.reads)
    @rule(number=NUMBERS, until=st.sampled_from(TO_WHERE_IT_MATTERS))
    def go_on_reading(self, number: int, until: str) -> None:
        self.run(self._go_on_reading(self.reads[number % len(self.reads)], until))

    async def _go_on_reading(self, read: Read, until: str) -> None:
        while await read.errand.rest() not in {None, until}:
            await read.errand.step()
        self._judge_reads()

    def _judge_reads(self) -> None:
        for read in list(self.reads):
            if read.errand.task.done():
                found = read.errand.task.result()
                version = GONE if found is None else found
                floor = read.floor_of_a_joined if read.errand.joined else read.floor
                assert version >= floor, f"read {version} after {floor} was acknowledged"
                if read.errand.at is None:
                    self.reads.remove(read)

    @precondition(lambda self: len(self.writers) < AT_ONCE)
    @rule(
        replica=REPLICAS,
        kind=st.sampled_from(("rename", "rename", "rename", "erase", "refuse")),
        until=st.sampled_from(
            ("publish", "publish", "end", "lock", "lock", "commit", "lock_names")
        ),
    )
    def write(self, replica: int, kind: str, until: str) -> None:
        self.run(self._write(replica, kind, until))

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

    @precondition(lambda self: self.writers)
    @rule(number=NUMBERS, until=st.sampled_from(("publish", "end", "end", "leave_behind")))
    def go_on_writing(self, number: int, until: str) -> None:
        self.run(self._go_on_writing(self.writers[number % len(self.writers)], until))

    async def _go_on_writing(self, writer: Writer, until: str) -> None:
        while await writer.errand.rest() not in {None, until}:
            waits = writer.errand.at in {"lock", "leave_behind"}
            if waits and any(other.locks for other in self.writers):
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

    # What goes wrong, and time: one rule, so that most of what happens is reads and writes

    @rule(what=st.sampled_from(TROUBLE), number=NUMBERS)
    def trouble(self, what: str, number: int) -> None:
        self.run(self._trouble(what, number))

    async def _trouble(self, what: str, number: int) -> None:
        place = number % 2
        match what:
            case "a writer dies" if self.writers:
                await self.writers.pop(number % len(self.writers)).errand.crash()
            case "a server restarts":
                stopped = self.world.replicas[place]
                self.reads = [read for read in self.reads if not stopped.has(read.errand)]
                self.writers = [writer for writer in self.writers if writer.replica != place]
                await self.world.restart(place)
            case "redis evicts":
                await self._forget({"document", "lease"})
            case "redis evicts even a marker":
                await self._forget({"document", "lease", "marker"})
            case "redis is cut off":
                self.world.replicas[place].link.cut = True
            case "redis is back":
                self.world.replicas[place].link.cut = False
            case "the servers look":
                await self.world.look()
            case "3 s pass" if not any(writer.locks for writer in self.writers):
                # Longer than a lease lives, a raise counts for others, and a server does not look.
                await self._pass(3.1)
            case "10 s pass" if all(w.errand.at == "publish" for w in self.writers):
                # Longer than a transaction, a marker, and the time after a raise without fills.
                await self._pass(10.1)

    async def _forget(self, what: set[str]) -> None:
        held = await self.world.cached(self.user)
        if (held if isinstance(held, str) else "document") in what:
            self.lost_a_marker |= held == "marker"
            await self.world.evict(self.user)

    async def _pass(self, seconds: float) -> None:
        await self._forget({"lease"})
        if seconds > 10 and not self.writers and await self.world.cached(self.user) == "marker":
            await self.world.evict(self.user)
        await self.world.age(seconds)

    def teardown(self) -> None:
        if hasattr(self, "user"):
            self.run(self._come_to_rest())

    async def _come_to_rest(self) -> None:
        for replica in self.world.replicas:
            replica.link.cut = False
        try:
            # Whoever has the lock first; of the others the last first, which is the harder order.
            for writer in [
                *(writer for writer in self.writers if writer.locks),
                *(writer for writer in reversed(self.writers) if not writer.locks),
            ]:
                await self._go_on_writing(writer, "end")
            for read in list(self.reads):
                await self._go_on_reading(read, "end")
            await self.world.age(11)
            held = await self.world.cached(self.user)
            committed = await self.world.committed(self.user)
            if isinstance(held, int):
                if self.lost_a_marker:
                    assert held >= self.acknowledged, "older than acknowledged, at rest"
                else:
                    assert held == committed, f"cached {held}, committed {committed}"
            for replica in self.world.replicas:
                found = await replica.read(self.user)
                assert (GONE if found is None else found) >= self.acknowledged
        finally:
            for replica in self.world.replicas:
                await replica.crash()


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
            # Whether a read joins another must not hang on how long an example takes.
            with patch.object(documents, "FLIGHT_AGE", 60):
                yield Machine
        finally:
            runner.run(_left(opened))


async def _entered(manager: Any) -> World:
    world: World = await manager.__aenter__()
    return world


async def _left(manager: Any) -> None:
    await manager.__aexit__(None, None, None)


def search(settings: Settings, **how: Any) -> None:
    """Look for an order of things that goes wrong."""
    with a_machine(settings) as machine:
        run_machine(
            machine,
            settings=hypothesis.settings(
                deadline=None,
                database=None,
                stateful_step_count=25,
                suppress_health_check=list(HealthCheck),
                **how,
            ),
        )


def test_no_read_is_older_than_what_was_acknowledged_in_whatever_order(settings: Settings) -> None:
    search(settings, max_examples=35, derandomize=True, phases=(Phase.generate, Phase.shrink))
