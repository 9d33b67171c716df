"""How much a caller may ask for: exactly, over several servers, and without Redis."""

from __future__ import annotations

import asyncio
import time
from asyncio import Future
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
import redis.asyncio
from user_service_server.app import create_app
from user_service_server.embedded import EmbeddedValkey
from user_service_server.errors import RateLimited
from user_service_server.http import limits as limits_module
from user_service_server.http.limits import MAX_SHARE, SHARE, RateLimits
from user_service_server.http.operations import Traffic
from user_service_server.metrics import Metrics
from user_service_server.settings import Settings
from user_service_server.storage.link import RedisLink
from user_service_server.storage.wire import Command, Wire

from ..engines import settings_for
from ..keys import EVERYTHING, REQUIRED, make_key, showing
from ..system.trouble import paused, stopped
from .test_users import assert_failed

LIST = "/api/v1/users"


@asynccontextmanager
async def limiting(
    database_url: str, redis_url: str, replicas: int, **others: str
) -> AsyncIterator[list[RateLimits]]:
    """Give the limits of several processes."""
    settings = settings_for(database_url, redis_url, **others)

    async def recognise(*_: object) -> None: ...

    async with AsyncExitStack() as stack:
        made = []
        for _ in range(replicas):
            link = RedisLink(settings, recognise)
            stack.push_async_callback(link.close)
            await link.start(5)
            made.append(RateLimits(settings, link, Metrics()))
        yield made


async def attempt(limits: RateLimits, caller: str, traffic: Traffic = Traffic.READ) -> bool:
    try:
        await limits.take(caller, traffic)
    except RateLimited:
        return False
    return True


@asynccontextmanager
async def two_services(
    database_url: str, redis_url: str, **others: str
) -> AsyncIterator[tuple[list[httpx.AsyncClient], Settings]]:
    settings = settings_for(database_url, redis_url, **REQUIRED, **others)
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(2):
            app = create_app(settings)
            await stack.enter_async_context(app.lifespan())
            transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # Litestar's ASGI types are narrower
            client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)
            clients.append(await stack.enter_async_context(client))
        yield clients, settings


async def test_of_four_hundred_at_once_over_two_servers_a_hundred_pass(
    database_url: str, redis_url: str
) -> None:
    async with two_services(database_url, redis_url, RATE_LIMIT_READ="100") as (both, settings):
        key = showing(await make_key(settings, "busy", *EVERYTHING))
        other = showing(await make_key(settings, "idle", *EVERYTHING))
        user = {"name": "A", "email": "limited@example.com", "password": "StrongPass123!"}
        created = await both[1].post("/api/v1/users/", json=user, headers=key)
        assert created.headers["RateLimit-Policy"].startswith('"write";')
        path = f"{LIST}/{created.json()['data']['id']}"
        answers = await asyncio.gather(*(both[i % 2].get(path, headers=key) for i in range(400)))
        assert Counter(answer.status_code for answer in answers) == {200: 100, 429: 300}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert_failed(refused, 429, "rate_limited")
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert refused.headers["RateLimit-Policy"] == '"read";q=100;w=60'
        assert refused.headers["RateLimit"].startswith('"read";r=0;t=')
        left = {
            int(answer.headers["RateLimit"].split("r=")[1].split(";")[0])
            for answer in answers
            if answer.is_success
        }
        assert left == set(range(100))
        # Another caller, and another class of the same one, are not concerned.
        assert (await both[0].get(path, headers=other)).status_code == 200
        changed = await both[1].patch(path, json={"name": "B"}, headers=key)
        assert changed.status_code == 200


@pytest.mark.parametrize("limit", [1, 100, 999, 5_000])
async def test_never_more_than_the_limit_pass_and_hardly_fewer(
    database_url: str, redis_url: str, limit: int
) -> None:
    async with limiting(database_url, redis_url, 2, RATE_LIMIT_READ=str(limit)) as replicas:
        caller = f"caller-{limit}"
        passed = 0
        for _ in range(20):
            tried = [attempt(replicas[i % 2], caller) for i in range(max(1, limit // 8))]
            passed += sum(await asyncio.gather(*tried))
        passed += sum([await attempt(replicas[i % 2], caller) for i in range(20)])
    if limit < SHARE:
        assert passed == limit
    assert limit - 2 * (limit // SHARE) <= passed <= limit


async def test_many_requests_of_a_caller_are_few_calls(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    call = Wire.call

    def counted(wire: Wire, commands: Sequence[Command]) -> Future[list[Any]]:
        nonlocal calls
        calls += 1
        return call(wire, commands)

    async with limiting(database_url, redis_url, 1) as [limits]:
        monkeypatch.setattr(Wire, "call", counted)
        for _ in range(1000):
            assert await attempt(limits, "hot")
        assert calls <= 1000 / MAX_SHARE + 2
        calls = 0
        await asyncio.gather(*(attempt(limits, f"another-{i % 5}") for i in range(1000)))
        assert calls <= 2


async def test_a_window_ends_and_another_begins(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits_module, "WINDOW", 1)
    windows = 3

    async def as_many_pass_in_each(limit: int) -> None:
        async with limiting(database_url, redis_url, 1, RATE_LIMIT_READ=str(limit)) as [limits]:
            for window in range(windows):
                tried = [attempt(limits, f"windows-{limit}") for _ in range(limit + 5)]
                assert sum(await asyncio.gather(*tried)) == limit
                if window < windows - 1:
                    await asyncio.sleep(1.05)

    await asyncio.gather(as_many_pass_in_each(3), as_many_pass_in_each(2_000))


async def test_a_counter_without_an_end_gets_one(database_url: str, redis_url: str) -> None:
    async with limiting(database_url, redis_url, 1, RATE_LIMIT_READ="5") as [limits]:
        async with redis.asyncio.Redis.from_url(redis_url) as connection:
            await connection.set("user-service:limit:read:endless", 100)
        assert not await attempt(limits, "endless")
        async with redis.asyncio.Redis.from_url(redis_url) as connection:
            assert 0 < await connection.pttl("user-service:limit:read:endless") <= 60_000


@pytest.mark.parametrize("name", ["a'b", "a b", "{a}", "]]", "'); redis.call('FLUSHALL') --"])
async def test_a_name_is_nothing_but_a_name(database_url: str, redis_url: str, name: str) -> None:
    async with limiting(database_url, redis_url, 1, RATE_LIMIT_READ="2") as [limits]:
        assert [await attempt(limits, name) for _ in range(4)] == [True, True, False, False]


async def test_who_gives_up_was_counted_and_disturbs_nobody(
    database_url: str, redis_url: str
) -> None:
    async with limiting(database_url, redis_url, 1, RATE_LIMIT_READ="10") as [limits]:
        tasks = [asyncio.create_task(attempt(limits, "hasty")) for _ in range(10)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert done[1:] == [True] * 9
        assert not await attempt(limits, "hasty")


async def test_without_redis_requests_pass_and_passwords_are_counted_here(
    database_url: str, redis_url: str, valkey: EmbeddedValkey
) -> None:
    limits_of = {"RATE_LIMIT_READ": "3", "RATE_LIMIT_CREDENTIALS": "3", "PASSWORD_FAILURES": "2"}
    for trouble in (stopped, paused):
        async with (
            limiting(database_url, redis_url, 1, **limits_of, REDIS_TIMEOUT_MS="100") as [limits],
            trouble(valkey),
        ):
            began = time.monotonic()
            read = [await attempt(limits, "sender") for _ in range(20)]
            tried = [await attempt(limits, "login", Traffic.CREDENTIALS) for _ in range(5)]
            took = time.monotonic() - began
            assert read == [True] * 20
            assert tried == [True] * 3 + [False] * 2
            for _ in range(2):
                await limits.take_strictly("password:x", 2, 900)
            with pytest.raises(RateLimited):
                await limits.take_strictly("password:x", 2, 900)
            await limits.give_back("password:x")
            assert took < 2, "the breaker lets nobody wait"
