"""A clock that only moves when a client sleeps, or a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

T = TypeVar("T")


class VirtualClock:
    """Implements `user_service_client.Clock`: a sleep takes no time, and is kept.

    Attributes:
        slept: The seconds of each sleep between two attempts.
    """

    def __init__(self) -> None:
        self._time = 1000.0
        self.slept: list[float] = []

    def advance(self, seconds: float) -> None:
        self._time += seconds

    def monotonic(self) -> float:
        return self._time

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self._time)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await self.pause(seconds)

    async def pause(self, seconds: float) -> None:
        self.advance(seconds)
        await asyncio.sleep(0)

    async def wait_for(self, awaitable: Awaitable[T], seconds: float) -> T:
        async with asyncio.timeout(seconds):
            return await awaitable
