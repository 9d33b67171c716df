"""Owns how results are shown: as a table for people, and as JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from benchmarks import plot
from benchmarks.budgets import Budget, Goal


def machine() -> str:
    """Return the class of this machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{os.cpu_count()} cores ({model}), {platform.system()}, {python}"


def loop() -> float:
    """Return the ms of a fixed loop of Python: how fast this interpreter and this hour are.

    One that was built without profile-guided optimization, as pyenv's are by default, takes a third
    longer than one that was, as those of the official images and of distributions are.
    """
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        digits = 0
        for number in range(100_000):
            digits += len(str(number))
        best = min(best, time.perf_counter() - began)
    return best * 1e3


def as_table(budgets: Sequence[Budget]) -> str:
    """Return a line for each goal."""
    rows: list[tuple[str, ...]] = [
        ("budget", "figure", "ceiling or peer", "ratio", "(CPU)", "goal", "met")
    ]
    for budget in budgets:
        rows += [_row(budget, goal) for goal in budget.goals]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * sum(widths), *lines[1:]])


def _row(budget: Budget, goal: Goal) -> tuple[str, ...]:
    beside = [] if goal.ceiling is None else [f"{_number(goal.ceiling)} {goal.beside}"]
    beside += [f"{name} {_number(figure)}" for name, figure in (goal.peers or {}).items()]
    return (
        f"{budget.number} {budget.name}: {goal.name}",
        f"{_number(goal.figure)} {goal.unit}",
        ", ".join(beside),
        "" if goal.ratio is None else f"{goal.ratio:.2f}",
        "" if goal.cpu_ratio is None else f"{goal.cpu_ratio:.2f}",
        goal.goal,
        "yes" if goal.met else "NO",
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def as_json(
    budgets: Sequence[Budget],
    began: datetime,
    load: tuple[float, float],
    loops: tuple[float, float],
) -> str:
    """Return all results: an entry a budget, which is that of its tightest goal, and all goals.

    `load` averages and `loops` (see `loop`) are of before and after.
    """
    entries = [
        {
            **_entry(f"{budget.number} {budget.name}: {budget.tightest.name}", budget.tightest),
            "met": budget.met,
            "goals": [_entry(goal.name, goal) for goal in budget.goals],
        }
        for budget in budgets
    ]
    results = {
        "machine": machine(),
        "date": began.isoformat(timespec="seconds"),
        "load": load,
        "loop_ms": [_rounded(each) for each in loops],
        "budgets": entries,
    }
    return json.dumps(results, indent=2, ensure_ascii=False) + "\n"


def as_plot(budgets: Sequence[Budget], began: datetime) -> str:
    """Return how much of each goal is spent, as SVG."""
    shares = {
        f"{budget.number} {budget.name}: {goal.name}": goal.used
        for budget in budgets
        for goal in budget.goals
    }
    when = began.isoformat(sep=" ", timespec="minutes")
    return plot.bars(f"Of each budget is spent (1: all of it): {when}, {machine()}", shares)


def _entry(name: str, goal: Goal) -> dict[str, object]:
    return {
        "name": name,
        "figure": _rounded(goal.figure),
        "ceiling": _rounded(goal.ceiling),
        "ratio": _rounded(goal.ratio),
        "goal": goal.goal,
        "met": goal.met,
        "unit": goal.unit,
        "beside": goal.beside,
        "cpu_ratio": _rounded(goal.cpu_ratio),
        "peers": {peer: _rounded(figure) for peer, figure in (goal.peers or {}).items()},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
