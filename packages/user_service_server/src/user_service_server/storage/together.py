"""Statements that many ask at once: all who do so in one turn of the event loop share one.

A statement costs the service 60 to 100 µs of CPU, and PostgreSQL as much, however few rows it is
of. Under load many writes are under way, each of another user, and what one of them waits for
others wait for, too: they come to ask in the same turn, and are answered in the same turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import asyncpg
import structlog

from ..logs import describe
from .direct import Direct, Fields
from .waiting import fail, tell

_log = structlog.get_logger()

MOST = 32
"""How many share a statement at most: all of them wait for the last row, and keep their locks."""

# By the one a statement takes itself back. The other may end one that keeps several rows while
# somebody deletes several; where each is done by itself nobody meets it.
_UNDONE = (asyncpg.DivisionByZeroError, asyncpg.DeadlockDetectedError)

Asked = Mapping[str, Any]
"""What a statement is asked, by the names of its parameters: the same of all who share it."""
_Waiting = list[tuple[Asked, "asyncio.Future[Fields | None]"]]


class Together:
    """Runs statements that begin with what is `asked`, on connections for single statements."""

    def __init__(
        self, connection: Callable[[], AbstractAsyncContextManager[asyncpg.Connection]]
    ) -> None:
        self._connection = connection
        self._waiting: dict[Direct, _Waiting] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    def fetch(self, statement: Direct, asked: Asked) -> asyncio.Future[Fields | None]:
        """Return the row that answers `asked`; None if there is none, or Postgres refused.

        What it refuses to one (a value that does not fit) is refused to all who share the
        statement, of which nothing is done then.

        Raises:
            Overloaded, DependencyUnavailable: as `Database.direct` does.
        """
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._set_out)
        future: asyncio.Future[Fields | None] = loop.create_future()
        self._waiting.setdefault(statement, []).append((asked, future))
        return future

    def _set_out(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for statement, those in waiting.items():
            for at in range(0, len(those), MOST):
                running = asyncio.create_task(self._run(statement, those[at : at + MOST]))
                self._under_way.add(running)
                running.add_done_callback(self._under_way.discard)

    async def _run(self, statement: Direct, waiting: _Waiting) -> None:
        try:
            rows = await self._ask(statement, [asked for asked, _ in waiting])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is for those who wait
            fail((future for _, future in waiting), error)
            return
        for n, (_, future) in enumerate(waiting, 1):
            tell((future,), rows.get(n))

    async def _ask(self, statement: Direct, asked: Sequence[Asked]) -> dict[int, Fields]:
        parameters = {name: [one[name] for one in asked] for name in asked[0]}
        try:
            async with self._connection() as connection:
                try:
                    rows = await statement.fetch(connection, parameters)
                except _UNDONE:
                    return {}
        except asyncpg.PostgresError as error:
            _log.warning("postgres.refused", **describe(error))
            return {}
        return {row["n"]: row for row in rows}

    async def close(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*self._under_way)
