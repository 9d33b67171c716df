"""Owns the command line: which benchmarks there are, and in what order they run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from benchmarks import (
    client_cached,
    client_many,
    client_uncached,
    decisions,
    server_batches,
    server_cached,
    server_growth,
    server_registrations,
    server_stream,
    server_uncached,
    server_writes,
    start,
)
from benchmarks.budgets import Budget
from benchmarks.load import generator_used
from benchmarks.report import as_json, as_plot, as_table, loop, machine
from benchmarks.surroundings import RAISED, Surroundings

RESULTS = Path(__file__).with_name("results") / "latest.json"

Benchmark: TypeAlias = Callable[[Surroundings], list[Budget]]

# A benchmark is a function that is given what it may start or use, and returns the budgets that it
# has measured.
BENCHMARKS: dict[str, Benchmark] = {
    "server-cached": server_cached.measure,
    "server-uncached": server_uncached.measure,
    "server-writes": server_writes.measure,
    "server-registrations": server_registrations.measure,
    "server-stream": server_stream.measure,
    "server-batches": server_batches.measure,
    "decisions": decisions.measure,
    "client-cached": client_cached.measure,
    "client-uncached": client_uncached.measure,
    "client-many": client_many.measure,
    "start": start.measure,
    "server-growth": server_growth.measure,
}


def main() -> int:
    """Run the benchmarks that are named, or all; returns 1 if a budget is not met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(BENCHMARKS))
    parser.add_argument(
        "--json", type=Path, default=RESULTS, help="where the results go, and beside it their plot"
    )
    arguments = parser.parse_args()
    # Whoever installs with pip has bytecode: what is started here writes it, and then has it, too.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    names: list[str] = arguments.names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")

    began, load, begun, before = datetime.now(UTC), os.getloadavg(), time.monotonic(), loop()
    budgets: list[Budget] = []
    with Surroundings() as surroundings:
        for name in names:
            started = time.monotonic()
            budgets += BENCHMARKS[name](surroundings)
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    budgets.sort(key=lambda budget: budget.number)
    took = f"{time.monotonic() - begun:.0f} s"
    print(f"{machine()}, load before {load[0]:.1f} and after {os.getloadavg()[0]:.1f}, took {took}")
    loops = (before, loop())
    print(f"a fixed loop of Python: {loops[0]:.1f} ms before and {loops[1]:.1f} ms after")
    raised = ", ".join(f"{name}={value}" for name, value in RAISED.items())
    print(f"load: {generator_used()}; the service as it is shipped, but for {raised}\n")
    print(as_table(budgets))
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(as_json(budgets, began, (load[0], os.getloadavg()[0]), loops))
    arguments.json.with_suffix(".svg").write_text(as_plot(budgets, began))
    return not all(budget.met for budget in budgets)


if __name__ == "__main__":
    sys.exit(main())
