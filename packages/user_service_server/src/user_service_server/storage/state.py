"""The row that all servers of one database share: the epoch and the generation of what is cached.

And which servers of Redis were seen, and the schema that all stand on.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, replace

import structlog
from sqlalchemy import func, select, text, update

from ..errors import DependencyUnavailable, Overloaded
from ..logs import describe
from ..metrics import Metrics
from ..periodic import Periodic
from ..settings import Settings
from .database import Database, connected, create_engine, translated
from .tables import REVISION, service_state

POLL_INTERVAL = 0.5
"""Seconds between two looks at the row: how long a process may not know of a new epoch."""
POLL_TIMEOUT = 1.0
QUIET = 10.0
"""Seconds after a raise of the generation in which nothing is filled: longer than a write that
announced itself before may still take (`database.TRANSACTION_TIMEOUT`)."""

_log = structlog.get_logger()

_STATE = select(
    service_state.c.epoch,
    service_state.c.generation,
    func.extract("epoch", func.clock_timestamp() - service_state.c.raised_at).label("raised_ago"),
)
# A server of Redis that was never seen: what it holds may be of any time. The very first one holds
# nothing of this epoch.
_RECOGNISE = text("""
    UPDATE service_state
    SET generation = generation + CASE WHEN redis_servers = '{}' THEN 0 ELSE 1 END,
        raised_at = CASE WHEN redis_servers = '{}' THEN raised_at ELSE clock_timestamp() END,
        redis_servers = (array_prepend(CAST(:server AS text), redis_servers))[1:100]
    WHERE NOT CAST(:server AS text) = ANY (redis_servers)
    RETURNING generation
""")
_RAISE = text("""
    UPDATE service_state SET generation = generation + 1, raised_at = clock_timestamp()
    WHERE generation = :generation
""")
# Before the migrations that this release needs, there is nothing to read, and asking for it would
# be an error in the log of Postgres twice a second.
_IS_MIGRATED = text("SELECT to_regclass('alembic_version') IS NOT NULL")
_REVISION = text("SELECT version_num FROM alembic_version")


def _new_epoch() -> str:
    """Return a new epoch: short, since it is part of every key and ETag."""
    return secrets.token_hex(4)


async def read_epoch(settings: Settings) -> str:
    """Return the epoch of the settings' database."""
    async with connected(settings) as connection:
        found = await connection.execute(select(service_state.c.epoch))
        return str(found.scalar_one())


async def renew_epoch(settings: Settings) -> str:
    """Give the database a new epoch and return it: nothing that was cached before is believed."""
    epoch = _new_epoch()
    async with connected(settings) as connection:
        # With the generation, since writes under way have announced themselves under the old
        # epoch: until they have ended, nothing is cached.
        await connection.execute(
            update(service_state).values(
                epoch=epoch,
                generation=service_state.c.generation + 1,
                raised_at=func.clock_timestamp(),
            )
        )
        await connection.commit()
    return epoch


@dataclass(frozen=True, slots=True)
class SharedState:
    """What was read at the last look, and the time until which nothing is cached."""

    epoch: str = ""
    generation: int = 0
    revision: str | None = None
    quiet_until: float = 0.0

    @property
    def schema_is_known(self) -> bool:
        """Whether the schema has what this release needs; a newer one has it, too."""
        return self.revision is not None and self.revision >= REVISION


class StateWatcher:
    """Looks at the shared row twice a second, and so also knows whether Postgres is there.

    It has connections of its own: a pool that is busy must not make Postgres look gone.
    """

    def __init__(self, settings: Settings, database: Database, metrics: Metrics) -> None:
        self._engine = create_engine(settings, pool_size=2).execution_options(
            isolation_level="AUTOCOMMIT"
        )
        self._database = database
        self._raised = metrics.generation_raised
        self._watch = Periodic("state-watcher", self.look, lambda: POLL_INTERVAL)
        self._looking: asyncio.Task[None] | None = None
        self._current = SharedState()
        self.latency: float | None = None

    @property
    def epoch(self) -> str:
        """The epoch under which documents are cached and tagged."""
        return self._current.epoch

    @property
    def generation(self) -> int:
        """The generation under which documents are cached."""
        return self._current.generation

    @property
    def quiet(self) -> bool:
        """Whether nothing may be filled, since the generation was raised just now."""
        return time.monotonic() < self._current.quiet_until

    async def start(self, patience: float) -> None:
        """Wait up to `patience` seconds for Postgres and its schema, then watch on.

        Raises:
            DependencyUnavailable: Postgres did not come, or nobody migrated it.
        """
        deadline = time.monotonic() + patience
        told = ""
        while True:
            await self.look()
            if self._database.reachable and self._current.schema_is_known:
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
        self._watch.start()

    async def look(self) -> None:
        """Look at the row; looks at the same time are one, so that none brings an old state back.

        A row that cannot be read leaves the last state, and says that Postgres is gone.
        """
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="state-look")
        await asyncio.shield(self._looking)

    async def _look(self) -> None:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                await self._read()
            self.latency = time.perf_counter() - began
            reachable = True
        except Exception as error:  # noqa: BLE001 - whatever it is, the watch must go on
            if not isinstance(error, DependencyUnavailable | Overloaded | TimeoutError):
                _log.error("postgres.refuses", **describe(error))
            self.latency = None
            reachable = False
        if reachable != self._database.reachable:
            self._database.reachable = reachable
            _log.warning("postgres.reachable" if reachable else "postgres.unreachable")

    async def _read(self) -> None:
        with translated():
            async with self._engine.connect() as connection:
                revision = None
                if await connection.scalar(_IS_MIGRATED):
                    revision = await connection.scalar(_REVISION)
                if revision is None or revision < REVISION:
                    self._current = SharedState(revision=revision)
                    return
                row = (await connection.execute(_STATE)).one()
        if row.epoch == self.epoch and row.generation < self.generation:
            return  # read before a raise that this process has adopted meanwhile
        # By Postgres' clock for a process that starts, and for one that goes on by its own: a step
        # of Postgres' clock must not end the quiet time.
        known = (row.epoch, row.generation) == (self.epoch, self.generation)
        learnt = self._current.quiet_until if known else time.monotonic() + QUIET
        raised = time.monotonic() + QUIET - float(row.raised_ago)
        self._current = SharedState(
            epoch=row.epoch,
            generation=row.generation,
            revision=revision,
            quiet_until=learnt if self.epoch else raised,
        )

    def adopt(self, generation: int, reason: str) -> None:
        """Take over a generation that was read or raised in a transaction of this process."""
        if generation <= self.generation:
            return
        self._raised.labels(reason).inc()
        _log.warning("cache.generation", generation=generation, reason=reason)
        self._current = replace(
            self._current, generation=generation, quiet_until=time.monotonic() + QUIET
        )

    async def recognise(self, server: str) -> None:
        """Make a server of Redis known; what one that is new to all may hold is left behind.

        Raises:
            OSError: Postgres cannot be reached, so nobody can tell.
        """
        try:
            with translated():
                async with self._engine.connect() as connection:
                    raised = await connection.scalar(_RECOGNISE, {"server": server})
        except (DependencyUnavailable, Overloaded) as error:
            raise ConnectionError from error
        if raised is None:
            await self.look()
        else:
            self.adopt(raised, "redis_changed")

    async def leave_behind(self, generation: int, reason: str) -> None:
        """Raise the generation above `generation`, if nobody has: what is cached is not believed.

        Raises:
            DependencyUnavailable, Overloaded
        """
        with translated():
            async with self._engine.connect() as connection:
                await connection.execute(_RAISE, {"generation": generation})
        self.adopt(generation + 1, reason)

    async def close(self) -> None:
        """Stop watching."""
        await self._watch.stop()
        if self._looking is not None:
            await self._looking
        await self._engine.dispose()
