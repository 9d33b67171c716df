"""Budgets 1 and 3: a user that is cached, and one that the caller has already.

The service runs as it is shipped, with keys, limits, metrics and logs; the caller reads users at
random out of a warm set, not one hot key.
"""

from __future__ import annotations

from functools import partial

import httpx

from benchmarks import documents, load
from benchmarks.budgets import Budget, Goal
from benchmarks.load import Load, Requests, Running, answered
from benchmarks.surroundings import Surroundings, cache_reads, out_of_the_cache

ROUNDS = 4
SECONDS = 1
FEW, MANY = 16, 64
"""Connections."""


def measure(surroundings: Surroundings) -> list[Budget]:
    """Measure both in turn with the ceilings and the peer."""
    server = surroundings.server
    c0, c1, peer = surroundings.ceiling("C0"), surroundings.ceiling("C1"), surroundings.peer
    plain = _requests(surroundings, {})
    for other in (c1, peer):
        _read_all(other, surroundings.headers)
    etag = _read_all(server, surroundings.headers)
    conditional = _requests(surroundings, {"If-None-Match": etag})

    put = partial(load.put_on, seconds=SECONDS)
    before = cache_reads(server)
    loads = load.medians(
        ROUNDS,
        c0_16=partial(put, c0, plain, connections=FEW),
        c1_16=partial(put, c1, plain, connections=FEW),
        get_16=partial(put, server, plain, connections=FEW),
        known_16=partial(put, server, conditional, connections=FEW),
        peer_16=partial(put, peer, plain, connections=FEW),
        c1_64=partial(put, c1, plain, connections=MANY),
        get_64=partial(put, server, plain, connections=MANY),
        peer_64=partial(put, peer, plain, connections=MANY),
    )
    return [
        Budget(
            1,
            "GET, cached",
            (
                *_goals(loads, FEW),
                *_goals(loads, MANY),
                answered(loads["get_16"], loads["get_64"]),
                out_of_the_cache(before, cache_reads(server)),
            ),
        ),
        Budget(
            3,
            "GET with If-None-Match",
            (
                Goal(
                    name=f"{FEW} connections",
                    figure=loads["known_16"].rate,
                    unit="requests/s",
                    bound="≥",
                    limit=1,
                    ceiling=loads["get_16"].rate,
                    beside="budget 1",
                    cpu_ratio=loads["get_16"].cpu / loads["known_16"].cpu,
                    peers={"CPU µs": loads["known_16"].cpu * 1e6},
                ),
                answered(loads["known_16"]),
            ),
        ),
    ]


def _goals(loads: dict[str, Load], connections: int) -> list[Goal]:
    ours, c0 = loads[f"get_{connections}"], loads[f"c0_{FEW}"]
    c1, peer = loads[f"c1_{connections}"], loads[f"peer_{connections}"]
    return [
        Goal(
            name=f"{connections} connections",
            figure=ours.rate,
            unit="requests/s",
            bound="≥",
            limit=1.3,
            ceiling=c1.rate,
            beside="C1",
            cpu_ratio=c1.cpu / ours.cpu,
            peers={
                "C0": c0.rate,
                "CPU µs": ours.cpu * 1e6,
                "C1 CPU µs": c1.cpu * 1e6,
                "C0 CPU µs": c0.cpu * 1e6,
                "busy": ours.busy,
                "C1 busy": c1.busy,
            },
        ),
        Goal(
            name=f"{connections} connections, beside the peer",
            figure=ours.rate,
            unit="requests/s",
            bound="≥",
            limit=6,
            ceiling=peer.rate,
            beside="P",
            cpu_ratio=peer.cpu / ours.cpu,
            peers={"P CPU µs": peer.cpu * 1e6, "P busy": peer.busy},
        ),
        Goal(
            name=f"{connections} connections, p99",
            figure=ours.p99 * 1e3,
            unit="ms",
            bound="≤",
            limit=3,
            ceiling=ours.p50 * 1e3,
            beside="its p50",
            peers={"C1 p99": c1.p99 * 1e3, "P p99": peer.p99 * 1e3},
        ),
    ]


def _requests(surroundings: Surroundings, headers: dict[str, str]) -> Requests:
    return load.write(
        surroundings.directory / f"warm-{len(headers)}",
        (
            load.request("GET", _path(number), surroundings.headers | headers)
            for number in range(documents.WARM)
        ),
    )


def _path(number: int) -> str:
    return f"/api/v1/users/{documents.user_id(number)}"


def _read_all(server: Running, headers: dict[str, str]) -> str:
    """Read all users, so that they are cached, and return the ETag that they have in common.

    Fails where an answer is not the user who was asked for: a fast error is no figure.
    """
    etags = set()
    with httpx.Client(base_url=server.url, headers=headers) as http:
        for number in range(documents.WARM):
            answer = http.get(_path(number)).raise_for_status()
            assert answer.json()["data"]["email"] == documents.user(number).email
            etags.add(answer.headers.get("ETag", ""))
        (etag,) = etags
        assert not etag or http.get(_path(0), headers={"If-None-Match": etag}).status_code == 304
    return str(etag)
