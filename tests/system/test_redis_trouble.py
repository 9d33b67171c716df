"""Redis stopped, restarted empty and paused under load: nobody fails, nobody waits for it."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from user_service_server.embedded import EmbeddedValkey

from ..servers import Server, serving
from .traffic import Traffic, register
from .trouble import bounded_in_time, paused, stopped, until

DUE_TO_REDIS = 0.150
"""Seconds that a request may take longer because of Redis (issue 2, point 6)."""
RECOVERS_WITHIN = 2.0
FROM_POSTGRES = "/api/v1/users?limit=1"
"""A request that does not need Redis."""


@pytest.fixture(scope="module")
def server(database_url: str, redis_url: str) -> Iterator[Server]:
    """A server that waits for Redis no longer than it does by default."""
    with serving(database_url, redis_url) as started:
        yield started


@pytest.fixture(scope="module")
async def users(server: Server) -> list[str]:
    users = await register(server.url, 8)
    # The pool of connections to Postgres grows when it is needed first, Redis or not.
    async with httpx.AsyncClient(base_url=server.url) as http:
        await asyncio.gather(*(http.get(FROM_POSTGRES) for _ in range(30)))
    return users


@pytest.fixture
async def traffic(server: Server, users: list[str]) -> AsyncIterator[Traffic]:
    async with Traffic(server.url, read=users, write=users[:4], control=FROM_POSTGRES) as running:
        yield running


async def health(url: str) -> tuple[int, str]:
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"{url}/health")
        health = answer.json()["data"]
        redis = health["dependencies"]["redis"]["status"]
        assert (redis == "up") == (health["status"] == "healthy"), health
        return answer.status_code, health["status"]


async def healthy_again(url: str) -> None:
    async def is_healthy() -> bool:
        return await health(url) == (200, "healthy")

    await until(is_healthy, RECOVERS_WITHIN)


def assert_nobody_noticed(traffic: Traffic, before: tuple[float, float]) -> None:
    """No request failed, and none took longer than one may take because of Redis."""
    # Unless the server itself is quick meanwhile, the control is no excuse for a slow answer.
    assert statistics.median(a.seconds for a in traffic.of("control", (0, float("inf")))) < 0.05
    failed = [answer for answer in traffic.answers if answer.status != 200]
    assert failed == []
    usual = {
        work: max(traffic.own_seconds(answer) for answer in traffic.of(work, before))
        for work in ("read", "write")
    }
    slow = [
        (answer, traffic.own_seconds(answer))
        for answer in traffic.answers
        if answer.work != "control"
        and traffic.own_seconds(answer) > DUE_TO_REDIS + max(0.0, usual[answer.work])
    ]
    assert slow == []


@bounded_in_time
async def test_redis_stopped_and_restarted_empty(
    server: Server, valkey: EmbeddedValkey, traffic: Traffic, chaos_seconds: float
) -> None:
    before = await traffic.go_on(1)
    async with stopped(valkey):
        await traffic.go_on(chaos_seconds / 2)
        assert await health(server.url) == (200, "degraded")
        await traffic.go_on(chaos_seconds / 2)
    await healthy_again(server.url)
    await traffic.go_on(chaos_seconds)
    assert_nobody_noticed(traffic, before)
    assert [answer for answer in traffic.answers if answer.behind] == []


@bounded_in_time
async def test_redis_restarted_at_once(
    server: Server, valkey: EmbeddedValkey, traffic: Traffic, chaos_seconds: float
) -> None:
    before = await traffic.go_on(1)
    await asyncio.to_thread(valkey.restart)
    await healthy_again(server.url)
    await traffic.go_on(chaos_seconds)
    assert_nobody_noticed(traffic, before)
    assert [answer for answer in traffic.answers if answer.behind] == []


@bounded_in_time
async def test_redis_paused_and_resumed(
    server: Server, valkey: EmbeddedValkey, traffic: Traffic, chaos_seconds: float
) -> None:
    before = await traffic.go_on(1)
    async with paused(valkey):
        await traffic.go_on(chaos_seconds / 2)
        assert await health(server.url) == (200, "degraded")
        await traffic.go_on(chaos_seconds / 2)
    await healthy_again(server.url)
    await traffic.go_on(chaos_seconds)
    assert_nobody_noticed(traffic, before)


async def test_write_while_redis_is_paused_is_read_afterwards(
    server: Server, valkey: EmbeddedValkey, users: list[str]
) -> None:
    async with httpx.AsyncClient(base_url=f"{server.url}/api/v1/users") as http:
        await http.get(f"/{users[7]}")
        async with paused(valkey):
            # Whoever meets it first: the server knows from then on that Redis does not answer.
            assert await health(server.url) == (200, "degraded")
            written = await http.patch(f"/{users[7]}", json={"name": "Written meanwhile"})
            assert written.status_code == 200
        await healthy_again(server.url)
        read = (await http.get(f"/{users[7]}")).json()["data"]
    assert read == written.json()["data"]


async def test_deletion_while_redis_is_paused_is_not_undone_afterwards(
    server: Server, valkey: EmbeddedValkey
) -> None:
    (user,) = await register(server.url, 1, prefix="gone")
    async with httpx.AsyncClient(base_url=f"{server.url}/api/v1/users") as http:
        await http.get(f"/{user}")
        async with paused(valkey):
            assert await health(server.url) == (200, "degraded")
            assert (await http.delete(f"/{user}")).status_code == 200
        await healthy_again(server.url)
        assert (await http.get(f"/{user}")).status_code == 404
