"""Misses read from a streaming replica that lags, stands still and dies: nothing stale is read."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import NamedTuple

import httpx
import pytest
import redis
from user_service_server.embedded import EmbeddedValkey

from ..engines import Engines, open_dir
from ..servers import Server
from ..standby import Pair, replicated
from ..system.trouble import killed, until
from .history import lag, violations
from .load import Load
from .replicas import running
from .test_coherence import SECOND_BOUND, SECONDS

DATABASE = "replicated"
FORGOTTEN_EVERY = SECOND_BOUND + 0.5
"""Seconds between two losses of the cache: what was cached wrongly is read for longer than it may
be, and before that there are misses again and again."""


class Setup(NamedTuple):
    """Two servers on a primary, its replica and a Redis."""

    servers: list[Server]
    pair: Pair
    valkey: EmbeddedValkey

    def load(self) -> Load:
        """Return a load on both."""
        return Load([server.port for server in self.servers])

    def forget(self) -> None:
        """Empty the cache: what is read next, is a miss."""
        with redis.Redis.from_url(self.valkey.url) as connection:
            connection.flushall()

    async def used(self) -> float:
        """Return how many documents the servers have read from the replica."""
        lines = [line for server in self.servers for line in await _metrics(server)]
        name = 'user_service_replica_reads_total{result="used"'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    async def health(self) -> set[tuple[str, str]]:
        """Return what the servers say of themselves, and of the replica."""
        async with httpx.AsyncClient(timeout=10) as http:
            answers = [await http.get(f"{server.url}/health") for server in self.servers]
        found = [answer.json()["data"] for answer in answers]
        return {(one["status"], one["dependencies"]["replica"]["status"]) for one in found}

    async def says(self, status: str, of_replica: str) -> None:
        """Return when both servers say so."""

        async def both_say() -> bool:
            return await self.health() == {(status, of_replica)}

        await until(both_say, 20)

    async def miss_for(self, load: Load, seconds: float) -> None:
        """Let the load go on with a cache that is emptied again and again."""
        for _ in range(math.ceil(seconds / FORGOTTEN_EVERY)):
            self.forget()
            await load.go_on(FORGOTTEN_EVERY)


async def _metrics(server: Server) -> list[str]:
    async with httpx.AsyncClient(timeout=10) as http:
        return (await http.get(f"{server.url}/metrics")).text.splitlines()


@pytest.fixture(scope="module", name="setup")
async def two_servers() -> AsyncIterator[Setup]:
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(open_dir())
        # Its migration has an event loop of its own.
        pair = await asyncio.to_thread(stack.enter_context, replicated(directory))
        valkey = stack.enter_context(EmbeddedValkey(directory / "valkey"))
        engines = Engines(pair.primary, valkey)
        settings = {
            "DATABASE_URL": engines.create_database(DATABASE),
            "DATABASE_REPLICA_URL": pair.standby.url(DATABASE),
            "REDIS_URL": valkey.url,
            "PASSWORD_REQUIRED": "off",
            # A busy machine is late; that Redis is late is not tested here.
            "REDIS_TIMEOUT_MS": "2000",
        }
        servers = await stack.enter_async_context(running(Server(settings), Server(settings)))
        setup = Setup(servers, pair, valkey)
        await setup.says("healthy", "up")
        yield setup


def assert_coherent(load: Load) -> None:
    assert violations(load.history, SECOND_BOUND) == []
    assert not load.refused


async def test_misses_are_read_from_the_replica(setup: Setup) -> None:
    async with setup.load() as load:
        before = await setup.used()
        await setup.miss_for(load, SECONDS / 4)
        used = await setup.used() - before
    print(f"\n{used:.0f} of {len(load.history.reads)} reads, {lag(load.history)}")  # noqa: T201 - the figures are asked for
    assert used > 0
    assert_coherent(load)
    assert await load.at_rest() == []


async def test_nothing_stale_is_read_or_cached_of_a_replica_that_stands_still(
    setup: Setup,
) -> None:
    """Nor does what it held come back when it goes on: it goes on from where it stood."""
    async with setup.load() as load:
        await setup.miss_for(load, 1)
        for _ in range(max(1, int(SECONDS / 20))):
            setup.pair.standby.pause_replay()
            await setup.miss_for(load, 2)
            await setup.says("degraded", "behind")
            before = await setup.used()
            await setup.miss_for(load, 2)
            assert await setup.used() == before
            setup.pair.standby.resume_replay()
            await setup.says("healthy", "up")
            await setup.miss_for(load, 2)
    assert_coherent(load)
    assert await load.at_rest() == []


async def test_a_dead_replica_costs_nobody_an_answer(setup: Setup) -> None:
    async with setup.load() as load:
        await setup.miss_for(load, 1)
        async with killed(setup.pair.standby):
            await setup.miss_for(load, 3)
            await setup.says("degraded", "down")
        await setup.says("healthy", "up")
        await setup.miss_for(load, 2)
    assert_coherent(load)
    assert await load.at_rest() == []
