"""Budget 9: what a user that the client holds costs, in time and in memory."""

from __future__ import annotations

import asyncio
import gc
import random
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from typing import Self

import httpx
import msgspec
from user_service_client import CacheOptions, UserServiceClient
from user_service_schemas import User

from benchmarks import documents
from benchmarks.budgets import Budget, Goal
from benchmarks.peers import caches
from benchmarks.surroundings import Surroundings
from benchmarks.timing import Case, Spent, Stopwatch, medians

WARM = 1000
"""Users that are read in random order. With 10,000, a look-up in a bare dict alone takes 0.2 µs:
that would measure the memory of the machine."""
READS = 10_000
HELD = 50_000
"""Users that are held where memory is measured."""
ROUNDS = 15
_BATCH = 1000
_PEERS = {"cashews": "cashews", "LaunchDarkly": "launchdarkly"}


def measure(_surroundings: Surroundings) -> list[Budget]:
    """Measure hits in turn with those of other caches, and then the memory."""
    hits = asyncio.run(_measure_hits())
    per_document, per_struct = asyncio.run(_measure_memory())
    memory = Goal(
        name=f"memory of one of {HELD:,}",
        figure=per_document,
        unit="B",
        bound="≤",
        limit=1.5,
        ceiling=per_struct,
        beside="msgspec's own",
    )
    return [Budget(9, "client, cached", (*hits, memory))]


async def _measure_hits() -> tuple[Goal, Goal]:
    ids = [documents.user_id(number) for number in range(WARM)]
    # Its own copies of the strings, as they come out of a queue: not those that the cache holds.
    asked = ["".join([*user_id]) for user_id in random.Random(9).choices(ids, k=READS)]  # noqa: S311
    async with _client_of(ids, [documents.encoded(number) for number in range(WARM)]) as client:
        await client.users.get_many(ids, timeout=60)
        lru = await caches.async_lru(asked)
        cashew = await caches.cashews(asked)
        variation = caches.launchdarkly()
        spent = await medians(
            ROUNDS,
            dict=_called(dict.fromkeys(ids).get, asked),
            peek=_called(client.users.peek, asked),
            get=_awaited(client.users.get, asked),
            async_lru=_awaited(lru, asked),
            cashews=_awaited(cashew, asked[: READS // 4]),
            launchdarkly=_called(variation, asked[: READS // 8]),
        )
        assert client.cache.stats.misses == WARM  # all others were hits
    us = {name: some.cpu * 1e6 for name, some in spent.items()}
    peers = {name: us[key] for name, key in _PEERS.items()}
    return (
        Goal(
            name="peek",
            figure=us["peek"],
            unit="µs",
            bound="≤",
            limit=0.2,
            of="figure",
            ceiling=us["dict"],
            beside="a dict's get",
        ),
        Goal(
            name="await get",
            figure=us["get"],
            unit="µs",
            bound="≤",
            limit=0.6,
            of="figure",
            ceiling=us["async_lru"],
            beside="async-lru",
            peers=peers,
        ),
    )


def _called(function: Callable[[str], object], ids: Sequence[str]) -> Case:
    async def case() -> Spent:
        with Stopwatch() as watch:
            for user_id in ids:
                function(user_id)
        return watch.per(len(ids))

    return case


def _awaited(function: Callable[[str], Awaitable[object]], ids: Sequence[str]) -> Case:
    async def case() -> Spent:
        with Stopwatch() as watch:
            for user_id in ids:
                await function(user_id)
        return watch.per(len(ids))

    return case


async def _measure_memory() -> tuple[float, float]:
    """Return the bytes of a document in the client, and as a decoded struct alone."""
    decode = msgspec.json.Decoder(User).decode
    ids = [documents.user_id(number) for number in range(HELD)]
    encoded = [documents.encoded(number) for number in range(HELD)]
    decode(encoded[0])  # what the first call of all makes is not counted
    with _Traced() as traced:
        kept = [decode(document) for document in encoded]
        own = traced.bytes()
        del kept
    async with _client_of(ids, encoded) as client:
        await client.users.get(ids[0])
        with _Traced() as traced:
            for start in range(0, HELD, _BATCH):
                await client.users.get_many(ids[start : start + _BATCH], timeout=60)
            held = traced.bytes()
        assert client.cache.stats.documents == HELD
    return held / HELD, own / HELD


class _Traced:
    """Counts the bytes that stay."""

    def __enter__(self) -> Self:
        gc.collect()
        tracemalloc.start()
        return self

    def __exit__(self, *_: object) -> None:
        tracemalloc.stop()

    def bytes(self) -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]


def _client_of(ids: Sequence[str], encoded: Sequence[bytes]) -> UserServiceClient:
    """Return a client of a service, in this process, that has these users."""
    users = dict(zip(ids, encoded, strict=True))

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            body = documents.success(users[request.url.path.rpartition("/")[2]])
            return httpx.Response(200, content=body, headers={"ETag": documents.ETAG})
        asked = msgspec.json.decode(request.content)["ids"]
        body = documents.batch(users[user_id] for user_id in asked)
        headers = {"X-Document-Tag": documents.DOCUMENT_TAG}
        return httpx.Response(200, content=body, headers=headers)

    return UserServiceClient(
        "http://users.bench",
        transport=httpx.MockTransport(answer),
        attempt_timeout=60,
        cache=CacheOptions(fresh_for=3600, max_stale=3600),  # none ages while it is measured
    )
