"""A deadline for all calls of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ends_at: ContextVar[float | None] = ContextVar("user_service_deadline", default=None)


@contextmanager
def deadline_scope(seconds: float) -> Iterator[None]:
    """Give all calls made inside, in this task and those it starts, one deadline.

    A call's own `timeout` can only make it shorter; of nested scopes, the first to end holds.

        with deadline_scope(1.5):
            user = await client.users.get(user_id)
            await client.devices.register(user.id, token=token, platform="ios")

    Args:
        seconds: From now.
    """
    ends_at = time.monotonic() + seconds
    outer = _ends_at.get()
    token = _ends_at.set(ends_at if outer is None else min(outer, ends_at))
    try:
        yield
    finally:
        _ends_at.reset(token)


def seconds_left_in_scope() -> float | None:
    """Return what is left of the scope, or None outside of one."""
    ends_at = _ends_at.get()
    return None if ends_at is None else ends_at - time.monotonic()
