"""Budget 10: what a user that the client does not hold costs, over loopback."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from itertools import cycle

import httpx
from user_service_client import UserServiceClient
from user_service_client._aiohttp import AiohttpTransport

from benchmarks import documents
from benchmarks.budgets import Budget, Goal
from benchmarks.surroundings import Surroundings
from benchmarks.timing import Case, Spent, Stopwatch, medians

SINGLE_ROUNDS = 2000
CROWD_ROUNDS = 12
CROWD_CALLS = 1000
"""Calls of a round; plain httpx makes a fifth."""
PEER_SHARE = 5


def measure(surroundings: Surroundings) -> list[Budget]:
    """Measure one call at a time, and crowds of 10, 100 and 500."""
    return [Budget(10, "client, not cached", asyncio.run(_measure(surroundings.ready)))]


async def _measure(url: str) -> tuple[Goal, ...]:
    # What the benchmarks themselves have imported is not to be passed by the garbage collector,
    # which a crowd sets off: no case is to pay for that.
    gc.collect()
    gc.freeze()
    # Another id each time: concurrent reads of one would be one request.
    ids = cycle([documents.user_id(number) for number in range(1000)])
    users = f"{url}/api/v1/users"
    async with (
        UserServiceClient(url, cache=None, timeout=60, attempt_timeout=30) as client,
        AiohttpTransport() as bare,
        httpx.AsyncClient(timeout=60) as plain,
    ):
        request = _request_as_sent(f"{users}/{next(ids)}")

        async def get() -> None:
            await client.users.get(next(ids))

        async def send() -> None:
            response = await bare.handle_async_request(request)
            await response.aread()

        async def get_plainly() -> None:
            await plain.get(f"{users}/{next(ids)}")

        single = await medians(SINGLE_ROUNDS, client=_one(get), bare=_one(send))
        crowds = await medians(
            CROWD_ROUNDS,
            client_10=_crowd(get, 10, CROWD_CALLS),
            client_100=_crowd(get, 100, CROWD_CALLS),
            client_500=_crowd(get, 500, CROWD_CALLS),
            bare_100=_crowd(send, 100, CROWD_CALLS),
            plain_100=_crowd(get_plainly, 100, CROWD_CALLS // PEER_SHARE),
        )
    rates = {name: 1 / spent.wall for name, spent in crowds.items()}
    return (
        Goal(
            name="one at a time, p50",
            figure=single["client"].wall * 1e6,
            unit="µs",
            bound="≤",
            limit=1.4,
            ceiling=single["bare"].wall * 1e6,
            beside="bare transport",
            cpu_ratio=single["client"].cpu / single["bare"].cpu,
        ),
        Goal(
            name="100 at a time",
            figure=rates["client_100"],
            unit="calls/s",
            bound="≥",
            limit=5,
            ceiling=rates["plain_100"],
            beside="plain httpx",
            cpu_ratio=crowds["plain_100"].cpu / crowds["client_100"].cpu,
            peers={"bare transport": rates["bare_100"]},
        ),
        # Flat: 500 at a time get nine tenths of what 10 get, or more.
        Goal(
            name="500 at a time",
            figure=rates["client_500"],
            unit="calls/s",
            bound="≥",
            limit=0.9,
            ceiling=rates["client_10"],
            beside="10 at a time",
            cpu_ratio=crowds["client_10"].cpu / crowds["client_500"].cpu,
        ),
    )


def _request_as_sent(url: str) -> httpx.Request:
    """Return a request with as many headers as the client sends."""
    return httpx.Request(
        "GET",
        url,
        headers={
            "Accept": "application/json",
            "User-Agent": "user-service-client/0.1.0",
            "X-Request-ID": "0123456789abcdef0123456789abcdef",
        },
        extensions={"timeout": dict.fromkeys(("connect", "read", "write", "pool"), 30.0)},
    )


def _one(call: Callable[[], Awaitable[None]]) -> Case:
    async def case() -> Spent:
        with Stopwatch() as watch:
            await call()
        return watch.per(1)

    return case


def _crowd(call: Callable[[], Awaitable[None]], size: int, calls: int) -> Case:
    """Return a case in which so many tasks share so many calls."""

    async def work(turns: list[None]) -> None:
        while turns:
            turns.pop()
            await call()

    async def case() -> Spent:
        turns = [None] * calls
        with Stopwatch() as watch:
            async with asyncio.TaskGroup() as group:
                for _ in range(size):
                    group.create_task(work(turns))
        return watch.per(calls)

    return case
