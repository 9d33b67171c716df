"""Servers behind Debian's haproxy, restarted one by one under load: no request is lost."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from ..programs import running as running_program
from ..servers import Server, free_port
from ..system.subscribers import Received, faults, follow
from ..system.traffic import Traffic, register
from ..system.trouble import until
from .replicas import running
from .test_coherence import SECONDS

CONFIGURATION = Path(__file__).parents[2] / "examples" / "haproxy.cfg"


class Balanced(NamedTuple):
    """Servers, and the one address of all."""

    servers: list[Server]
    url: str


@pytest.fixture
async def balanced(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Balanced]:
    settings = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "SHUTDOWN_GRACE": "5"}
    async with running(Server(settings), Server(settings)) as servers:
        port = free_port()
        environ = {
            "FRONT": f"127.0.0.1:{port}",
            "SERVER_A": f"127.0.0.1:{servers[0].port}",
            "SERVER_B": f"127.0.0.1:{servers[1].port}",
        }
        with running_program(
            "haproxy",
            *("-db", "-f", str(CONFIGURATION)),
            port=port,
            log=tmp_path / "haproxy.log",
            environ=environ,
        ):
            yield Balanced(servers, f"http://127.0.0.1:{port}")


async def follow_on(url: str, received: Received) -> None:
    """Follow the feed, and go on from the last event wherever the stream ended."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        while True:
            with suppress(httpx.TransportError):
                async with aclosing(follow(http, received.cursor)) as events:
                    async for event in events:
                        if event.name == "change":
                            received.note(event.data, event.at)
                        elif event.name == "ready":
                            received.cursor = event.id
                        received.resets += event.name == "reset"


async def test_a_rolling_restart_loses_no_request_and_no_event(balanced: Balanced) -> None:
    received = Received()
    following = asyncio.create_task(follow_on(balanced.url, received))
    await until(lambda: received.cursor is not None, 10)
    users = await register(balanced.url, 12)
    times, end = 0, time.monotonic() + SECONDS
    async with Traffic(balanced.url, read=users[:6], write=users[6:]) as traffic:
        await traffic.go_on(1)
        while times < 2 or time.monotonic() < end:
            server = balanced.servers[times % 2]
            assert await asyncio.to_thread(server.stop) == 0
            await asyncio.to_thread(server.start)
            await traffic.go_on(1.5)
            times += 1
    made = [
        (user, version)
        for user in users
        for version in range(1, traffic.acknowledged.get(user, 1) + 1)
    ]
    await until(lambda: set(made) <= set(received.changes), 10)
    following.cancel()
    print(f"\n{len(traffic.answers)} requests, {len(made)} changes, {times} restarts")  # noqa: T201 - the figures are asked for
    assert [answer for answer in traffic.answers if answer.status != 200] == []
    assert faults(received.changes, made) == []
    assert received.resets == 0
