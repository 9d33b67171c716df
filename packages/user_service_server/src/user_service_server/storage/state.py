"""The row that all servers of one database share: the epoch, and the schema they stand on."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass

import structlog
from sqlalchemy import Text, column, select, table, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ..errors import DependencyUnavailable, Overloaded
from ..settings import Settings
from .database import Database, create_engine, translated
from .tables import REVISION, service_state

POLL_INTERVAL = 0.5
"""Seconds between two looks at the row: how long a process may not know of a new epoch."""
POLL_TIMEOUT = 1.0

_log = structlog.get_logger()

_alembic_version = table("alembic_version", column("version_num", Text))
_STATE = select(
    select(service_state.c.epoch).scalar_subquery().label("epoch"),
    select(_alembic_version.c.version_num).scalar_subquery().label("revision"),
)
# Before the first migration there is nothing to read, and asking for it would be an error in the
# log of Postgres twice a second.
_HAS_STATE = text("SELECT to_regclass('service_state') IS NOT NULL")


def _new_epoch() -> str:
    """Return a new epoch: short, since it is part of every key and ETag."""
    return secrets.token_hex(4)


async def read_epoch(settings: Settings) -> str:
    """Return the epoch of the settings' database."""
    engine = create_engine(settings, pool_size=1)
    try:
        with translated():
            async with engine.connect() as connection:
                return await _epoch(connection)
    finally:
        await engine.dispose()


async def _epoch(connection: AsyncConnection) -> str:
    found = await connection.execute(select(service_state.c.epoch))
    return str(found.scalar_one())


async def renew_epoch(settings: Settings) -> str:
    """Give the database a new epoch and return it: nothing that was cached before is believed."""
    engine = create_engine(settings, pool_size=1)
    try:
        with translated():
            async with engine.begin() as connection:
                epoch = _new_epoch()
                await connection.execute(update(service_state).values(epoch=epoch))
                return epoch
    finally:
        await engine.dispose()


@dataclass(frozen=True, slots=True)
class SharedState:
    """What was read at the last look."""

    epoch: str
    revision: str | None

    @property
    def schema_is_known(self) -> bool:
        """Whether the schema has what this release needs; a newer one has it, too."""
        return self.revision is not None and self.revision >= REVISION


class StateWatcher:
    """Looks at the shared row twice a second, and so also knows whether Postgres is there.

    It has a connection of its own: a pool that is busy must not make Postgres look gone.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self._engine = create_engine(settings, pool_size=1).execution_options(
            isolation_level="AUTOCOMMIT"
        )
        self._database = database
        self._task: asyncio.Task[None] | None = None
        self.current = SharedState(epoch="", revision=None)
        self.latency: float | None = None

    @property
    def epoch(self) -> str:
        """The epoch under which documents are cached and tagged."""
        return self.current.epoch

    async def start(self, patience: float) -> None:
        """Wait up to `patience` seconds for Postgres and its schema, then watch on.

        Raises:
            DependencyUnavailable: Postgres did not come, or nobody migrated it.
        """
        deadline = time.monotonic() + patience
        told = ""
        while True:
            await self.look()
            if self._database.reachable and self.current.schema_is_known:
                break
            missing = (
                f"its schema {REVISION} (run: user-service migrate)"
                if self._database.reachable
                else "an answer of Postgres (DATABASE_URL)"
            )
            if time.monotonic() > deadline:
                _log.error("postgres.missing", waited_for=missing, seconds=patience)
                raise DependencyUnavailable
            if missing != told:
                _log.warning("postgres.waiting", waiting_for=missing, up_to_seconds=patience)
                told = missing
            await asyncio.sleep(POLL_INTERVAL)
        self._task = asyncio.create_task(self._watch(), name="state-watcher")

    async def look(self) -> None:
        """Read the row once; what cannot be read leaves the last state and says so."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                self.current = await self._read()
            self.latency = time.perf_counter() - began
            reachable = True
        except (DependencyUnavailable, Overloaded, TimeoutError):
            self.latency = None
            reachable = False
        if reachable != self._database.reachable:
            self._database.reachable = reachable
            _log.warning("postgres.reachable" if reachable else "postgres.unreachable")

    async def _read(self) -> SharedState:
        with translated():
            async with self._engine.connect() as connection:
                if not await connection.scalar(_HAS_STATE):
                    return SharedState(epoch="", revision=None)
                row = (await connection.execute(_STATE)).one()
                return SharedState(epoch=row.epoch, revision=row.revision)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL)
            await self.look()

    async def close(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._engine.dispose()
