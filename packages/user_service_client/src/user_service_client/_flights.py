"""Requests that are under way: concurrent reads of one user share one.

A request is a task of its own: whoever waits for it may be cancelled, and it goes on, since others
may have joined, and what comes is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Generic, TypeVar

from user_service_client.errors import NotSent

T = TypeVar("T")


class Flight(Generic[T]):
    """A request for one user or many.

    Attributes:
        ids: Whom it asks for.
        deadline: When it ends at the latest, by the client's clock.
        wanted_until: The latest deadline of those who wait for it.
        over: Whether it has ended, which can be waited for.
        found: What it has brought, if there is no `error`.
        error: What it has failed with.
    """

    __slots__ = ("deadline", "error", "found", "ids", "over", "task", "wanted_until")

    found: T
    task: asyncio.Task[None]

    def __init__(self, ids: Sequence[str], deadline: float) -> None:
        self.ids = ids
        self.deadline = self.wanted_until = deadline
        self.over = asyncio.Event()
        # Unless it says otherwise: it may be cancelled, by `aclose` alone, before it has begun.
        self.error: Exception | None = NotSent("the client was closed")


class Flights(Generic[T]):
    """All requests that are under way, and which of them is to be joined for a user."""

    def __init__(self) -> None:
        self._by_user: dict[str, Flight[T]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __contains__(self, user_id: str) -> bool:
        return user_id in self._by_user

    def joinable(self, user_id: str) -> Flight[T] | None:
        """Return the request that will tell of a user."""
        flight = self._by_user.get(user_id)
        # What has ended, and was not tidied up yet, may be older than what was heard of since.
        return None if flight is None or flight.over.is_set() else flight

    def depart(
        self,
        deadline: float,
        ids: Sequence[str],
        request: Callable[[Flight[T]], Awaitable[T]],
        *,
        is_shared: bool,
    ) -> Flight[T]:
        """Begin a request, which others may join if it `is_shared`."""
        flight: Flight[T] = Flight(ids, deadline)
        if is_shared:
            self._by_user |= dict.fromkeys(ids, flight)
        task = asyncio.create_task(self._fly(flight, request), name="user-service-fetch")
        flight.task = task
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, flight))
        return flight

    async def _fly(self, flight: Flight[T], request: Callable[[Flight[T]], Awaitable[T]]) -> None:
        try:
            flight.found = await request(flight)
        except Exception as error:  # noqa: BLE001 - raised by those who wait for it
            flight.error = error
        else:
            flight.error = None
        # Here, and not only when the task has ended: so who waits wakes a turn of the loop sooner.
        self._end(flight)

    def _ended(self, flight: Flight[T], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not flight.over.is_set():  # it was cancelled
            self._end(flight)

    def _end(self, flight: Flight[T]) -> None:
        self.landed(flight.ids, flight)
        flight.over.set()

    def landed(self, ids: Sequence[str], flight: Flight[T]) -> None:
        """Let nobody join a request any more, of these users."""
        for user_id in ids:
            if self._by_user.get(user_id) is flight:
                del self._by_user[user_id]

    def part_from(self, user_id: str) -> None:
        """Let nobody join what is under way for a user."""
        self._by_user.pop(user_id, None)

    def part_from_all(self) -> None:
        """Let nobody join anything that is under way."""
        self._by_user.clear()

    def let_go(self) -> None:
        """Forget requests of an event loop that is over."""
        self._by_user.clear()
        self._tasks.clear()

    async def aclose(self) -> None:
        """End what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_over(flights: Iterable[Flight[T]]) -> None:
    """Wait until all have ended."""
    for flight in flights:
        await flight.over.wait()
