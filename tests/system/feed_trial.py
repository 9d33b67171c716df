"""Owns the trial of the feed: many writers, restless readers, and readers of orders known wrong."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import asyncpg
import httpx

from .subscribers import (
    Received,
    Version,
    change,
    connected,
    faults,
    follow_restlessly,
    insert_users,
    poll,
)

USERS = 200
CAUGHT_UP_WITHIN = 20.0
"""Seconds after the last change in which every reader must have everything."""
# Beside the table, what a feed would go by that is ordered by transactions.
_ADD_TRANSACTION = "ALTER TABLE changes ADD COLUMN xid xid8 NOT NULL DEFAULT pg_current_xact_id()"
_BY_NUMBER = """
SELECT id, CAST(user_id AS text), version FROM changes WHERE id > $1 ORDER BY id LIMIT 1000
"""
# Behind the oldest transaction that runs, as is recommended: what commits later has a higher id.
_BY_TRANSACTION = """
SELECT CAST(xid AS text) AS last_xid, id, CAST(user_id AS text), version FROM changes
WHERE (xid, id) > (CAST(CAST($1 AS text) AS xid8), $2)
AND xid < pg_snapshot_xmin(pg_current_snapshot())
ORDER BY xid, id LIMIT 1000
"""


@dataclass
class Trial:
    """What was committed, and what each reader got.

    Attributes:
        committed: when each change was acknowledged (`time.time`).
        readers: three who follow and disconnect at random, and one who polls.
        by_number: who reads the same rows by their sequence number.
        by_transaction: who reads them by their transaction's id.
        stalled: whether that one got nothing while a transaction of another database was open.
    """

    committed: dict[Version, float] = field(default_factory=dict)
    readers: dict[str, Received] = field(default_factory=dict)
    by_number: Received = field(default_factory=Received)
    by_transaction: Received = field(default_factory=Received)
    stalled: bool = False

    def faults(self, received: Received) -> list[str]:
        """Return what is wrong with what a reader got."""
        return faults(received.changes, self.committed)

    def lags(self, name: str) -> list[float]:
        """Return the seconds from each acknowledgement to its receipt, ascending."""
        first = self.readers[name].first_at
        return sorted(first[version] - at for version, at in self.committed.items())


def quantile(ascending: Sequence[float], share: float) -> float:
    """Return the value below which this share lies."""
    return ascending[min(int(share * len(ascending)), len(ascending) - 1)]


@asynccontextmanager
async def held_open(database_url: str) -> AsyncIterator[None]:
    """Hold a transaction that has written open until the block ends."""
    async with connected(database_url) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("CREATE TABLE held_open ()")
        yield
        await transaction.rollback()


async def run_trial(
    urls: Sequence[str], database_url: str, other_database_url: str, changes: int, seed: int
) -> Trial:
    """Make so many changes by sixteen writers, while readers read, and wait for the readers."""
    trial = Trial()
    async with connected(database_url) as sql:
        await sql.execute(_ADD_TRANSACTION)
        users = await insert_users(sql, USERS)
    reading: list[asyncio.Task[None]] = []
    async with asyncio.TaskGroup() as readers:
        for number in range(3):
            received = trial.readers[f"stream {number}"] = Received()
            received.cursor = await beginning(urls[0])
            chance = random.Random(f"{seed}.{number}")  # noqa: S311 - no secret
            reading.append(readers.create_task(follow_restlessly(urls, received, chance)))
        trial.readers["poll"] = Received()
        reading.append(readers.create_task(poll(urls[-1], trial.readers["poll"])))
        reading.append(readers.create_task(_read_by_number(database_url, trial.by_number)))
        reading.append(
            readers.create_task(_read_by_transaction(database_url, trial.by_transaction))
        )
        try:
            async with held_open(other_database_url):
                await _write(
                    trial,
                    users,
                    random.Random(seed),  # noqa: S311 - no secret
                    urls=urls,
                    database_url=database_url,
                    changes=changes,
                )
                trial.stalled = not trial.by_transaction.changes
            await _caught_up(trial)
        finally:
            for task in reading:
                task.cancel()
    return trial


async def beginning(url: str) -> str:
    """Return the cursor before the oldest change of a feed in which none is."""
    async with httpx.AsyncClient(base_url=url) as http:
        page = (await http.get("/api/v1/changes")).raise_for_status().json()["data"]
    assert not page["items"]
    return str(page["next"])


async def _caught_up(trial: Trial) -> None:
    deadline = time.monotonic() + CAUGHT_UP_WITHIN
    everyone = [*trial.readers.values(), trial.by_transaction]
    while time.monotonic() < deadline:
        if all(trial.committed.keys() <= received.first_at.keys() for received in everyone):
            return
        await asyncio.sleep(0.1)


async def _write(
    trial: Trial,
    users: Sequence[str],
    chance: random.Random,
    *,
    urls: Sequence[str],
    database_url: str,
    changes: int,
) -> None:
    """Ten write much at once, two hold on long, two begin early, and two call the servers."""

    def more() -> bool:
        return len(trial.committed) < changes

    def note(changed: Sequence[Version]) -> None:
        trial.committed.update(dict.fromkeys(changed, time.time()))

    async def by_sql(most: int, held: float = 0.0, late: float = 0.0) -> None:
        async with connected(database_url) as sql:
            while more():
                some = chance.sample(users, chance.randint(1, most))
                pauses = (chance.random() * held, chance.random() * late)
                note(await change(sql, *some, held=pauses[0], late=pauses[1]))

    async def by_http(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            number = 0
            while more():
                number += 1
                user = chance.choice(users)
                answer = await http.patch(f"/api/v1/users/{user}", json={"name": f"{url} {number}"})
                if answer.status_code == 503:
                    continue  # the others had the user for longer than a write waits for a lock
                note([(user, answer.raise_for_status().json()["data"]["version"])])

    async with asyncio.TaskGroup() as writers:
        for _ in range(10):
            writers.create_task(by_sql(12))
        for _ in range(2):
            writers.create_task(by_sql(2, held=1.0))
            writers.create_task(by_sql(3, late=0.3))
        for url in (urls[0], urls[-1]):
            writers.create_task(by_http(url))


async def _read_by_number(database_url: str, received: Received) -> None:
    last = 0
    async with connected(database_url) as sql:
        while True:
            rows = await sql.fetch(_BY_NUMBER, last)
            last = rows[-1][0] if rows else last
            _take(received, rows)
            await asyncio.sleep(0.05)


async def _read_by_transaction(database_url: str, received: Received) -> None:
    last = ("0", 0)
    async with connected(database_url) as sql:
        while True:
            rows = await sql.fetch(_BY_TRANSACTION, *last)
            last = (rows[-1][0], rows[-1][1]) if rows else last
            _take(received, rows)
            await asyncio.sleep(0 if rows else 0.05)


def _take(received: Received, rows: Sequence[asyncpg.Record]) -> None:
    now = time.time()
    for row in rows:
        version = (row[-2], row[-1])
        received.changes.append(version)
        received.first_at.setdefault(version, now)
