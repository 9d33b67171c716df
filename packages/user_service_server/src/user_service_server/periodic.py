"""What is done again and again beside the requests, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from .logs import describe

_log = structlog.get_logger()


class Periodic:
    """Runs a function every `interval()` seconds until it is stopped.

    Stopping waits for a run that is under way: cancelled in the middle of a statement, a connection
    to Postgres would be left behind.
    """

    def __init__(
        self, name: str, work: Callable[[], Awaitable[None]], interval: Callable[[], float]
    ) -> None:
        self._name = name
        self._work = work
        self._interval = interval
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; the first run is after an interval."""
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def _run(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._interval())
                return
            try:
                await self._work()
            except Exception as error:  # noqa: BLE001 - what ended here would end in silence
                _log.error("periodic.failed", work=self._name, **describe(error))

    @property
    def stopping(self) -> bool:
        """Whether what is long should come to its end."""
        return self._stopping.is_set()

    async def stop(self) -> None:
        """End after the run that is under way."""
        self._stopping.set()
        if self._task is not None:
            await self._task
