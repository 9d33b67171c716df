"""Budget 7: what a user costs among a million, beside the same among ten thousand.

One caller asks at a time, of whom the p50 is taken: what grows is the way to a row, and that many
rows are not in PostgreSQL's memory, which is as it is shipped.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import httpx
import msgspec

from benchmarks import cores, documents, load, population
from benchmarks.budgets import Budget, Goal
from benchmarks.generator import Request
from benchmarks.load import Load, Order, Requests, Running, answered
from benchmarks.surroundings import SERVICE, Surroundings

FEW, MANY = 10_000, 1_000_000
ROUNDS = 4
SECONDS = 1
LIMIT = 1.25
PAGE = 50
PAGES = 40
_MOST = 5_000
"""More than one caller reads from PostgreSQL in a round."""


@dataclass(frozen=True)
class Place:
    """A server of so many users."""

    users: int
    server: Running
    headers: dict[str, str]


def measure(surroundings: Surroundings) -> list[Budget]:
    """Load both databases, and measure each kind of read in turn on both."""
    with ExitStack() as stack:
        few, many = (_place(surroundings, stack, users) for users in (FEW, MANY))
        loads: dict[str, Load] = {}
        for name, (requests, order, cold) in _KINDS.items():
            put = partial(_put, surroundings, cold=cold)
            files = {
                place.users: load.write(
                    surroundings.directory / f"{name}-{place.users}", requests(place), order
                )
                for place in (few, many)
            }
            both = load.medians(
                ROUNDS,
                few=partial(put, few.server, files[FEW]),
                many=partial(put, many.server, files[MANY]),
            )
            loads |= {f"{name}, {size}": one for size, one in both.items()}
    goals = [_goal(name, loads[f"{name}, few"], loads[f"{name}, many"]) for name in _KINDS]
    return [Budget(7, f"{MANY:,} users", (*goals, answered(*loads.values())))]


def _place(surroundings: Surroundings, stack: ExitStack, users: int) -> Place:
    began = time.monotonic()
    engines = surroundings.new_database(f"users_{users}")
    asyncio.run(population.load(engines.database_url, range(users)))
    print(f"{users:,} users loaded: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    started = surroundings.serve(
        confined_to=cores.of_the_server(), database_url=engines.database_url
    )
    running = stack.enter_context(started).running
    return Place(users, running, surroundings.headers_for(engines))


def _put(surroundings: Surroundings, server: Running, requests: Requests, *, cold: bool) -> Load:
    if cold:
        surroundings.forget(SERVICE)
    return load.put_on(server, requests, connections=1, seconds=SECONDS)


def _numbers(place: Place, count: int) -> Sequence[int]:
    return random.Random(7).sample(range(place.users), count)  # noqa: S311


def _gets(place: Place, count: int) -> Iterator[Request]:
    for number in _numbers(place, count):
        yield load.request("GET", f"/api/v1/users/{documents.user_id(number)}", place.headers)


def _lookups(place: Place) -> Iterator[Request]:
    for number in _numbers(place, _MOST):
        body = msgspec.json.encode({"email": documents.user(number).email})
        yield load.request("POST", "/api/v1/users/lookup", place.headers, body)


def _pages(place: Place) -> Iterator[Request]:
    """Return the requests of those who read one page after the other."""
    cursor = ""
    with httpx.Client(base_url=place.server.url, headers=place.headers) as http:
        for _ in range(PAGES):
            path = f"/api/v1/users?limit={PAGE}{cursor}"
            yield load.request("GET", path, place.headers)
            page = http.get(path).raise_for_status().json()["data"]
            cursor = f"&cursor={page['next_cursor']}"


# What is asked, in what order, and whether it is forgotten before each round.
_KINDS: dict[str, tuple[Callable[[Place], Iterator[Request]], Order, bool]] = {
    "GET": (partial(_gets, count=documents.WARM), "random", False),
    "miss": (partial(_gets, count=_MOST), "once", True),
    "email lookup": (_lookups, "once", True),
    "listing": (_pages, "in turn", False),
}


def _goal(name: str, few: Load, many: Load) -> Goal:
    return Goal(
        name=f"{name}, p50",
        figure=many.p50 * 1e6,
        unit="µs",
        bound="≤",
        limit=LIMIT,
        ceiling=few.p50 * 1e6,
        beside=f"among {FEW:,}",
        cpu_ratio=many.cpu / few.cpu,
        peers={"p99": many.p99 * 1e6, "p99 among few": few.p99 * 1e6},
    )
