"""Connections for single statements: kept for the next one, and nobody has to wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import asyncpg
import pytest
from user_service_server.errors import Overloaded
from user_service_server.storage.database import Database

from ..engines import settings_for
from ..system.trouble import until

SIZE = 3


@pytest.fixture
async def database(database_url: str, redis_url: str) -> AsyncIterator[Database]:
    database = Database(settings_for(database_url, redis_url, DATABASE_POOL_SIZE=str(SIZE)))
    yield database
    await database.close()
    assert database._pool.checkedout() == 0


async def pid(database: Database) -> int:
    """Return by whom a single statement is answered."""
    async with database.direct() as connection:
        return int(await connection.fetchval("SELECT pg_backend_pid()"))


async def pids(database: Database, number: int) -> set[int]:
    """Return by whom statements at the same time are answered."""
    async with AsyncExitStack() as stack:
        found = set()
        for _ in range(number):
            connection = await stack.enter_async_context(database.direct())
            found.add(await connection.fetchval("SELECT pg_backend_pid()"))
        return found


async def test_the_next_statement_has_the_same_connection(database: Database) -> None:
    assert len({await pid(database) for _ in range(5)}) == 1
    assert database._pool.checkedout() == 1


async def test_what_is_kept_is_there_for_transactions_and_reads(database: Database) -> None:
    assert len(await pids(database, SIZE)) == SIZE
    for _ in range(2):
        transactions = [await database.connect() for _ in range(SIZE)]
        for transaction in transactions:
            await transaction.close()
        async with database.reading(), database.reading(), database.reading():
            assert database._pool.checkedout() == SIZE
        await pids(database, SIZE)


async def test_whoever_waits_gets_what_a_statement_gives_back(database: Database) -> None:
    await pids(database, SIZE)
    transactions = [await database.connect() for _ in range(SIZE - 1)]
    async with database.direct():
        waiting = asyncio.create_task(database.connect())

        async def is_waiting() -> bool:
            return bool(database._pool._pool._queue._getters)  # type: ignore[attr-defined]

        await until(is_waiting, 0.9)
    transactions.append(await waiting)
    with pytest.raises(Overloaded):
        await database.connect()
    for transaction in transactions:
        await transaction.close()
    assert await pids(database, SIZE)


async def test_a_kept_connection_that_postgres_has_closed_is_not_used(database: Database) -> None:
    before = await pids(database, SIZE)
    async with database.direct() as connection:
        others = before - {connection.get_server_pid()}
        for other in others:
            await connection.execute("SELECT pg_terminate_backend($1)", other)

    async def are_closed() -> bool:
        kept = [pooled.driver_connection for pooled in database._kept]
        return sum(connection.is_closed() for connection in kept) == len(kept) - 1  # type: ignore[union-attr]

    await until(are_closed, 2)
    assert len(await pids(database, SIZE) & before) == 1


async def test_what_was_broken_off_is_nobodys_next_answer(database: Database) -> None:
    before = await pid(database)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), database.direct() as connection:
            await connection.execute("SELECT pg_sleep(5)")
    assert database._pool.checkedout() == 0
    assert await pid(database) != before


async def test_what_postgres_refused_leaves_its_connection_as_it_was(database: Database) -> None:
    before = await pid(database)
    with pytest.raises(asyncpg.DivisionByZeroError):
        async with database.direct() as connection:
            await connection.execute("SELECT 1 / 0")
    assert await pid(database) == before
