"""Owns the soak: mixed load for long, and what drifts.

    python -m benchmarks.soak --minutes 20

First it finds out how much of the mix the server can carry, and then asks for 70 % of that. Who
asks does not wait for others: latencies count from when a request was due (see `generator`).
Writes `results/soak.json` and, of the same figures, `results/soak.svg`.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import linear_regression, mean

import httpx
import msgspec
import psutil

from benchmarks import cores, documents, load, plot
from benchmarks.generator import UNIQUE, Request, Window
from benchmarks.load import Requests, Running
from benchmarks.report import machine
from benchmarks.surroundings import USERS, Surroundings

MIX = {"get": 80, "resolve": 10, "preferences": 5, "devices": 4, "register": 1}
"""Percent of the requests."""
SHARE = 0.7
"""Of what the server carries."""
CONNECTIONS = 64
RECIPIENTS = 20
"""Of one resolve."""
WINDOW = 10.0
"""Seconds of one point of the plot."""
CAPACITY_SECONDS = 20.0
_REQUESTS = 100_000
"""So many different ones, which are sent at random; of fewer, some would get more devices than a
user may have."""
_RESULTS = Path(__file__).with_name("results")


class Latencies(msgspec.Struct):
    """Milliseconds."""

    p50: float
    p99: float
    p999: float


class Sample(msgspec.Struct, kw_only=True):
    """What was seen in one window."""

    at: float = 0.0
    """Seconds since the beginning, at its end."""
    rate: float
    all: Latencies
    kinds: dict[str, Latencies]
    errors: int
    waiting: int
    cpu: float = 0.0
    """Cores that the server kept busy."""
    rss: float
    """Megabytes of the server's memory."""
    files: int
    """Open files of the server, connections included."""
    callers: int
    """Their connections."""
    postgres: int = 0
    """Connections to the database."""
    redis: int = 0


class Soak(msgspec.Struct):
    """The whole run."""

    machine: str
    date: str
    mix: dict[str, int]
    capacity: float
    """Requests a second, all connections busy."""
    rate: float
    """Requests a second that were asked for."""
    drift: dict[str, float]
    """How much each rose from the first tenth of the run to its end, as a share, along a line."""
    errors: int
    samples: list[Sample]


def main() -> None:
    """Run it as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--results", type=Path, default=_RESULTS)
    given = parser.parse_args()
    began = datetime.now(UTC)
    with Surroundings() as surroundings:
        server = surroundings.server
        requests = load.write(surroundings.directory / "mix", _mix(surroundings.headers))
        capacity = _capacity(server, requests)
        rate = SHARE * capacity
        print(f"capacity: {capacity:,.0f} requests/s of the mix", flush=True)
        samples = list(_samples(surroundings, server, requests, rate, given.minutes * 60))
    soak = Soak(
        machine=machine(),
        date=began.isoformat(timespec="seconds"),
        mix=MIX,
        capacity=round(capacity, 1),
        rate=round(rate, 1),
        drift={
            "p50": _drift(samples, lambda sample: sample.all.p50),
            "p99": _drift(samples, lambda sample: sample.all.p99),
            "rss": _drift(samples, lambda sample: sample.rss),
            "files": _drift(samples, lambda sample: sample.files),
        },
        errors=sum(sample.errors for sample in samples),
        samples=samples,
    )
    given.results.mkdir(exist_ok=True)
    (given.results / "soak.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(soak)) + b"\n"
    )
    (given.results / "soak.svg").write_text(_plotted(soak))
    print(f"drift: {soak.drift}, errors: {soak.errors}")


def _mix(headers: dict[str, str]) -> Iterator[Request]:
    chance = random.Random(7)  # noqa: S311
    for kind in chance.choices(list(MIX), list(MIX.values()), k=_REQUESTS):
        user = f"/api/v1/users/{documents.user_id(chance.randrange(USERS))}"
        unique = UNIQUE.decode()
        body: dict[str, object]
        match kind:
            case "get":
                warm = documents.user_id(chance.randrange(documents.WARM))
                yield load.request("GET", f"/api/v1/users/{warm}", headers, kind=kind)
                continue
            case "resolve":
                some = chance.sample(range(documents.WARM), RECIPIENTS)
                ids = [documents.user_id(number) for number in some]
                method, path = "POST", "/api/v1/deliveries/resolve"
                body = {"channel": "push", "user_ids": ids, "category": "marketing"}
            case "preferences":
                # Few people, so that most of it changes something: others have said otherwise.
                hot = documents.user_id(chance.randrange(documents.WARM // 5))
                method, path = "PATCH", f"/api/v1/users/{hot}/preferences"
                body = {"quiet_hours_start": f"2{chance.randrange(4)}:{chance.randrange(60):02}"}
            case "devices":
                method, path = "POST", f"{user}/devices"
                body = {"token": unique * 10, "platform": "android", "app": "shop"}
            case _:
                method, path = "POST", "/api/v1/users/"
                body = {
                    "name": "Newcomer",
                    "email": f"newcomer.{unique}@example.org",
                    "password": f"correct horse {unique}",
                }
        yield load.request(method, path, headers, msgspec.json.encode(body), kind=kind)


def _capacity(server: Running, requests: Requests) -> float:
    """Return how many requests of the mix are answered in a second, whoever asks at once."""
    command = load.generator_command(
        server.url, requests, connections=CONNECTIONS, seconds=CAPACITY_SECONDS
    )
    with cores.confined(cores.of_all_else()):
        told = msgspec.json.decode(subprocess.check_output(command), type=Window)
    # Some may be refused at saturation: those were not carried.
    return (told.answered - told.errors) / told.seconds


def _samples(
    surroundings: Surroundings, server: Running, requests: Requests, rate: float, seconds: float
) -> Iterator[Sample]:
    command = load.generator_command(
        server.url, requests, connections=CONNECTIONS, seconds=seconds, window=WINDOW, rate=rate
    )
    with cores.confined(cores.of_all_else()):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    at, cpu = 0.0, server.cpu()
    try:
        for line in process.stdout:
            window = msgspec.json.decode(line, type=Window)
            at, before, cpu = at + window.seconds, cpu, server.cpu()
            sample = _sample(server, window)
            sample.at, sample.cpu = round(at, 1), round((cpu - before) / window.seconds, 3)
            sample.postgres, sample.redis = surroundings.connections()
            seen = sample.all
            print(
                f"{at:5.0f} s: {sample.rate:,.0f}/s, p50 {seen.p50:.1f} ms, p99 {seen.p99:.1f},"
                f" p99.9 {seen.p999:.1f}, {sample.errors} errors, {sample.rss:.0f} MB",
                file=sys.stderr,
                flush=True,
            )
            yield sample
    finally:
        process.terminate()
        process.wait()


def _sample(server: Running, window: Window) -> Sample:
    process = psutil.Process(server.pid)
    port = httpx.URL(server.url).port
    return Sample(
        rate=round(window.answered / window.seconds, 1),
        all=_latencies(window, None),
        kinds={kind: _latencies(window, kind) for kind in MIX},
        errors=window.errors,
        waiting=window.waiting,
        rss=round(process.memory_info().rss / 1e6, 1),
        files=process.num_fds(),
        callers=sum(
            1
            for one in process.net_connections("tcp")
            if one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port
        ),
    )


def _latencies(window: Window, kind: str | None) -> Latencies:
    return Latencies(
        *(round(window.quantile(share, kind) * 1e3, 3) for share in (0.5, 0.99, 0.999))
    )


def _drift(samples: list[Sample], value: Callable[[Sample], float]) -> float:
    """Return how much a figure rises over the run, along the line that fits best, as a share."""
    # Not of the first tenth, in which caches and pools fill.
    settled = samples[len(samples) // 10 :]
    if len(settled) < 2:
        return 0.0
    times, values = [sample.at for sample in settled], list(map(value, settled))
    slope, _ = linear_regression(times, values)
    return round(slope * (times[-1] - times[0]) / mean(values), 4)


def _plotted(soak: Soak) -> str:
    samples = soak.samples

    def line(name: str) -> list[float]:
        return [float(getattr(sample, name)) for sample in samples]

    def lines(latencies: Callable[[Sample], Latencies]) -> dict[str, list[float]]:
        return {
            "p99.9": [latencies(sample).p999 for sample in samples],
            "p99": [latencies(sample).p99 for sample in samples],
            "p50": [latencies(sample).p50 for sample in samples],
        }

    title = f"{soak.rate:,.0f} requests/s, {SHARE:.0%} of capacity: {soak.date}, {soak.machine}"
    return plot.svg(
        title,
        line("at"),
        [
            plot.Panel("all requests, ms", lines(lambda sample: sample.all), log=True),
            plot.Panel("GETs, ms", lines(lambda sample: sample.kinds["get"]), log=True),
            plot.Panel("answers a second", {"answers": line("rate")}),
            plot.Panel("memory of the server, MB", {"memory": line("rss")}),
            plot.Panel(
                "open files and connections",
                {name: line(name) for name in ("files", "callers", "postgres", "redis")},
            ),
            plot.Panel("cores that the server kept busy", {"busy": line("cpu")}),
        ],
    )


if __name__ == "__main__":
    main()
