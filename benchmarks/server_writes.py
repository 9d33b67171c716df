"""Budget 6: writes that are no registrations, and how often each waits for PostgreSQL."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import httpx
import msgspec

from benchmarks import documents, load, wire
from benchmarks.budgets import Budget, Goal
from benchmarks.generator import Request
from benchmarks.load import Load, Round, Running, answered, beside_peer
from benchmarks.surroundings import USERS, Surroundings

ROUNDS = 5
SECONDS = 1
CONNECTIONS = 16
ROUND_TRIPS = 5
COUNTED = 40
"""Writes whose round trips are counted."""
_MOST = 5000
"""More writes than a round has time for."""


def measure(surroundings: Surroundings) -> list[Budget]:
    """Measure both in turn with the peer's. Each write changes something."""
    server, peer = surroundings.server, surroundings.peer
    loads = load.medians(
        ROUNDS,
        preferences=_round(surroundings, server, update_of_preferences),
        peer_preferences=_round(surroundings, peer, update_of_preferences),
        devices=_round(surroundings, server, registration_of_device),
        peer_devices=_round(surroundings, peer, registration_of_device),
    )
    with wire.server_behind(surroundings) as (url, tapped):
        trips = {
            make: _round_trips(url, tapped, surroundings.headers, make)
            for make in (update_of_preferences, registration_of_device)
        }
    return [
        Budget(
            6,
            "writes",
            (
                beside_peer(
                    "preferences update", loads["preferences"], loads["peer_preferences"], 2.5
                ),
                _trips("preferences update", trips[update_of_preferences]),
                beside_peer("device registration", loads["devices"], loads["peer_devices"], 2.5),
                _trips("device registration", trips[registration_of_device]),
                answered(loads["preferences"], loads["devices"]),
            ),
        )
    ]


Make = Callable[[int, dict[str, str]], Request]
"""Makes the request with a number, as no other of the run is."""


def update_of_preferences(number: int, headers: dict[str, str]) -> Request:
    """Return an update of preferences, which changes the quiet hours and a category."""
    minutes = number // USERS * 97 + number
    body = {
        "quiet_hours_start": f"{20 + minutes // 60 % 4:02}:{minutes % 60:02}",
        "quiet_hours_end": "07:00",
        "categories": {"marketing": {"email": bool(minutes % 2)}},
    }
    return _request("PATCH", number, "preferences", headers, body)


def registration_of_device(number: int, headers: dict[str, str]) -> Request:
    """Return the registration of a device that nobody has."""
    body = {"token": f"{number:010}" + "token" * 30, "platform": "ios", "app": "shop"}
    return _request("POST", number, "devices", headers, body)


def _request(
    method: str, number: int, part: str, headers: dict[str, str], body: Mapping[str, object]
) -> Request:
    path = f"/api/v1/users/{documents.user_id(number % USERS)}/{part}"
    return load.request(method, path, headers, msgspec.json.encode(body), kind=part)


def _round(surroundings: Surroundings, server: Running, make: Make) -> Round:
    # Round by round it goes through the users; who comes again is changed again.
    numbers = itertools.count()

    def put() -> Load:
        requests = load.write(
            surroundings.directory / "writes",
            (make(n, surroundings.headers) for n in itertools.islice(numbers, _MOST)),
            "once",
        )
        return load.put_on(server, requests, connections=CONNECTIONS, seconds=SECONDS)

    return put


def _round_trips(url: str, tapped: wire.Wire, headers: dict[str, str], make: Make) -> int:
    with httpx.Client(base_url=url) as http:

        def write(number: int) -> None:
            # Of what no round has come to.
            request = make(
                10**7 + number, headers | {"Idempotency-Key": f"{make.__name__}-{number}"}
            )
            head, _, body = request.text.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            method, path, _ = first.split(" ")
            sent = dict(line.split(": ", 1) for line in lines)
            http.request(method, path, headers=sent, content=body).raise_for_status()

        return wire.taken_by(tapped, write, COUNTED).round_trips


def _trips(name: str, round_trips: int) -> Goal:
    return Goal(
        name=f"{name} with Idempotency-Key",
        figure=round_trips,
        unit="round trips",
        bound="≤",
        limit=ROUND_TRIPS,
        of="figure",
    )
