"""Owns how load is put on a server: many connections, each with one request at a time.

`wrk` makes it, whose own work is a few µs a request.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, TypeAlias

import psutil

from benchmarks import cores

_SCRIPT = Path(__file__).with_name("wrk.lua")

Order: TypeAlias = Literal["random", "in turn"]


class Running(NamedTuple):
    """A process that takes requests."""

    url: str
    pid: int

    def cpu(self) -> float:
        """Return the seconds of CPU time that it and its children have taken."""
        process = psutil.Process(self.pid)
        times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        return sum(one.user + one.system for one in times)


class Requests(NamedTuple):
    """A file of requests (see wrk.lua for its form), and how they are taken from it."""

    path: Path
    number: int
    order: Order


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a server did under load, in one round or as the median of several."""

    requests: int
    """Answered, in all rounds."""
    errors: int
    """Connections that failed, and answers of 400 and above, in all rounds."""
    rate: float
    """Answers a second."""
    p50: float
    """Seconds, as the generator saw it."""
    p99: float
    cpu: float
    """Seconds of CPU time of the server's processes for a request."""
    busy: float
    """Cores that the server kept busy: well below what it may use, it was not what was measured."""


Round: TypeAlias = Callable[[], Load]


def request(method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """Return the bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: bench"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def write(path: Path, requests: Iterable[bytes], order: Order = "random") -> Requests:
    """Write requests into a file."""
    number = 0
    with path.open("wb") as file:
        for one in requests:
            file.write(b"%d\n%b" % (len(one), one))
            number += 1
    return Requests(path, number, order)


def put_on(server: Running, requests: Requests, *, connections: int, seconds: int) -> Load:
    """Put load on a server for some (whole) seconds.

    Raises:
        RuntimeError: requests that are taken in turn did not last.
    """
    cpu = server.cpu()
    told = _wrk(server.url, requests, connections, seconds)
    cpu = server.cpu() - cpu
    answered, elapsed = told["requests"], told["microseconds"] / 1e6
    if requests.order == "in turn" and answered >= requests.number:
        raise RuntimeError(f"{requests.path.name}: {requests.number} requests are too few")
    return Load(
        requests=answered,
        errors=told["errors"],
        rate=answered / elapsed,
        p50=told["p50"] / 1e6,
        p99=told["p99"] / 1e6,
        cpu=cpu / max(1, answered),
        busy=cpu / elapsed,
    )


def medians(rounds: int, **cases: Round) -> dict[str, Load]:
    """Run all cases in turn, so many times, and return the median of each.

    One round more comes before, and does not count: caches are filled, and code is warm.
    """
    loads: dict[str, list[Load]] = {name: [] for name in cases}
    for number in range(-1, rounds):
        for name, case in cases.items():
            load = case()
            if number >= 0:
                loads[name].append(load)
    return {name: _median(some) for name, some in loads.items()}


def _median(loads: list[Load]) -> Load:
    return Load(
        requests=sum(load.requests for load in loads),
        errors=sum(load.errors for load in loads),
        rate=median(load.rate for load in loads),
        p50=median(load.p50 for load in loads),
        p99=median(load.p99 for load in loads),
        cpu=median(load.cpu for load in loads),
        busy=median(load.busy for load in loads),
    )


def _wrk(url: str, requests: Requests, connections: int, seconds: int) -> dict[str, int]:
    wrk = shutil.which("wrk")
    if wrk is None:
        raise RuntimeError("wrk is not there: apt-get install wrk")
    options = ["--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"]
    command = [wrk, *options, "--script", str(_SCRIPT), url, str(requests.path), requests.order]
    with cores.confined(cores.of_all_else()):
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told: dict[str, int] = json.loads(said.splitlines()[-1])
    return told
