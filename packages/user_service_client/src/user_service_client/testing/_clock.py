"""A clock that moves only when it is told to, so that no test waits."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import TypeVar

T = TypeVar("T")

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
TURNS = 25
"""Turns of the event loop that ready tasks get when the clock was moved."""


class Timer:
    """Something that is due at a time of the clock."""

    def __init__(self, when: float, fire: Callable[[], None]) -> None:
        self.when = when
        self.fire = fire
        self.cancelled = False

    def cancel(self) -> None:
        """Have it not happen."""
        self.cancelled = True


class VirtualClock:
    """The time of a `FakeUserService`, and of the clients that are given it as `clock=`.

    A client's waits between the attempts of a call move it on by themselves, since nobody else
    would. What waits in the background, such as a stream that is to be opened again, waits until
    the test says `await clock.advance(seconds)`.

    Args:
        start: The time at which it begins, with its offset.
    """

    def __init__(self, start: datetime = START) -> None:
        self._start = start.astimezone(UTC)
        self._elapsed = 0.0
        self._numbers = count()
        self._timers: list[tuple[float, int, Timer]] = []

    def monotonic(self) -> float:
        """Return the seconds since the clock began."""
        return self._elapsed

    def now(self) -> datetime:
        """Return the time, in UTC."""
        return self._start + timedelta(seconds=self._elapsed)

    async def sleep(self, seconds: float) -> None:
        """Move the clock on by `seconds`: for a call that waits in the foreground."""
        end = self._elapsed + max(0.0, seconds)
        while timer := self._due(end):
            timer.fire()
        self._elapsed = max(self._elapsed, end)
        await asyncio.sleep(0)

    async def pause(self, seconds: float) -> None:
        """Wait until somebody moved the clock on by `seconds`: for what waits in the background."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        over = asyncio.Event()
        timer = self.call_later(seconds, over.set)
        try:
            await over.wait()
        finally:
            timer.cancel()

    async def wait_for(self, awaitable: Awaitable[T], seconds: float) -> T:
        """Return what `awaitable` does.

        Raises:
            TimeoutError: the clock was moved on by `seconds` before that; it was cancelled then.
        """
        async with asyncio.timeout(None) as limit:
            timer = self.call_later(seconds, lambda: limit.reschedule(0.0))
            try:
                return await awaitable
            finally:
                timer.cancel()

    async def advance(self, seconds: float) -> None:
        """Move the clock on by `seconds`: what is due on the way happens in its order.

        `advance(0)` only lets the tasks run that can, such as a stream that reads an event.
        """
        end = self._elapsed + max(0.0, seconds)
        await _let_tasks_run()
        while timer := self._due(end):
            timer.fire()
            await _let_tasks_run()
        self._elapsed = max(self._elapsed, end)

    def call_later(self, seconds: float, fire: Callable[[], None]) -> Timer:
        """Have `fire` called when the clock was moved on by `seconds`."""
        timer = Timer(self._elapsed + seconds, fire)
        heapq.heappush(self._timers, (timer.when, next(self._numbers), timer))
        return timer

    def _due(self, end: float) -> Timer | None:
        """Take the first timer that is due up to `end`, and move the clock to its time."""
        while self._timers and (self._timers[0][2].cancelled or self._timers[0][0] <= end):
            timer = heapq.heappop(self._timers)[2]
            if not timer.cancelled:
                self._elapsed = max(self._elapsed, timer.when)
                return timer
        return None


async def _let_tasks_run() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)
