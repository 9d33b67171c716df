"""Budget 5: registrations at saturation, and who reads meanwhile.

The work is the hashing of passwords: the ceiling is how many the same core hashes when it does
nothing else, so registrations are measured alone, too. Reads are due at a rate (see `generator`),
as those of callers who do not know that others register.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from statistics import median

import msgspec
import psutil

from benchmarks import cores, documents, load
from benchmarks.budgets import Budget, Goal
from benchmarks.generator import Request, Window
from benchmarks.load import Load, Requests, Running, answered
from benchmarks.surroundings import Surroundings, warm_up

ROUNDS = 3
SECONDS = 3
CONNECTIONS = 32
READS = 200.0
"""A second."""
_MOST = 2000
"""More registrations than a round has time for."""


def measure(surroundings: Surroundings) -> list[Budget]:
    """Measure hashing, reads alone, registrations alone, and both at once, in turn."""
    server = surroundings.server
    numbers = itertools.count(1)
    reads = load.write(
        surroundings.directory / "reads",
        (_read(number, surroundings.headers) for number in range(documents.WARM)),
    )
    warm_up(server, surroundings.headers)
    hashed: list[float] = []
    alone: list[Window] = []
    meanwhile: list[Window] = []
    made: list[Load] = []
    beside: list[Load] = []
    rss: list[float] = []

    def register() -> Load:
        some = load.write(
            surroundings.directory / "registrations",
            (_registration(next(numbers), surroundings.headers) for _ in range(_MOST)),
            "once",
        )
        return load.put_on(server, some, connections=CONNECTIONS, seconds=SECONDS)

    for _ in range(ROUNDS):
        hashed.append(_hashing())
        alone.append(_finished(_reading(server, reads)))
        made.append(register())
        reading = _reading(server, reads)
        beside.append(register())
        meanwhile.append(_finished(reading))
        rss.append(psutil.Process(server.pid).memory_info().rss / 1e6)
    p99 = {
        name: median(window.quantile(0.99) for window in windows)
        for name, windows in (("alone", alone), ("meanwhile", meanwhile))
    }
    return [
        Budget(
            5,
            "register",
            (
                Goal(
                    name="at saturation",
                    figure=median(one.rate for one in made),
                    unit="users/s",
                    bound="≥",
                    limit=0.9,
                    ceiling=median(hashed),
                    beside="hashes/s on its core",
                    peers={
                        "busy": median(one.busy for one in made),
                        f"beside {READS:.0f} GETs/s": median(one.rate for one in beside),
                    },
                ),
                Goal(
                    name="p99 of GETs meanwhile",
                    figure=p99["meanwhile"] * 1e3,
                    unit="ms",
                    bound="≤",
                    limit=3,
                    ceiling=p99["alone"] * 1e3,
                    beside="alone",
                    peers={"p50": median(one.quantile(0.5) for one in meanwhile) * 1e3},
                ),
                # Flat: the last round leaves the memory as the first did.
                Goal(
                    name="memory after the last round",
                    figure=rss[-1],
                    unit="MB",
                    bound="≤",
                    limit=1.05,
                    ceiling=rss[0],
                    beside="after the first",
                ),
                answered(*made, *beside),
            ),
        )
    ]


def _registration(number: int, headers: dict[str, str]) -> Request:
    body = {
        "name": f"Newcomer {number}",
        "email": f"newcomer.{number}@example.org",
        "password": f"correct horse {number}",
        "preferences": {"email": True, "push": False},
    }
    return load.request("POST", "/api/v1/users/", headers, msgspec.json.encode(body))


def _read(number: int, headers: dict[str, str]) -> Request:
    return load.request("GET", f"/api/v1/users/{documents.user_id(number)}", headers)


def _hashing() -> float:
    command = [sys.executable, "-m", "benchmarks.hashing", str(SECONDS)]
    with cores.confined(cores.of_the_server()):
        return float(subprocess.check_output(command))


def _reading(server: Running, reads: Requests) -> subprocess.Popen[bytes]:
    command = load.generator_command(server.url, reads, connections=16, seconds=SECONDS, rate=READS)
    with cores.confined(cores.of_all_else()):
        return subprocess.Popen(command, stdout=subprocess.PIPE)


def _finished(reading: subprocess.Popen[bytes]) -> Window:
    said, _ = reading.communicate()
    assert reading.returncode == 0
    return msgspec.json.decode(said, type=Window)
