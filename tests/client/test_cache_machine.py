"""The cache under whatever order of reads, writes, events, lags and losses hypothesis finds.

Two servers, of which one lags, a stream whose events are late but in their order, and a virtual
clock. No read returns a version below one that was heard of before it began, and none that is older
than the table of ages (client.md) allows.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from user_service_client import NotFound, User, UserServiceClient, UserServiceError
from user_service_client._cache import CachedUser, Nobody, Use, Wish
from user_service_client._calls import CallOptions
from user_service_client.testing import VirtualClock

from .replicas import LAG, Fact, Pending, Replicas

USERS = [f"01a205c7-a743-7a16-a135-{number:012x}" for number in range(3)]
USER = st.sampled_from(USERS)
NUMBERS = st.integers(0, 3)
SERVERS = st.sampled_from((0, 1))
AT_ONCE = 4
FLIGHT = 2.0
"""Seconds that a request is under way at most, and so how much older what one joins may be."""
FRESH, MAX_STALE, UNKNOWN = 30.0, 300.0, 5.0


@dataclass
class Read:
    """A read under way."""

    task: asyncio.Task[dict[str, User | None]]
    use: Use
    began: float
    heard: dict[str, int]
    """The number of the last fact that was heard of, by user, when it began."""
    saw_outage: bool


@dataclass
class Write:
    """A write under way."""

    user: str
    task: asyncio.Task[User | None]


class ClientMachine(RuleBasedStateMachine):
    """One client of two servers."""

    live = False

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.reads: list[Read] = []
        self.writes: list[Write] = []
        self.heard: dict[str, int] = dict.fromkeys(USERS, -1)
        self.run(self._begin())

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.runner.run(coroutine)

    async def _begin(self) -> None:
        self.clock = VirtualClock()
        self.replicas = Replicas(self.clock, USERS)
        for user in USERS[:2]:
            self.replicas.commit(user)
        self.client = UserServiceClient(
            "http://users.test",
            transport=self.replicas,
            clock=self.clock,
            timeout=10_000,
            attempt_timeout=600,
            live=self.live,
        )
        await self.client.__aenter__()
        await self._pass(3)

    async def _go_on(self) -> None:
        await self.clock.advance(0)
        for read in list(self.reads):
            read.saw_outage |= self.replicas.is_down
            if read.task.done():
                self.reads.remove(read)
                self._judge(read)
        for write in list(self.writes):
            if write.task.done():
                self.writes.remove(write)
                self._learn(write)

    def _judge(self, read: Read) -> None:
        if isinstance(read.task.exception(), UserServiceError):
            return  # that is always allowed
        for user, document in read.task.result().items():
            fact: Fact | None = None
            if document is not None:
                fact = self.replicas.fact(user, document.name, document.version)
            gone = [f for f in self.replicas.facts if f.user == user and f.is_gone]
            # That nobody has the id is either not true yet, or not any more.
            options = [fact] if fact else [None, *gone]
            number = max((-1 if one is None else one.number) for one in options)
            assert number >= read.heard[user], f"{fact} after {read.heard[user]} was heard of"
            ended = max(self.replicas.ended_at(user, one) for one in options)
            allowed = self._allowed(read, document)
            age = read.began - ended
            assert age <= allowed, f"{read.use}: {fact} ended {age} s before; {allowed} are allowed"

    def _allowed(self, read: Read, document: User | None) -> float:
        """Return for how long what was returned may have been untrue when the read began."""
        if document is None:
            return UNKNOWN + LAG + FLIGHT
        if read.use is Use.CRITICAL:
            return LAG
        if read.use is Use.READ or read.saw_outage:
            return MAX_STALE + LAG + FLIGHT
        return FRESH + LAG + FLIGHT

    def _learn(self, write: Write) -> None:
        if write.task.exception() is None:
            document = write.task.result()
            if document is None:
                number = max(f.number for f in self.replicas.facts if f.user == write.user)
            else:
                number = self.replicas.fact(write.user, document.name, document.version).number
            self.heard[write.user] = max(self.heard[write.user], number)

    # Reads and writes

    @precondition(lambda self: len(self.reads) < AT_ONCE)
    @rule(user=USER, use=st.sampled_from((Use.READ, Use.READ, Use.DECISION, Use.CRITICAL)))
    def read(self, user: str, use: Use) -> None:
        async def reading() -> dict[str, User | None]:
            documents = self.client._documents
            try:
                copy = await documents.read(user, self._wish(use))
            except NotFound:
                return {user: None}
            return {user: copy.user}

        self.run(self._begin_reading(reading, use))

    @precondition(lambda self: len(self.reads) < AT_ONCE)
    @rule(use=st.sampled_from((Use.READ, Use.DECISION)))
    def read_many(self, use: Use) -> None:
        async def reading() -> dict[str, User | None]:
            found = await self.client._documents.read_many(USERS, self._wish(use))
            return {user: _user(copy) for user, copy in found.items()}

        self.run(self._begin_reading(reading, use))

    @rule(user=USER, server=SERVERS)
    def is_read(self, user: str, server: int) -> None:
        """One read from its beginning to its end: most of the others need a copy."""
        self.read(user, Use.READ)
        if self.replicas.pending:
            self.run(self._arrive(-1, server))

    @rule(user=USER)
    def hit(self, user: str) -> None:
        """What `users.get` returns without asking."""
        copy = self.client._documents.hit(user)
        if copy is not None:
            self.run(self._judge_hit(user, copy))

    async def _judge_hit(self, user: str, copy: User) -> None:
        async def hit() -> dict[str, User | None]:
            return {user: copy}

        # It is fresh: so it would do for a decision.
        await self._begin_reading(hit, Use.DECISION)

    def _wish(self, use: Use) -> Wish:
        return Wish(use, self.client._calls.deadline(None), None, CallOptions())

    async def _begin_reading(
        self, reading: Callable[[], Coroutine[Any, Any, dict[str, User | None]]], use: Use
    ) -> None:
        task = asyncio.create_task(reading())
        began, down = self.clock.monotonic(), self.replicas.is_down
        self.reads.append(Read(task, use, began, dict(self.heard), down))
        await self._go_on()

    @precondition(lambda self: len(self.writes) < 2)
    @rule(user=USER, erase=st.sampled_from((False, False, False, True)))
    def write(self, user: str, erase: bool) -> None:
        async def writing() -> User | None:
            if erase:
                await self.client.users.delete(user)
                return None
            return await self.client.users.update(user, name="New")

        self.run(self._begin_writing(user, writing))

    async def _begin_writing(
        self, user: str, writing: Callable[[], Coroutine[Any, Any, User | None]]
    ) -> None:
        if self.replicas.now[user] is not None:
            self.writes.append(Write(user, asyncio.create_task(writing())))
            await self._go_on()

    @rule(user=USER)
    def another_writes(self, user: str) -> None:
        self.run(self._another_writes(user, erase=False))

    @rule(user=USER)
    def another_erases(self, user: str) -> None:
        self.run(self._another_writes(user, erase=True))

    async def _another_writes(self, user: str, *, erase: bool) -> None:
        self.replicas.commit(user, erase=erase)

    # The network

    @precondition(lambda self: self.replicas.pending)
    @rule(number=NUMBERS, server=SERVERS)
    def answer(self, number: int, server: int) -> None:
        self.run(self._answer(number, server))

    async def _answer(self, number: int, server: int) -> None:
        pending = self._pending(number)
        if pending.answer is None:
            self.replicas.answer(pending, server)

    @precondition(lambda self: self.replicas.pending)
    @rule(number=NUMBERS, server=SERVERS)
    def arrive(self, number: int, server: int) -> None:
        self.run(self._arrive(number, server))

    async def _arrive(self, number: int, server: int) -> None:
        await self._answer(number, server)
        self.replicas.deliver(self._pending(number))
        await self._go_on()

    @precondition(lambda self: self.replicas.pending)
    @rule(number=NUMBERS)
    def drop(self, number: int) -> None:
        self.run(self._drop(number))

    async def _drop(self, number: int) -> None:
        self.replicas.drop(self._pending(number))
        await self._go_on()

    def _pending(self, number: int) -> Pending:
        return self.replicas.pending[number % len(self.replicas.pending)]

    @rule(count=st.integers(1, 3), heartbeat=st.booleans())
    def events(self, count: int, heartbeat: bool) -> None:
        self.run(self._events(count, heartbeat))

    async def _events(self, count: int, heartbeat: bool) -> None:
        sent = self.replicas.send_events(count)
        if heartbeat:
            self.replicas.send_heartbeat()
        await self._go_on()
        for fact in sent:
            self.heard[fact.user] = max(self.heard[fact.user], fact.number)

    # What goes wrong, and time

    @rule(
        what=st.sampled_from(("cut", "prune", "epoch", "down", "up", "up", "invalidate", "clear"))
    )
    def trouble(self, what: str) -> None:
        self.run(self._trouble(what))

    async def _trouble(self, what: str) -> None:
        match what:
            case "cut":
                self.replicas.cut()
            case "prune":
                self.replicas.pruned = len(self.replicas.log)
            case "epoch":
                self.replicas.renew(1)
            case "down":
                self.replicas.is_down = True
                self.replicas.cut()
                for pending in list(self.replicas.pending):
                    self.replicas.drop(pending)
            case "up":
                self.replicas.is_down = False
            case "invalidate":
                self.client.cache.invalidate(USERS[0])
            case "clear":
                self.client.cache.clear()
        await self._go_on()

    @rule(seconds=st.sampled_from((0.4, 1.0, 2.5, 10.0, 31.0, 100.0, 301.0)))
    def time_passes(self, seconds: float) -> None:
        oldest = min((pending.at for pending in self.replicas.pending), default=math.inf)
        if self.clock.monotonic() + seconds - oldest <= FLIGHT:
            self.run(self._pass(seconds))

    @precondition(lambda self: not self.replicas.pending)
    @rule(beats=st.sampled_from((3, 3, 7, 22)))
    def time_passes_while_the_heart_beats(self, beats: int) -> None:
        for _ in range(beats):
            self.run(self._pass(15))
            self.run(self._events(0, heartbeat=True))

    async def _pass(self, seconds: float) -> None:
        await self.clock.advance(seconds)
        self.replicas.time_has_passed()
        await self._go_on()

    def teardown(self) -> None:
        try:
            self.run(self._end())
        finally:
            self.runner.close()

    async def _end(self) -> None:
        for _ in range(100):
            if not self.replicas.pending:
                break
            await self._arrive(0, 0)
        await self.client.aclose()
        self.replicas.cut()
        await self._go_on()
        for write in self.writes:
            write.task.cancel()
        await self.clock.advance(0)


def _user(copy: CachedUser | Nobody) -> User | None:
    return None if isinstance(copy, Nobody) else copy.user


class LiveMachine(ClientMachine):
    """One live client of two servers."""

    live = True


def search(machine: type[ClientMachine], **how: Any) -> None:
    """Look for an order of things that goes wrong."""
    run_machine(
        machine,
        settings=hypothesis.settings(
            deadline=None,
            database=None,
            stateful_step_count=40,
            suppress_health_check=list(HealthCheck),
            **how,
        ),
    )


SHORT: dict[str, Any] = {
    "max_examples": 40,
    "derandomize": True,
    "phases": (Phase.generate, Phase.shrink),
}


def test_no_read_is_older_than_heard_of_or_allowed_in_whatever_order() -> None:
    search(ClientMachine, **SHORT)


def test_no_read_of_a_live_client_is_older_than_heard_of_or_allowed_in_whatever_order() -> None:
    search(LiveMachine, **SHORT)
