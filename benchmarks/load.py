"""Owns how load is put on a server: many connections, each with one request at a time.

`wrk` makes it, whose own work is a few µs a request, or `generator` where that is not there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, TypeAlias

import msgspec
import psutil

from benchmarks import cores
from benchmarks.budgets import Goal
from benchmarks.generator import Request, Window

_SCRIPT = Path(__file__).with_name("wrk.lua")

PATIENCE = 10
"""Seconds after which who waits for an answer gives it up, as an error."""

Order: TypeAlias = Literal["random", "in turn", "once"]
"""In turn, they begin anew after the last; those that are sent once must last."""


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


def request(
    method: str, path: str, headers: Mapping[str, str], body: bytes = b"", *, kind: str = ""
) -> Request:
    """Return a request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", "Host: bench"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return Request(kind or method, "\r\n".join([*lines, "", ""]).encode() + body)


def write(path: Path, requests: Iterable[Request], order: Order = "random") -> Requests:
    """Write requests into a file."""
    number = 0
    with path.open("wb") as file:
        for one in requests:
            file.write(b"%d %b\n%b" % (len(one.text), one.kind.encode(), one.text))
            number += 1
    return Requests(path, number, order)


def generator_used() -> str:
    """Return what makes the load, for whoever reads the figures."""
    wrk = shutil.which("wrk")
    if wrk is None:
        return (
            "wrk is not there (Debian and Homebrew have it), so benchmarks/generator.py makes the"
            " load: it takes about as long for a request as the bare ceiling C0, whose rate is"
            " therefore too low here; the CPU times of the servers are as good"
        )
    return subprocess.run([wrk, "-v"], check=False, capture_output=True, text=True).stdout.split(
        " Copyright"
    )[0]


def put_on(server: Running, requests: Requests, *, connections: int, seconds: int) -> Load:
    """Put load on a server for some (whole) seconds.

    Raises:
        RuntimeError: requests that are to be sent once did not last.
    """
    cpu = server.cpu()
    make = _by_wrk if shutil.which("wrk") else _by_replacement
    made = make(server.url, requests, connections, seconds)
    cpu = server.cpu() - cpu
    if requests.order == "once" and made.requests >= requests.number:
        raise RuntimeError(f"{requests.path.name}: {requests.number} requests are too few")
    return Load(
        requests=made.requests,
        errors=made.errors,
        rate=made.requests / made.seconds,
        p50=made.p50,
        p99=made.p99,
        cpu=cpu / max(1, made.requests),
        busy=cpu / made.seconds,
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


def answered(*loads: Load) -> Goal:
    """Return the goal that no request failed."""
    requests = sum(load.requests for load in loads)
    return Goal(
        name="answered without error",
        figure=requests - sum(load.errors for load in loads),
        unit="requests",
        bound="≥",
        limit=1,
        ceiling=requests,
        beside="requests",
    )


def beside_peer(
    name: str, loads: Mapping[str, Load], case: str, limit: float, *, ceiling: str
) -> Goal:
    """Return the goal of so many times the peer's rate in a case of `loads`.

    The peer's is `peer_<case>`; that of the ceiling, if it has been measured, `bare_<case>`.
    """
    ours, peer, bare = loads[case], loads[f"peer_{case}"], loads.get(f"bare_{case}")
    return Goal(
        name=name,
        figure=ours.rate,
        unit="requests/s",
        bound="≥",
        limit=limit,
        ceiling=peer.rate,
        beside="P",
        cpu_ratio=peer.cpu / ours.cpu,
        peers={
            "CPU µs": ours.cpu * 1e6,
            "P CPU µs": peer.cpu * 1e6,
            "busy": ours.busy,
            "p99 ms": ours.p99 * 1e3,
            "P p99 ms": peer.p99 * 1e3,
            **({ceiling: bare.rate, f"{ceiling} CPU µs": bare.cpu * 1e6} if bare else {}),
        },
    )


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


class _Made(NamedTuple):
    """What the generator says."""

    requests: int
    errors: int
    seconds: float
    p50: float
    p99: float


def _by_wrk(url: str, requests: Requests, connections: int, seconds: int) -> _Made:
    options = ["--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"]
    options += ["--timeout", f"{PATIENCE}s"]
    command = ["wrk", *options, "--script", str(_SCRIPT), url, str(requests.path), requests.order]
    with cores.confined(cores.of_all_else()):
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told: dict[str, int] = json.loads(said.splitlines()[-1])
    p50, p99 = told["p50"] / 1e6, told["p99"] / 1e6
    return _Made(told["requests"], told["errors"], told["microseconds"] / 1e6, p50, p99)


def _by_replacement(url: str, requests: Requests, connections: int, seconds: int) -> _Made:
    command = generator_command(url, requests, connections=connections, seconds=seconds)
    with cores.confined(cores.of_all_else()):
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told = msgspec.json.decode(said, type=Window)
    return _Made(told.answered, told.errors, told.seconds, told.quantile(0.5), told.quantile(0.99))


def generator_command(
    url: str,
    requests: Requests,
    *,
    connections: int,
    seconds: float,
    window: float | None = None,
    rate: float | None = None,
) -> list[str]:
    """Return the command of `generator`."""
    command = [sys.executable, "-m", "benchmarks.generator", url, str(requests.path)]
    options = {"order": requests.order, "connections": connections, "seconds": seconds}
    options |= {} if window is None else {"window": window}
    options |= {} if rate is None else {"rate": rate}
    return command + [f"--{name}={value}" for name, value in options.items()]
