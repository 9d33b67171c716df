"""What is cleared away in the background: old changes, recorded answers and devices."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Awaitable, Callable, Mapping

import structlog

from .errors import DependencyUnavailable, Overloaded
from .periodic import Periodic

INTERVAL = 60.0
"""Seconds between two runs, spread so that the processes take turns."""

_log = structlog.get_logger()

Job = Callable[[], Awaitable[int]]
"""Clears away one batch, and returns how much that was: none, when it is done."""


class Upkeep:
    """Runs jobs every minute, batch by batch, so that none holds locks for long."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self._jobs = jobs
        self._running = Periodic("upkeep", self._run, _interval)

    def start(self) -> None:
        """Begin; the first run is soon."""
        self._running.start()

    async def _run(self) -> None:
        for name, job in self._jobs.items():
            with contextlib.suppress(DependencyUnavailable, Overloaded):
                await self._finish(name, job)

    async def _finish(self, name: str, job: Job) -> None:
        cleared = 0
        while not self._running.stopping and (batch := await job()):
            cleared += batch
        if cleared:
            _log.info("upkeep.cleared", job=name, rows=cleared)

    async def close(self) -> None:
        """Stop."""
        await self._running.stop()


def _interval() -> float:
    return INTERVAL * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
