"""Budget 11: what the client adds to a batch of 1000 users that it does not hold."""

from __future__ import annotations

import asyncio

import httpx
import msgspec
from user_service_client import UserServiceClient
from user_service_client._aiohttp import AiohttpTransport
from user_service_schemas import BatchOfUsers, BatchUsers, Envelope

from benchmarks import documents
from benchmarks.budgets import Budget, Goal
from benchmarks.ready import BATCH
from benchmarks.surroundings import Surroundings
from benchmarks.timing import Spent, Stopwatch, medians

ROUNDS = 100
_decode = msgspec.json.Decoder(Envelope[BatchOfUsers]).decode


def measure(surroundings: Surroundings) -> list[Budget]:
    """Measure it in turn with the same request through the bare transport, decoded in one go."""
    return [Budget(11, "client, get_many", (asyncio.run(_measure(surroundings.ready)),))]


async def _measure(url: str) -> Goal:
    ids = [documents.user_id(number) for number in range(BATCH)]
    async with (
        UserServiceClient(url, timeout=60, attempt_timeout=30) as client,
        AiohttpTransport() as bare,
    ):

        async def get_many() -> Spent:
            client.cache.clear()
            with Stopwatch() as watch:
                batch = await client.users.get_many(ids)
            assert len(batch.users) == BATCH
            return watch.per(1)

        async def one_call() -> Spent:
            with Stopwatch() as watch:
                request = httpx.Request(
                    "POST",
                    f"{url}/api/v1/users/batch",
                    headers={"Accept": "application/json", "Content-Type": "application/json"},
                    content=msgspec.json.encode(BatchUsers(ids=ids)),
                )
                response = await bare.handle_async_request(request)
                batch = _decode(await response.aread()).data
            assert batch is not None
            assert len(batch.users) == BATCH
            return watch.per(1)

        spent = await medians(ROUNDS, client=get_many, one_call=one_call)
    return Goal(
        name=f"{BATCH} cold",
        figure=spent["client"].wall * 1e3,
        unit="ms",
        bound="≤",
        limit=1.5,
        ceiling=spent["one_call"].wall * 1e3,
        beside="one batch call",
        cpu_ratio=spent["client"].cpu / spent["one_call"].cpu,
    )
