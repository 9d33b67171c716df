"""Budget 4: a thousand users at once, by batch and by resolve, all of them cached."""

from __future__ import annotations

from functools import partial

import msgspec
from user_service_schemas import BatchUsers, ResolveDeliveries

from benchmarks import documents, load
from benchmarks.budgets import Budget, Goal
from benchmarks.load import Load, Requests, answered
from benchmarks.surroundings import Surroundings, cache_reads, out_of_the_cache, warm_up

ROUNDS = 5
SECONDS = 1
CONNECTIONS = 2
_BATCH = "/api/v1/users/batch"
_RESOLVE = "/api/v1/deliveries/resolve"


def measure(surroundings: Surroundings) -> list[Budget]:
    """Measure both in turn."""
    ids = [documents.user_id(number) for number in range(documents.WARM)]
    bodies = {
        _BATCH: msgspec.json.encode(BatchUsers(ids=ids)),
        _RESOLVE: msgspec.json.encode(
            ResolveDeliveries(channel="push", user_ids=ids, category="marketing")
        ),
    }
    server = surroundings.server
    warm_up(server, surroundings.headers)

    def requests(path: str) -> Requests:
        one = load.request("POST", path, surroundings.headers, bodies[path])
        return load.write(surroundings.directory / path.rpartition("/")[2], [one])

    put = partial(load.put_on, server, connections=CONNECTIONS, seconds=SECONDS)
    before = cache_reads(server)
    loads = load.medians(
        ROUNDS,
        batch=partial(put, requests(_BATCH)),
        resolve=partial(put, requests(_RESOLVE)),
    )
    return [
        Budget(
            4,
            f"{documents.WARM} cached users",
            (
                _goal("batch", loads["batch"], 6),
                _goal("resolve", loads["resolve"], 12),
                answered(*loads.values()),
                out_of_the_cache(before, cache_reads(server)),
            ),
        )
    ]


def _goal(name: str, made: Load, limit: float) -> Goal:
    return Goal(
        name=f"{name}, CPU a user",
        figure=made.cpu / documents.WARM * 1e6,
        unit="µs",
        bound="≤",
        limit=limit,
        of="figure",
        peers={"users/s": made.rate * documents.WARM, "p50 ms": made.p50 * 1e3},
    )
