"""The clock that a client lives by, which the testing kit replaces by one that tests move."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    """Time as a client sees it."""

    def monotonic(self) -> float:
        """Return seconds that never go back."""

    def now(self) -> datetime:
        """Return the time of day, in UTC."""

    async def sleep(self, seconds: float) -> None:
        """Wait between two attempts of a call."""

    async def pause(self, seconds: float) -> None:
        """Wait in the background, between two connections of the stream."""

    async def wait_for(self, awaitable: Awaitable[T], seconds: float) -> T:
        """Await for at most `seconds`; raises `TimeoutError`."""


class SystemClock:
    """The machine's clocks."""

    # The function itself and no method around it: every read of a cached document asks it.
    monotonic = staticmethod(time.monotonic)

    def now(self) -> datetime:
        """Return the time of day, in UTC."""
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    async def pause(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    async def wait_for(self, awaitable: Awaitable[T], seconds: float) -> T:
        """Await for at most `seconds`; raises `TimeoutError`."""
        async with asyncio.timeout(seconds):
            return await awaitable
