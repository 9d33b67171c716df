"""Budget 13: how long it takes to import the client, and until a server takes requests."""

from __future__ import annotations

import subprocess
import sys
from statistics import median

from benchmarks.budgets import Budget, Goal
from benchmarks.surroundings import Surroundings
from benchmarks.timing import Spent

IMPORTS = 11
SERVES = 3
DEVS_AGAIN = 3

_IMPORT = """
from time import perf_counter, process_time
began = perf_counter()
import httpx, msgspec
between, cpu = perf_counter(), process_time()
import user_service_client
print(between - began, perf_counter() - between, process_time() - cpu)
"""


def measure(surroundings: Surroundings) -> list[Budget]:
    """Measure each a few times."""
    serves: list[Spent] = []
    for _ in range(SERVES):
        with surroundings.serve() as started:
            serves.append(started.start)
    first = [_dev(surroundings)]
    again = [_dev(surroundings) for _ in range(DEVS_AGAIN)]
    return [
        Budget(
            13,
            "start",
            (
                _bounded("serve ready", 1.5, serves),
                _bounded("dev first", 15, first),
                _bounded("dev again", 3, again),
                _measure_import(),
            ),
        )
    ]


def _bounded(name: str, limit: float, starts: list[Spent]) -> Goal:
    return Goal(
        name=name,
        figure=median(start.wall for start in starts),
        unit="s",
        bound="≤",
        limit=limit,
        of="figure",
        peers={"own CPU": median(start.cpu for start in starts)},
    )


def _dev(surroundings: Surroundings) -> Spent:
    """Return what it takes until `user-service dev` answers, on its own engines."""
    arguments = ("dev", "--data-dir", surroundings.directory / "dev")
    with surroundings.user_service(*arguments, environ={}) as started:
        return started.start


def _measure_import() -> Goal:
    base: list[float] = []
    added: list[float] = []
    added_cpu: list[float] = []
    for number in range(-1, IMPORTS):
        said = subprocess.check_output([sys.executable, "-c", _IMPORT], text=True)
        if number >= 0:  # the first may have written bytecode
            one, other, cpu = (float(seconds) * 1e3 for seconds in said.split())
            base.append(one)
            added.append(other)
            added_cpu.append(cpu)
    return Goal(
        name="import of the client",
        figure=median(added),
        unit="ms",
        bound="≤",
        limit=60,
        of="figure",
        ceiling=median(base),
        beside="httpx and msgspec",
        peers={"CPU": median(added_cpu)},
    )
