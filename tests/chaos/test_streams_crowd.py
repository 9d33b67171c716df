"""The long form of the streams: 1000 subscribers on one server (issue 3, point 5; budget 8)."""

from __future__ import annotations

from ..servers import Server
from ..system.crowd import gathered

SECONDS = 30.0
RATE = 200.0
READERS = 1000
SLOW = 300


async def test_a_thousand_subscribers_of_whom_some_stop_reading(
    server: Server, database_url: str
) -> None:
    async with gathered(server, database_url, READERS, SLOW) as (crowd, users):
        all_read = await crowd.phase(users, SECONDS, RATE)
        print(f"\nall read: {all_read}")  # noqa: T201 - the figures are asked for
        await crowd.ask("stop")
        some_read = await crowd.phase(users, SECONDS, RATE)
        print(f"300 stop: {some_read}")  # noqa: T201
        await crowd.wait_for_subscribers(READERS - SLOW, 90)
        afterwards = await crowd.phase(users, SECONDS, RATE)
        print(f"after they were cut off: {afterwards}")  # noqa: T201
    assert all_read.received == all_read.made * READERS
    assert some_read.received >= some_read.made * (READERS - SLOW)
    assert all_read.p99 < 0.25
    assert some_read.p99 < 0.25
    assert max(phase.rss for phase in (all_read, some_read, afterwards)) < 250
