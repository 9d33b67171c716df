"""The change feed of real servers: nothing is skipped, and streams end as they should."""

from __future__ import annotations

import asyncio
import signal
import time

import httpx

from ..engines import Engines
from ..servers import Server, serving
from .crowd import gathered
from .feed_trial import quantile, run_trial
from .subscribers import change_often, connected, follow


async def test_feed_skips_nothing_under_many_writers(
    engines: Engines, server: Server, database_url: str, redis_url: str
) -> None:
    """And readers of the same rows, in the orders that are known to be wrong, fail the check."""
    other = engines.create_database("feed_other")
    with serving(database_url, redis_url) as second:
        trial = await run_trial([server.url, second.url], database_url, other, 1_000, seed=1)
    for name, received in trial.readers.items():
        assert trial.faults(received) == [], name
        assert received.resets == 0
        assert quantile(trial.lags(name), 0.5) < 1
    assert any("never came" in fault for fault in trial.faults(trial.by_number))
    assert any("came after" in fault for fault in trial.faults(trial.by_transaction))
    assert trial.stalled


async def test_subscribers_who_stop_reading_slow_nobody_and_cost_little(
    server: Server, database_url: str
) -> None:
    """That they are cut off takes longer: see tests/server/test_stream.py, and the long form."""
    async with gathered(server, database_url, 50, 10) as (crowd, users):
        all_read = await crowd.phase(users, 1, 100)
        assert all_read.received == all_read.made * 50
        assert all_read.p99 < 1
        before = crowd.rss
        await crowd.ask("stop")
        async with connected(database_url) as sql:
            for user in users[:2]:
                await change_often(sql, user, 5_000)
        await crowd.wait_for_receipts(10_000 * 40, 10)
        some_read = await crowd.phase(users, 1, 100)
        assert some_read.received == some_read.made * 40
        assert some_read.p99 < 1
        assert crowd.rss < before + 50, "MB"
    await crowd.wait_for_subscribers(0, 5)


async def test_termination_ends_streams_at_once_and_the_server(
    database_url: str, redis_url: str
) -> None:
    with serving(database_url, redis_url, SHUTDOWN_GRACE="1") as ending:
        async with httpx.AsyncClient(base_url=ending.url, timeout=10) as http:
            assert ending.process is not None
            process = ending.process
            signalled = 0.0
            async for event in follow(http):
                if event.name == "heartbeat" and not signalled:
                    signalled = time.monotonic()
                    process.send_signal(signal.SIGTERM)
            assert time.monotonic() - signalled < 0.5, "the stream waited for the grace"
        assert await asyncio.to_thread(process.wait, 10) == 0
        assert time.monotonic() - signalled < 3
        ending.process = None


async def test_termination_is_not_held_up_by_who_does_not_read(
    database_url: str, redis_url: str
) -> None:
    with serving(database_url, redis_url, SHUTDOWN_TIMEOUT="1") as ending:
        async with gathered(ending, database_url, 3, 3) as (crowd, users):
            await crowd.ask("stop")
            async with connected(database_url) as sql:
                await change_often(sql, users[0], 20_000)
            began = time.monotonic()
            assert await asyncio.to_thread(ending.stop) == 0
            assert time.monotonic() - began < 5
