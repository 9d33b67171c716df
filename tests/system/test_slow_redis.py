"""A Redis that answers late, but in time: what a request waits for it in all."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import redis

from ..engines import open_dir
from ..servers import Server
from .traffic import register
from .trouble import bounded_in_time

LATE = 0.022
"""Seconds that each answer of Redis is held back: within the 0.033 that one call may take."""
MOST = 0.150
"""Seconds that a request may take because of Redis (issue 2, point 6)."""


class LateRedis:
    """A socket before Redis that holds back what it answers, by `late` seconds."""

    def __init__(self, target: str, path: Path) -> None:
        self.url = f"unix://{path}?db=0"
        self.late = 0.0
        self._path = path
        self._target = urlsplit(target).path
        self._connections: list[asyncio.Task[object]] = []

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(self._connected, self._path)
        try:
            yield
        finally:
            server.close()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.append(task)
        redis_reader, redis_writer = await asyncio.open_unix_connection(self._target)
        forwarding = asyncio.create_task(_forward(reader, redis_writer))
        try:
            while data := await redis_reader.read(65536):
                await asyncio.sleep(self.late)
                writer.write(data)
        finally:
            writer.close()
            await forwarding


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        # The service is killed in the end, and may leave something that it has not read.
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
    finally:
        writer.close()
        await writer.wait_closed()


@bounded_in_time
async def test_no_request_waits_for_a_slow_redis_once_for_each_call(
    database_url: str, redis_url: str
) -> None:
    with open_dir() as directory:
        late = LateRedis(redis_url, directory / "late.sock")
        server = Server({"DATABASE_URL": database_url, "REDIS_URL": late.url})
        async with late.listening():
            server.start(wait=False)
            await asyncio.to_thread(server.wait_until_ready)
            users = await register(server.url, 4)
            with redis.Redis.from_url(redis_url) as connection:
                connection.flushdb()
            async with httpx.AsyncClient(base_url=f"{server.url}/api/v1/users") as http:
                late.late = LATE
                took = []
                for user in users:
                    began = time.monotonic()
                    assert (await http.get(f"/{user}")).status_code == 200
                    took.append(time.monotonic() - began)
                    began = time.monotonic()
                    answer = await http.patch(f"/{user}", json={"name": "Renamed"})
                    assert answer.status_code == 200
                    took.append(time.monotonic() - began)
            await asyncio.to_thread(server.kill)
        server.log.unlink()
    # The quickest of each kind that asked Redis: others may have met a busy machine.
    for kind in (took[0::2], took[1::2]):
        assert min(seconds for seconds in kind if seconds > LATE) < MOST
