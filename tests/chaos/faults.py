"""Owns what goes wrong below two servers under load: each fault begins and ends here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import redis

from ..system.trouble import killed, paused, stopped
from .load import Load
from .replicas import Replicas

Fault = Callable[[Replicas, Load, float], Awaitable[None]]
"""Takes what fails, the load that goes on meanwhile, and for how many seconds."""

EVICTION_INTERVAL = 0.02
"""Seconds between two looks at how much Redis holds."""


async def redis_killed_and_back_with_its_old_data(
    replicas: Replicas, load: Load, seconds: float
) -> None:
    await _something_is_cached(replicas, load)
    with redis.Redis.from_url(replicas.valkey.url) as connection:
        # What is cached now is what comes back: everything that is written from here on is newer.
        connection.execute_command("WAITAOF", 1, 0, 5000)
    async with killed(replicas.valkey):
        await load.go_on(seconds)
    with redis.Redis.from_url(replicas.valkey.url) as connection:
        assert connection.dbsize() > load.users / 5


async def redis_flushed(replicas: Replicas, load: Load, seconds: float) -> None:
    await _something_is_cached(replicas, load)
    with redis.Redis.from_url(replicas.valkey.url) as connection:
        for _ in range(10):
            await load.go_on(seconds / 10)
            connection.flushall()


async def redis_paused(replicas: Replicas, load: Load, seconds: float) -> None:
    await _something_is_cached(replicas, load)
    async with paused(replicas.valkey):
        await load.go_on(seconds)


async def redis_not_heard_by_one_server(replicas: Replicas, load: Load, seconds: float) -> None:
    """Let nothing through that Redis says to the first server, which is told of nothing then."""
    await _something_is_cached(replicas, load)
    replicas.gate.speaks.clear()
    try:
        await load.go_on(seconds)
        async with httpx.AsyncClient(base_url=replicas.servers[0].url) as http:
            assert (await http.get("/health")).json()["data"]["status"] == "degraded"
    finally:
        replicas.gate.speaks.set()


async def redis_evicting(replicas: Replicas, load: Load, seconds: float) -> None:
    """Let Redis hold a tenth of the people: the rest is evicted, markers and leases, too."""
    await _something_is_cached(replicas, load)
    # The limit follows what is there: connections take more memory than the documents, and ever
    # another amount, so a fixed one would hold all of them or none.
    with redis.Redis.from_url(replicas.valkey.url) as connection:
        connection.config_set("maxmemory-policy", "allkeys-lru")
        evicted = connection.info("stats")["evicted_keys"]
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            held = connection.dbsize()
            used = connection.info("memory")["used_memory"]
            limit = used - 1000 * (held - load.users // 10) if held > load.users / 10 else 0
            connection.config_set("maxmemory", limit)
            connection.config_set("maxmemory", 0)
            await load.go_on(EVICTION_INTERVAL)
        assert connection.info("stats")["evicted_keys"] > evicted + load.users


async def kill_between_commit_and_publication(replicas: Replicas) -> None:
    """Kill the first server when it has committed something and not said so."""
    replicas.gate.passed.clear()
    replicas.gate.before_publication = replicas.servers[0].kill
    await asyncio.wait_for(replicas.gate.passed.wait(), 5)


async def server_killed_between_commit_and_publication(
    replicas: Replicas, load: Load, seconds: float
) -> None:
    await kill_between_commit_and_publication(replicas)
    await load.go_on(seconds)
    await asyncio.to_thread(replicas.servers[0].start)


async def postgres_restarted(replicas: Replicas, load: Load, seconds: float) -> None:
    async with stopped(replicas.postgres):
        await load.go_on(seconds)


async def _something_is_cached(replicas: Replicas, load: Load) -> None:
    """Let the load go on until Redis has something to lose; not so soon after another fault."""
    with redis.Redis.from_url(replicas.valkey.url) as connection:
        while connection.dbsize() < load.users / 4:
            await load.go_on(0.1)


ANSWERED: dict[Fault, set[int]] = {
    redis_killed_and_back_with_its_old_data: set(),
    redis_flushed: set(),
    redis_paused: set(),
    redis_not_heard_by_one_server: set(),
    redis_evicting: set(),
    server_killed_between_commit_and_publication: {0},
    postgres_restarted: {503},
}
"""The faults, and with what requests may be refused then; 0 is no answer."""
