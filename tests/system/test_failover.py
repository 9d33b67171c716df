"""The primary dies, its synchronous replica is promoted: servers follow, and nothing is lost."""

from contextlib import AsyncExitStack

from ..chaos.replicas import running
from ..engines import open_dir
from ..servers import Server
from .failover import fail_over, opened_pair

FOLLOWS_WITHIN = 3.0
"""Seconds: two looks of a server at Postgres, and the time of the machine."""


async def test_servers_follow_a_failover_and_nothing_acknowledged_is_lost() -> None:
    async with AsyncExitStack() as stack:
        pair, settings = await opened_pair(stack, stack.enter_context(open_dir()))
        servers = await stack.enter_async_context(running(Server(settings), Server(settings)))
        refused = await fail_over(pair, servers, 10)
    print(f"\n{refused}")  # noqa: T201 - the figures are asked for
    assert refused.following < FOLLOWS_WITHIN
