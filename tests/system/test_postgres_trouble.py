"""Postgres stopped, killed and paused under load: callers are told, and it recovers by itself."""

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from user_service_server.embedded import EmbeddedPostgres

from ..servers import Server
from .traffic import WRITERS, Answer, Traffic, register
from .trouble import bounded_in_time, killed, paused, stopped, until

AT_ONCE = 0.100
"""Seconds after which a write is refused (issue 2, point 6)."""
RECOVERS_WITHIN = 1.5
"""Seconds: two looks of the server at Postgres, and the time of the machine."""
NOTICED_WITHIN = 2.0
"""Seconds until the server knows of a Postgres that does not even refuse."""
TOLD_WITHIN = 10.0
"""Seconds for whoever was in the middle of a transaction when Postgres stopped answering."""


@pytest.fixture(scope="module")
async def users(server: Server) -> list[str]:
    return await register(server.url, 6)


@pytest.fixture
async def traffic(server: Server, users: list[str]) -> AsyncIterator[Traffic]:
    """Reads of cached users, and writes to others: a write takes its user out of the cache."""
    # A commit without an answer, of the test before, leaves all behind that is cached, for 10 s.
    async with asyncio.timeout(20):
        while await hits_of(server.url, users) < len(users):  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.2)
    async with Traffic(server.url, read=users[:3], write=users[3:]) as running:
        yield running


async def hits_of(url: str, users: list[str]) -> float:
    """Read users once; returns how many came from the cache."""

    async def hits() -> float:
        lines = (await http.get("/metrics")).text.splitlines()
        found = (
            line for line in lines if line.startswith('user_service_cache_reads_total{result="hit"')
        )
        return float(next(found).split()[-1])

    async with httpx.AsyncClient(base_url=url) as http:
        before = await hits()
        for user in users:
            assert (await http.get(f"/api/v1/users/{user}")).status_code == 200
        return await hits() - before


async def health(url: str) -> tuple[int, str, str]:
    """Return the status of `/health`, and what it says of the service and of Postgres."""
    async with httpx.AsyncClient(timeout=5) as http:
        answer = await http.get(f"{url}/health")
        data = answer.json()["data"]
        return answer.status_code, data["status"], data["dependencies"]["postgres"]["status"]


async def readiness(url: str) -> int:
    async with httpx.AsyncClient(timeout=5) as http:
        return (await http.get(f"{url}/health/ready")).status_code


async def first_write_after(traffic: Traffic, since: float) -> float:
    """Return how many seconds after `since` the first write was done."""

    def done() -> list[float]:
        return [a.ended for a in traffic.of("write", (since, float("inf"))) if a.status == 200]

    await until(lambda: done() != [], 10)
    return min(done()) - since


def is_refused(answer: Answer) -> bool:
    said = (answer.status, answer.code, answer.retry_after is not None)
    return said == (503, "dependency_unavailable", True)


def assert_reads_went_on(traffic: Traffic) -> None:
    assert [a for a in traffic.answers if a.work != "write" and a.status != 200] == []


def assert_writes_were_done_or_refused(traffic: Traffic) -> None:
    """No write crashed or was left without an answer."""
    writes = [a for a in traffic.answers if a.work == "write"]
    assert [a for a in writes if a.status != 200 and not is_refused(a)] == []


@bounded_in_time
async def test_postgres_stopped_and_started(
    server: Server, postgres: EmbeddedPostgres, traffic: Traffic, chaos_seconds: float
) -> None:
    await traffic.go_on(0.5)
    async with stopped(postgres):
        without = await traffic.go_on(chaos_seconds)
        assert await health(server.url) == (503, "unhealthy", "down")
        assert await readiness(server.url) == 200
    took = await first_write_after(traffic, time.monotonic())
    assert took < RECOVERS_WITHIN
    assert await health(server.url) == (200, "healthy", "up")
    await traffic.go_on(0.5)

    refused = traffic.of("write", without)
    assert refused
    assert [a for a in refused if not is_refused(a)] == []
    assert [a for a in refused if traffic.own_seconds(a) > AT_ONCE] == []
    assert_reads_went_on(traffic)
    assert_writes_were_done_or_refused(traffic)


@bounded_in_time
async def test_postgres_killed(
    server: Server, postgres: EmbeddedPostgres, traffic: Traffic, chaos_seconds: float
) -> None:
    await traffic.go_on(0.5)
    async with killed(postgres):
        without = await traffic.go_on(chaos_seconds / 2)
    took = await first_write_after(traffic, time.monotonic())
    assert took < RECOVERS_WITHIN
    await traffic.go_on(0.5)

    assert [a for a in traffic.of("write", without) if not is_refused(a)] == []
    assert_reads_went_on(traffic)
    assert_writes_were_done_or_refused(traffic)
    assert await health(server.url) == (200, "healthy", "up")


@bounded_in_time
async def test_postgres_restarted_at_once(postgres: EmbeddedPostgres, traffic: Traffic) -> None:
    await traffic.go_on(0.5)
    await asyncio.to_thread(postgres.restart)
    assert await first_write_after(traffic, time.monotonic()) < RECOVERS_WITHIN
    await traffic.go_on(0.5)
    assert_reads_went_on(traffic)
    assert_writes_were_done_or_refused(traffic)


@bounded_in_time
async def test_postgres_paused_and_resumed(
    server: Server, postgres: EmbeddedPostgres, traffic: Traffic, users: list[str]
) -> None:
    await traffic.go_on(0.5)
    async with paused(postgres):
        await traffic.go_on(NOTICED_WITHIN)
        assert await health(server.url) == (503, "unhealthy", "down")
        assert await readiness(server.url) == 200
        # The writers wait for what they began before; these come when it is known.
        async with Traffic(server.url, read=users[:3], write=users[3:]) as others:
            known = await others.go_on(1)
        refused = others.of("write", known)
        assert refused
        assert [a for a in refused if not is_refused(a)] == []
        assert [a for a in refused if others.own_seconds(a) > AT_ONCE] == []
        assert_reads_went_on(others)
        since = (known[0], float("inf"))
        await until(
            lambda: len([a for a in traffic.of("write", since) if is_refused(a)]) >= WRITERS,
            TOLD_WITHIN,
        )
    took = await first_write_after(traffic, time.monotonic())
    assert took < RECOVERS_WITHIN
    assert await health(server.url) == (200, "healthy", "up")
    assert_reads_went_on(traffic)
    failed = [a for a in traffic.answers if a.work == "write" and a.status != 200]
    assert {(a.status, a.retry_after is not None) for a in failed} == {(503, True)}


@bounded_in_time
async def test_crowd_at_a_paused_postgres_is_told_and_leaves_nothing_behind(
    server: Server, postgres: EmbeddedPostgres, users: list[str]
) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=20, limits=limits) as http:

        async def rename(number: int) -> tuple[int, float]:
            began = time.monotonic()
            answer = await http.patch(
                f"/api/v1/users/{users[number % 6]}", json={"name": f"N {number}"}
            )
            assert answer.headers.get("Retry-After") or answer.status_code == 200
            return answer.status_code, time.monotonic() - began

        async with paused(postgres):
            told = await asyncio.gather(*(rename(number) for number in range(100)))
        assert {status for status, _ in told} == {503}
        assert max(seconds for _, seconds in told) < TOLD_WITHIN

        async def is_renamed() -> bool:
            return (await rename(1))[0] == 200

        await until(is_renamed, RECOVERS_WITHIN)
        assert {status for status, _ in await asyncio.gather(*map(rename, range(10)))} == {200}
