"""Hears of the statements that go past SQLAlchemy, whose events tell nothing of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from user_service_server.storage.direct import Direct, Fields

Hook = Callable[[str, Any], Awaitable[None]]
"""Is given the text of a statement, and asyncpg's connection."""


def in_background() -> bool:
    """The state is looked at and the change feed is read, whatever a test does."""
    task = asyncio.current_task()
    return task is not None and task.get_name() in {"state-look", "change-feed"}


async def nothing(_text: str, _connection: Any) -> None:
    """Does nothing."""


@contextmanager
def around_direct(before: Hook = nothing, after: Hook = nothing) -> Iterator[None]:
    """Call `before` and `after` each statement that asyncpg runs itself for a request."""
    fetch = Direct.fetch

    async def heard(self: Direct, connection: Any, parameters: Mapping[str, Any]) -> list[Fields]:
        if in_background():
            return await fetch(self, connection, parameters)
        await before(self.text, connection)
        rows = await fetch(self, connection, parameters)
        await after(self.text, connection)
        return rows

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Direct, "fetch", heard)
        yield
