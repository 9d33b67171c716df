"""Owns the trial of many subscribers on one server: latencies, CPU and memory."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol
from urllib.parse import urlsplit

import httpx
import psutil

from .subscribers import change, connected, insert_users
from .trouble import until

_PROGRAM = Path(__file__).with_name("crowd_process.py")
_WRITERS = 4


@dataclass(frozen=True)
class Phase:
    """What the crowd got in some seconds, and what that cost the server."""

    made: int
    """Changes that were committed."""
    received: int
    """By all who read."""
    p50: float
    """Seconds from the statement that made a change to its receipt."""
    p99: float
    most: float
    cpu: float
    """Of the server's process, as a share of one core."""
    rss: float
    """Megabytes of the server's process, at the end."""

    def __str__(self) -> str:
        return (
            f"{self.made} changes, {self.received} received: p50 {1000 * self.p50:.0f} ms,"
            f" p99 {1000 * self.p99:.0f}, most {1000 * self.most:.0f};"
            f" server: CPU {self.cpu:.0%}, RSS {self.rss:.0f} MB"
        )


class Followed(Protocol):
    """A running server."""

    @property
    def url(self) -> str:
        """Where it listens."""

    @property
    def pid(self) -> int:
        """Its process."""


class Crowd:
    """Many subscribers of one server, and who changes users meanwhile."""

    def __init__(
        self, server: Followed, database_url: str, process: asyncio.subprocess.Process
    ) -> None:
        self._server = psutil.Process(server.pid)
        self._url = server.url
        self._database_url = database_url
        self._process = process

    async def ask(self, command: str) -> dict[str, float]:
        """Let the crowd do something, and return what it says of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n".encode())
        answer: dict[str, float] = json.loads(await self._process.stdout.readline())
        return answer

    async def phase(self, users: Sequence[str], seconds: float, rate: float) -> Phase:
        """Change users at a rate, one in a transaction, and return what the readers got."""
        await self.ask("report")
        before = self._server.cpu_times()
        began = time.monotonic()
        made = await self._change(users, seconds, rate)
        elapsed = time.monotonic() - began
        after = self._server.cpu_times()
        rss = self.rss
        told = await self.ask("report")
        return Phase(
            made=made,
            received=int(told["received"]),
            p50=told["p50"],
            p99=told["p99"],
            most=told["most"],
            cpu=(after.user + after.system - before.user - before.system) / elapsed,
            rss=rss,
        )

    @property
    def rss(self) -> float:
        """Megabytes of the server's process."""
        return float(self._server.memory_info().rss) / 1e6

    async def wait_for_subscribers(self, count: int, within: float) -> None:
        """Return when the server has so many."""
        async with httpx.AsyncClient(base_url=self._url, timeout=10) as http:

            async def holds() -> bool:
                text = (await http.get("/metrics")).text
                return f"user_service_stream_subscribers {count}.0\n" in text

            await until(holds, within)

    async def wait_for_receipts(self, count: int, within: float) -> None:
        """Return when those who read have got so many changes more."""
        received = 0.0

        async def holds() -> bool:
            nonlocal received
            received += (await self.ask("report"))["received"]
            return received >= count

        await until(holds, within)

    async def _change(self, users: Sequence[str], seconds: float, rate: float) -> int:
        began = time.monotonic()

        async def write(writer: int) -> int:
            made = 0
            async with connected(self._database_url) as sql:
                while (due := began + (made * _WRITERS + writer) / rate) < began + seconds:
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    await change(sql, users[(made * _WRITERS + writer) % len(users)])
                    made += 1
            return made

        return sum(await asyncio.gather(*map(write, range(_WRITERS))))


@asynccontextmanager
async def gathered(
    server: Followed,
    database_url: str,
    count: int,
    slow: int,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[tuple[Crowd, list[str]]]:
    """Let `count` follow a server, of whom the last `slow` stop reading when told to.

    They send `headers`, where a server asks for a key.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(_PROGRAM),
        *(str(number) for number in (urlsplit(server.url).port, count, slow)),
        *(f"{name}: {value}" for name, value in headers.items()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with connected(database_url) as sql:
            users = await insert_users(sql, 100)
        crowd = Crowd(server, database_url, process)
        async with asyncio.timeout(60):
            assert await crowd.ask("connect") == {"following": count}
        yield crowd, users
    finally:
        process.kill()
        await process.wait()
