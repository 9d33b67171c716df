"""The connections to Postgres: how they are made, and what their failures mean to a caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import asyncpg
import msgspec
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, PoolProxiedConnection

from ..errors import DependencyUnavailable, Overloaded, ServiceError
from ..settings import Settings, database_engine_arguments
from .together import Together

TRANSACTION_TIMEOUT = 8.0
"""Seconds a write may take from its announcement to its commit: less than a marker lives."""

COMMAND_TIMEOUT = 5.0
"""Seconds that Postgres may take for a statement, or a commit."""

CONNECT_TIMEOUT = 2.0
"""Seconds that a connection may take to be made."""

_SESSION = {"application_name": "user-service", "timezone": "UTC"}
_TIMEOUTS = {
    "statement_timeout": "5s",
    "lock_timeout": "3s",
    "idle_in_transaction_session_timeout": "5s",
}

# What Postgres says when it is there and cannot take this statement now.
_BUSY = (
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    asyncpg.QueryCanceledError,
    asyncpg.TooManyConnectionsError,
    asyncpg.OutOfMemoryError,
)
# What it says, or what is heard instead, when it is not there.
_GONE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.OperatorInterventionError,
    asyncpg.InternalClientError,
    asyncpg.ReadOnlySQLTransactionError,  # a standby: the primary is another, or none yet
)


async def driver(connection: AsyncConnection) -> asyncpg.Connection:
    """Return asyncpg's own connection under one of SQLAlchemy, in its transaction.

    A transaction begins with the first statement that goes through SQLAlchemy, and no sooner.
    """
    return (await connection.get_raw_connection()).driver_connection


@asynccontextmanager
async def checked_out(engine: AsyncEngine) -> AsyncIterator[asyncpg.Connection]:
    """Give asyncpg's own connection, for single statements without a transaction around them."""
    pooled = await _check_out(engine)
    try:
        with _usable_after(pooled):
            yield pooled.driver_connection
    finally:
        pooled.close()


async def _check_out(engine: AsyncEngine) -> PoolProxiedConnection:
    try:
        return await engine.raw_connection()
    except engine.dialect.loaded_dbapi.Error as error:
        # The adapter's own error, which only a statement of SQLAlchemy is told as SQLAlchemy's.
        raise error.__cause__ or error from error


@contextmanager
def _usable_after(pooled: PoolProxiedConnection) -> Iterator[None]:
    try:
        yield
    except (asyncpg.PostgresError, ServiceError):
        raise
    except BaseException:
        # Whatever is still on its way must not be the next one's answer.
        pooled.invalidate()
        raise


def create_engine(
    settings: Settings,
    pool_size: int,
    command_timeout: float | None = COMMAND_TIMEOUT,
    *,
    url: str | None = None,
) -> AsyncEngine:
    """Make an engine with `pool_size` connections to `url`, or else to `DATABASE_URL`.

    It connects when first used.
    """
    parsed, connect_args = database_engine_arguments(url or settings.database_url)
    engine = create_async_engine(
        parsed,
        connect_args={
            "timeout": CONNECT_TIMEOUT,
            "command_timeout": command_timeout,
            "server_settings": _SESSION | _TIMEOUTS,
            "async_creator_fn": _connect,
            **connect_args,
            **(_THROUGH_PGBOUNCER if settings.pgbouncer else {}),
        },
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=1.0,
        # Parameters are personal data, and exceptions end up in logs.
        hide_parameters=True,
        json_serializer=lambda value: msgspec.json.encode(value).decode(),
        json_deserializer=msgspec.json.decode,
    )
    event.listen(engine.sync_engine, "checkout", _refuse_closed)
    return engine


async def _connect(
    *,
    host: str | Sequence[str] | None = None,
    port: int | Sequence[int] | None = None,
    **others: Any,
) -> Any:
    """Connect as asyncpg does, but to several hosts at once: the first that is right is taken.

    asyncpg asks one after the other, and all in one `timeout`: behind a host that is cut off, the
    one that took over would never be asked.
    """
    if isinstance(host, str) or host is None:
        return await asyncpg.connect(host=host, port=port, **others)
    ports = port if isinstance(port, Sequence) else [port] * len(host)
    asked = {
        asyncio.create_task(asyncpg.connect(host=one, port=its, **others))
        for one, its in zip(host, ports, strict=True)
    }
    try:
        while True:
            done, asked = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            right = [attempt.result() for attempt in done if attempt.exception() is None]
            for second in right[1:]:
                second.terminate()
            if right:
                return right[0]
            if not asked:
                raise next(iter(done)).exception() or AssertionError
    finally:
        for attempt in asked:
            attempt.add_done_callback(_hang_up)
            attempt.cancel()


def _hang_up(attempt: asyncio.Task[Any]) -> None:
    """Close a connection that was made though nobody needs it any more."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().terminate()


class _PooledConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg carries no types
    """A connection to PgBouncer, which gives each transaction another session of Postgres.

    What is set for a session stays there, for whoever gets it next: each transaction brings its
    time-outs along, in the message that begins it and so without a round trip.
    """

    async def execute(self, query: str, *args: Any, **options: Any) -> str:
        """Run a statement; asyncpg begins its transactions here."""
        if query.startswith("BEGIN"):
            query += "".join(f"SET LOCAL {name} = '{value}';" for name, value in _TIMEOUTS.items())
        return str(await super().execute(query, *args, **options))


# Names of prepared statements are unique in a process only: through PgBouncer, one of them is
# sometimes another server's statement, and its answer is taken for this one's (of 2400 statements
# of two processes, 321 were answered so). Without both caches none has a name.
_THROUGH_PGBOUNCER = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "server_settings": _SESSION,
    "connection_class": _PooledConnection,
}


@asynccontextmanager
async def connected(
    settings: Settings, command_timeout: float | None = COMMAND_TIMEOUT
) -> AsyncIterator[AsyncConnection]:
    """Give the one connection of a command that does its work and ends.

    Raises:
        DependencyUnavailable, Overloaded
    """
    engine = create_engine(settings, 1, command_timeout)
    try:
        with translated():
            async with engine.connect() as connection:
                yield connection
    finally:
        await engine.dispose()


def _refuse_closed(dbapi_connection: Any, _record: Any, _proxy: Any) -> None:
    """Replace a connection whose socket Postgres has closed: a ping without its round trip."""
    if dbapi_connection.driver_connection.is_closed():
        raise DisconnectionError


def lock_key(name: bytes) -> int:
    """Return the key of the advisory lock on a name, which is a digest."""
    return int.from_bytes(name[:8], "big", signed=True)


@contextmanager
def translated() -> Iterator[None]:
    """Turn failures of Postgres into the errors that callers are told."""
    try:
        yield
    except PoolTimeout as error:
        raise Overloaded from error
    except (*_GONE, asyncpg.PostgresError) as error:
        raise _meaning(error) from error
    except DBAPIError as error:
        raise _meaning(_driver_error(error)) from error


def _driver_error(error: DBAPIError) -> BaseException:
    """Return asyncpg's own error, which SQLAlchemy wraps twice."""
    below = error.orig
    return below.__cause__ or below if below is not None else error


def _meaning(error: BaseException) -> BaseException:
    if isinstance(error, _BUSY):
        return Overloaded()
    if isinstance(error, _GONE):
        return DependencyUnavailable()
    return error


class Database:
    """Postgres, as reads and transactions see it.

    `reachable` is kept by whoever watches Postgres (see `state`): while it is not, callers are
    told at once instead of after a time-out.
    """

    def __init__(self, settings: Settings) -> None:
        self._engine = create_engine(settings, settings.database_pool_size)
        self._autocommit = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self.limits_statements = not settings.pgbouncer
        """Whether Postgres ends a statement in time that has no transaction around it."""
        self.together = Together(self.direct)
        self._pool = cast("AsyncAdaptedQueuePool", self._engine.pool)
        # Checked out, and used by nobody: to check out and in again costs 50 to 100 µs.
        self._kept: list[PoolProxiedConnection] = []
        self.reachable = True

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Give a connection for single statements, without a transaction around them.

        Raises:
            DependencyUnavailable: Postgres cannot be reached.
            Overloaded: no connection became free within a second, or a lock was not got.
        """
        self._fail_fast()
        self._give_back()
        with translated():
            async with self._autocommit.connect() as connection:
                yield connection

    @asynccontextmanager
    async def direct(self) -> AsyncIterator[asyncpg.Connection]:
        """Give a connection for statements that are `Direct`; otherwise as `reading`."""
        self._fail_fast()
        with translated():
            pooled = self._take() or await _check_out(self._engine)
            try:
                with _usable_after(pooled):
                    yield pooled.driver_connection
            finally:
                self._keep(pooled)

    def _take(self) -> PoolProxiedConnection | None:
        while self._kept:
            pooled = self._kept.pop()
            if not cast("Any", pooled.driver_connection).is_closed():
                return pooled
            pooled.invalidate()
            pooled.close()
        return None

    def _keep(self, pooled: PoolProxiedConnection) -> None:
        """Keep a connection for the next statement, unless it may be waited for."""
        if pooled.is_valid and self._pool.checkedout() < self._pool.size():
            self._kept.append(pooled)
        else:
            pooled.close()

    def _give_back(self) -> None:
        """Let whoever is about to ask the pool find what is kept."""
        if self._kept:
            self._kept.pop().close()

    async def connect(self) -> AsyncConnection:
        """Check out a connection for a transaction; the caller closes it."""
        self._fail_fast()
        self._give_back()
        with translated():
            return await self._engine.connect()

    def _fail_fast(self) -> None:
        if not self.reachable:
            raise DependencyUnavailable

    async def close(self) -> None:
        """Close all connections."""
        await self.together.close()
        while self._kept:
            self._give_back()
        await self._engine.dispose()
