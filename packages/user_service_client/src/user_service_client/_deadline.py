"""A deadline for all calls of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class _Scope:
    """A deadline by every clock that asks: it began now, by any other clock when that first asks.

    A clock other than the machine's is one that only tests move, and not between the two.
    """

    __slots__ = ("_ends", "_outer", "_seconds")

    def __init__(self, seconds: float, outer: _Scope | None) -> None:
        self._seconds = seconds
        self._outer = outer
        self._ends = {time.monotonic: time.monotonic() + seconds}

    def left(self, monotonic: Callable[[], float]) -> float:
        """Return the seconds that are left, of the scopes around it, too."""
        now = monotonic()
        left = self._ends.setdefault(monotonic, now + self._seconds) - now
        return left if self._outer is None else min(left, self._outer.left(monotonic))


_scope: ContextVar[_Scope | None] = ContextVar("user_service_deadline", default=None)


@contextmanager
def deadline_scope(seconds: float) -> Iterator[None]:
    """Give all calls made inside, in this task and those it starts, one deadline.

    A call's own `timeout` can only make it shorter; of nested scopes, the first to end holds.

        with deadline_scope(1.5):
            user = await client.users.get(user_id)
            await client.devices.register(user.id, token=token, platform="ios")

    Time is that of each client's clock. By a clock that a test moves, the scope begins with the
    first call inside.

    Args:
        seconds: From now.
    """
    token = _scope.set(_Scope(seconds, _scope.get()))
    try:
        yield
    finally:
        _scope.reset(token)


def seconds_left_in_scope(monotonic: Callable[[], float]) -> float | None:
    """Return what is left of the scope by a client's clock, or None outside of one."""
    scope = _scope.get()
    return None if scope is None else scope.left(monotonic)
