"""Budget 2: a user that is not cached, and what PostgreSQL is asked for it."""

from __future__ import annotations

from functools import partial

import httpx

from benchmarks import documents, load, wire
from benchmarks.budgets import Budget, Goal
from benchmarks.load import Load, Requests, Running, answered, beside_peer
from benchmarks.surroundings import (
    CEILINGS,
    PEER,
    SERVICE,
    USERS,
    Surroundings,
    cache_reads,
)
from benchmarks.wire import taken_by

ROUNDS = 5
SECONDS = 1
FEW, MANY = 16, 64
"""Connections."""
COUNTED = 60
"""Reads whose statements are counted."""


def measure(surroundings: Surroundings) -> list[Budget]:
    """Measure it in turn with the peer's, each user once and after all was forgotten."""
    server, peer, bare = surroundings.server, surroundings.peer, surroundings.ceiling("C2")
    requests = load.write(
        surroundings.directory / "each-user",
        (load.request("GET", _path(n), surroundings.headers) for n in range(USERS)),
        "once",
    )
    # What it does is the same for who was read already, and so fast that it would run out of users.
    in_turn = requests._replace(order="in turn")
    before = cache_reads(server)
    loads = load.medians(
        ROUNDS,
        miss_16=partial(_put_cold, surroundings, server, SERVICE, requests, FEW),
        peer_miss_16=partial(_put_cold, surroundings, peer, PEER, requests, FEW),
        bare_miss_16=partial(_put_cold, surroundings, bare, CEILINGS, in_turn, FEW),
        miss_64=partial(_put_cold, surroundings, server, SERVICE, requests, MANY),
        peer_miss_64=partial(_put_cold, surroundings, peer, PEER, requests, MANY),
        bare_miss_64=partial(_put_cold, surroundings, bare, CEILINGS, in_turn, MANY),
    )
    after = cache_reads(server)
    read = {result: count - before.get(result, 0) for result, count in after.items()}
    return [
        Budget(
            2,
            "GET, not cached",
            (
                *(
                    beside_peer(f"{number} connections", loads, f"miss_{number}", 8, ceiling="C2")
                    for number in (FEW, MANY)
                ),
                Goal(
                    name="SQL statements",
                    figure=_statements(surroundings),
                    unit="statements",
                    bound="≤",
                    limit=1,
                    of="figure",
                ),
                answered(*(load for name, load in loads.items() if "peer" not in name)),
                Goal(
                    name="out of PostgreSQL",
                    figure=sum(read.values()) - read.get("hit", 0),
                    unit="documents",
                    bound="≥",
                    limit=0.99,
                    ceiling=sum(read.values()),
                    beside="documents read",
                ),
            ),
        )
    ]


def _put_cold(
    surroundings: Surroundings,
    server: Running,
    database: int,
    requests: Requests,
    connections: int,
) -> Load:
    surroundings.forget(database)
    return load.put_on(server, requests, connections=connections, seconds=SECONDS)


def _statements(surroundings: Surroundings) -> float:
    """Return how many statements a read takes."""
    surroundings.forget(SERVICE)
    with (
        wire.server_behind(surroundings) as (url, tapped),
        httpx.Client(base_url=url, headers=surroundings.headers) as http,
    ):
        return taken_by(
            tapped, lambda number: http.get(_path(number)).raise_for_status(), COUNTED
        ).statements


def _path(number: int) -> str:
    return f"/api/v1/users/{documents.user_id(number)}"
