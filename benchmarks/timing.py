"""Owns how time is taken: cases in turn, so that what disturbs one disturbs all, and medians."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from statistics import median
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias


class Spent(NamedTuple):
    """Seconds on the wall's clock, and of CPU time of this process."""

    wall: float
    cpu: float


Case: TypeAlias = Callable[[], Awaitable[Spent]]


class Stopwatch:
    """Takes the time of a block."""

    def __enter__(self) -> Self:
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._spent = Spent(wall, cpu)

    def per(self, calls: int) -> Spent:
        """Return the time of one of so many calls."""
        return Spent(self._spent.wall / calls, self._spent.cpu / calls)


async def medians(rounds: int, **cases: Case) -> dict[str, Spent]:
    """Run all cases in turn, so many times, and return the median of each.

    A tenth more comes before, and does not count: connections are opened, and caches filled.
    """
    spent: dict[str, list[Spent]] = {name: [] for name in cases}
    for number in range(-max(1, rounds // 10), rounds):
        for name, case in cases.items():
            once = await case()
            if number >= 0:
                spent[name].append(once)
    return {
        name: Spent(median(one.wall for one in some), median(one.cpu for one in some))
        for name, some in spent.items()
    }
