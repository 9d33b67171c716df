"""Calls given up at every point of them, for as long as wanted: none takes a connection along."""

import functools
import os
import time

from user_service_client import UserServiceClient
from user_service_client._aiohttp import AiohttpTransport

from ..client.test_cancellation import (
    CALLS,
    HEALTHY,
    answer_once,
    cancelled,
    chance,
    deadline,
    healthy,
    make_many,
    slow_server,
)
from ..client.test_transport import serving


async def test_healthy_calls_succeed_after_any_number_that_were_given_up() -> None:
    ends_at = time.monotonic() + float(os.environ.get("CHAOS_SECONDS", "5"))
    few = functools.partial(AiohttpTransport, max_connections=3)
    seed = 0
    async with (
        slow_server() as (_, slow_url),
        serving(answer_once) as closing_url,
        UserServiceClient(slow_url) as usual,
        UserServiceClient(slow_url, transport=few) as narrow,
        UserServiceClient(closing_url, transport=few) as reconnecting,
    ):
        while time.monotonic() < ends_at:
            seed += 1
            for client in (usual, narrow, reconnecting):
                for make in (deadline, cancelled):
                    await make_many(client, make, CALLS, chance(seed))
                    assert await healthy(client) == HEALTHY, seed
    print(f"{seed * 6 * CALLS} calls were given up")  # noqa: T201
