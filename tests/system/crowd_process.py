"""Owns many lean subscribers, in a process of their own.

    python crowd_process.py PORT COUNT SLOW [HEADER ...]

Reads a command a line and answers with a line of JSON: `connect`, `report` (what those who read got
since the last one), and `stop` (the last SLOW read no more, from now on).
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import socket
import sys
import time
from collections.abc import Sequence
from datetime import datetime

_REQUEST = ("GET /api/v1/changes/stream HTTP/1.1", "Host: crowd")
_CHANGED_AT = re.compile(rb'"kind":"[a-z.]+","at":"([^"]+)"')
_AT_ONCE = 50
_QUIET = 0.5
"""Seconds after which nothing more is on its way."""


class _Subscriber(asyncio.Protocol):
    def __init__(self, crowd: _Crowd) -> None:
        self._crowd = crowd
        self._begins = True
        self._rest = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._crowd.request)

    def data_received(self, data: bytes) -> None:
        if self._begins and b"event: heartbeat" in data:
            self._begins = False
            self._crowd.one_more()
        # Who reads the same gets the same pieces, so that most are parsed once for all.
        whole, end, self._rest = (self._rest + data).rpartition(b"\n\n")
        self._crowd.last_at = time.monotonic()
        if end:
            self._crowd.chunks.append((time.time(), whole))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._crowd.lost += 1


class _Crowd:
    def __init__(self, port: int, count: int, slow: int, headers: Sequence[str]) -> None:
        self.request = "\r\n".join([*_REQUEST, *headers, "", ""]).encode()
        self._port = port
        self._count = count
        self._slow = slow
        self._subscribers: list[_Subscriber] = []
        self._following = 0
        self._complete = asyncio.Event()
        self.chunks: list[tuple[float, bytes]] = []
        self.lost = 0
        self.last_at = 0.0

    def one_more(self) -> None:
        self._following += 1
        if self._following == self._count:
            self._complete.set()

    async def connect(self) -> dict[str, float]:
        for first in range(0, self._count, _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, self._count))
            await asyncio.gather(*(self._join(number) for number in numbers))
        await self._complete.wait()
        return {"following": self._following}

    async def _join(self, number: int) -> None:
        connection = socket.socket()
        if number >= self._count - self._slow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", self._port))
        subscriber = _Subscriber(self)
        await loop.create_connection(lambda: subscriber, sock=connection)
        self._subscribers.append(subscriber)

    def stop(self) -> dict[str, float]:
        for subscriber in self._subscribers[self._count - self._slow :]:
            assert subscriber.transport is not None
            subscriber.transport.pause_reading()
        return {"stopped": self._slow}

    async def report(self) -> dict[str, float]:
        """Wait for what is on its way, and say what came; times are seconds from its statement."""
        # Nothing tells that nothing comes any more.
        while (left := self.last_at + _QUIET - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        chunks, self.chunks = self.chunks, []
        made: dict[bytes, list[float]] = {}
        lags: list[float] = []
        for at, data in chunks:
            if data not in made:
                found = _CHANGED_AT.findall(data)
                made[data] = [datetime.fromisoformat(t.decode()).timestamp() for t in found]
            lags += [at - then for then in made[data]]
        lags.sort()
        quantiles = {
            name: lags[int(share * (len(lags) - 1))] if lags else 0.0
            for name, share in (("p50", 0.5), ("p99", 0.99), ("most", 1.0))
        }
        return {"received": len(lags), "lost": self.lost, **quantiles}


async def _run(port: int, count: int, slow: int, headers: Sequence[str]) -> None:
    crowd = _Crowd(port, count, slow, headers)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        if line == "connect":
            answer = await crowd.connect()
        else:
            answer = crowd.stop() if line == "stop" else await crowd.report()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    port, count, slow = map(int, sys.argv[1:4])
    asyncio.run(_run(port, count, slow, sys.argv[4:]))
