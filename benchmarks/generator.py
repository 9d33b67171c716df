"""Owns the load that wrk cannot make: requests that are due at a rate, whoever is still waiting.

    python -m benchmarks.generator URL FILE --order random --connections 64 --seconds 10 --rate 500

Latency counts from the time at which a request was due, so that a server which stops for a second
is charged for all who would have asked meanwhile. Prints a line of JSON for each window. Without a
rate each connection asks again as soon as it is answered; so it stands in where wrk is not there.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import msgspec
import uvloop

UNIQUE = b"~unique-number~~"
"""Stands in a request for as many digits, which are others each time it is sent."""
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_STEPS = 50
"""Steps of a histogram of latencies for each factor of e: 2 % each."""


class Request(NamedTuple):
    """What is sent, and the name under which its answers are counted."""

    kind: str
    text: bytes


def read(path: Path) -> list[Request]:
    """Read a file of requests; see wrk.lua."""
    requests = []
    with path.open("rb") as file:
        while line := file.readline():
            length, _, kind = line.decode().strip().partition(" ")
            requests.append(Request(kind, file.read(int(length))))
    return requests


class Histogram:
    """Counts latencies in steps of 2 %."""

    def __init__(self, counts: dict[int, int] | None = None) -> None:
        self.counts = Counter(counts or {})

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[math.floor(math.log(max(seconds, 1e-6)) * _STEPS)] += 1

    def quantile(self, share: float) -> float:
        """Return the latency, in seconds, that this share of all did not exceed."""
        left = share * self.counts.total()
        for step in sorted(self.counts):
            left -= self.counts[step]
            if left <= 0:
                return math.exp((step + 0.5) / _STEPS)
        return 0.0


class Window(msgspec.Struct):
    """What came within some seconds."""

    seconds: float = 0.0
    latencies: dict[str, dict[int, int]] = msgspec.field(default_factory=dict)
    """The histogram of each kind."""
    statuses: dict[int, int] = msgspec.field(default_factory=dict)
    broken: int = 0
    """Connections that the server closed."""
    waiting: int = 0
    """Requests that were due, and for which no connection was free, when it ended."""

    def add(self, kind: str, latency: float, status: int) -> None:
        """Count an answer."""
        counts = self.latencies.setdefault(kind, {})
        step = math.floor(math.log(max(latency, 1e-6)) * _STEPS)
        counts[step] = counts.get(step, 0) + 1
        self.statuses[status] = self.statuses.get(status, 0) + 1

    @property
    def answered(self) -> int:
        """How many were answered."""
        return sum(self.statuses.values())

    @property
    def errors(self) -> int:
        """Connections that failed, and answers of 400 and above."""
        return self.broken + sum(n for status, n in self.statuses.items() if status >= 400)

    def quantile(self, share: float, kind: str | None = None) -> float:
        """Return the latency, in seconds, that this share of all, or of a kind, did not exceed."""
        kinds = self.latencies.values() if kind is None else [self.latencies.get(kind, {})]
        counts: Counter[int] = sum(map(Counter, kinds), Counter())
        left = share * counts.total()
        for step in sorted(counts):
            left -= counts[step]
            if left <= 0:
                return math.exp((step + 0.5) / _STEPS)
        return 0.0


class _Due(NamedTuple):
    at: float
    request: Request


class _Connection(asyncio.Protocol):
    """One connection, with at most one request under way."""

    def __init__(self, generator: _Generator) -> None:
        self._generator = generator
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._expected: int | None = None
        self.due: _Due | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._generator.lost(self)

    def send(self, due: _Due) -> None:
        assert self._transport is not None
        self.due = due
        text = due.request.text
        if UNIQUE in text:
            text = text.replace(UNIQUE, b"%016d" % next(self._generator.numbers))
        self._transport.write(text)

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data if self._received else data
        if self._expected is None:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(received, 0, end)
            self._expected = end + 4 + (int(length[1]) if length else 0)
        if len(received) >= self._expected:
            self._received, self._expected = b"", None
            self._generator.answered(self, int(received[9:12]))


class _Generator:
    def __init__(self, requests: list[Request], *, at_random: bool, rate: float | None) -> None:
        self._chosen = self._choose(requests, at_random=at_random)
        self._rate = rate
        # Asked in turn: the service ends a connection that is idle for 75 s.
        self._idle: deque[_Connection] = deque()
        self._waiting: deque[_Due] = deque()
        self._ended = False
        self._window = Window()
        # Others in each run, and of as many digits.
        self.numbers = iter(range(time.time_ns() // 1000 % 10**16, 10**16))

    @staticmethod
    def _choose(requests: list[Request], *, at_random: bool) -> Iterator[Request]:
        while True:
            yield from random.choices(requests, k=10_000) if at_random else requests  # noqa: S311

    async def run(self, url: str, connections: int, seconds: float, window: float) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        assert address.port is not None
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            _, connection = await loop.create_connection(
                lambda: _Connection(self), address.hostname, address.port
            )
            self._idle.append(connection)
        last = began = time.monotonic()
        making = asyncio.create_task(self._make())
        for number in range(1, round(seconds / window) + 1):
            await asyncio.sleep(began + number * window - time.monotonic())
            done, self._window = self._window, Window()
            done.waiting = len(self._waiting)
            now = time.monotonic()
            done.seconds, last = now - last, now
            print(msgspec.json.encode(done).decode(), flush=True)
        self._ended = True
        making.cancel()

    async def _make(self) -> None:
        if self._rate is None:
            for connection in self._idle:
                connection.send(_Due(time.monotonic(), next(self._chosen)))
            return
        due = time.monotonic()
        while True:
            # As independent callers ask: their gaps are of all lengths.
            due += random.expovariate(self._rate)
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            one = _Due(due, next(self._chosen))
            if self._idle:
                self._idle.popleft().send(one)
            else:
                self._waiting.append(one)

    def answered(self, connection: _Connection, status: int) -> None:
        now, due, connection.due = time.monotonic(), connection.due, None
        assert due is not None
        self._window.add(due.request.kind, now - due.at, status)
        if self._ended:
            return
        if self._rate is None:
            connection.send(_Due(now, next(self._chosen)))
        elif self._waiting:
            connection.send(self._waiting.popleft())
        else:
            self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        if not self._ended:
            self._window.broken += 1
            if connection in self._idle:
                self._idle.remove(connection)


def main() -> None:
    """Run it as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generator")
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("--order", default="random")
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--window", type=float, help="seconds; default: all")
    parser.add_argument("--rate", type=float, help="requests a second")
    given = parser.parse_args()
    generator = _Generator(read(given.file), at_random=given.order == "random", rate=given.rate)
    window = given.window or given.seconds
    uvloop.run(generator.run(given.url, given.connections, given.seconds, window))


if __name__ == "__main__":
    main()
