"""Owns a failover under load: what it shows, and how long writes were refused."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import redis
from user_service_server.embedded import EmbeddedValkey

from ..engines import Engines
from ..servers import Server
from ..standby import Pair, replicated
from .registrations import Registrations, assert_everybody_is_there, half_users

DATABASE = "survivors"
CUT_OFF_FOR = 0.3
"""Seconds in which some would be told of writes that the replica has not."""


class Refused(NamedTuple):
    """Seconds without an acknowledged write, from the primary's death."""

    promoting: float
    """Until the replica was a primary."""
    following: float
    """From then on, until the first of each server's writes."""


async def fail_over(pair: Pair, servers: list[Server], rounds_before: int) -> Refused:
    """Kill the primary under load and promote the replica; fails if a write was lost."""
    async with AsyncExitStack() as stack:
        told = [
            await stack.enter_async_context(Registrations(server.url, f"server{number}-"))
            for number, server in enumerate(servers)
        ]
        await asyncio.gather(*(registrations.wait_for(rounds_before) for registrations in told))
        # On one machine a replica has everything at once: what is written from here on, it has not,
        # and so nobody may be told that it was.
        await asyncio.to_thread(pair.standby.cut_off)
        await asyncio.sleep(CUT_OFF_FOR)
        await asyncio.to_thread(pair.primary.kill)
        died = time.monotonic()
        await asyncio.to_thread(pair.standby.promote)
        promoted = time.monotonic()
        await asyncio.gather(*(registrations.wait_for(1) for registrations in told))
        followed = time.monotonic()
        await asyncio.gather(*(registrations.wait_for(10) for registrations in told))
    for server in servers:
        # What is cached of them tells nothing of what is stored.
        with redis.Redis.from_url(server.environ["REDIS_URL"]) as connection:
            connection.flushall()
        await assert_everybody_is_there(server.url, *told)
    assert half_users(pair.standby, DATABASE) == ""
    assert set().union(*(registrations.statuses for registrations in told)) <= {200, 201, 503}
    return Refused(promoted - died, followed - promoted)


async def opened_pair(stack: AsyncExitStack, directory: Path) -> tuple[Pair, dict[str, str]]:
    """Start a synchronous pair and a Valkey; returns it, and the settings of a server on it."""
    # Its migration has an event loop of its own.
    pair = await asyncio.to_thread(stack.enter_context, replicated(directory))
    valkey = stack.enter_context(EmbeddedValkey(directory / "valkey"))
    Engines(pair.primary, valkey).create_database(DATABASE)
    pair.replicate_synchronously()
    return pair, {"DATABASE_URL": pair.url(DATABASE), "REDIS_URL": valkey.url}
