"""Budget 6: writes that are no registrations, and how often each waits for PostgreSQL."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import httpx
import msgspec

from benchmarks import documents, load, wire
from benchmarks.budgets import Budget, Goal
from benchmarks.generator import Request
from benchmarks.load import Load, Running, answered, beside_peer
from benchmarks.surroundings import USERS, Surroundings

ROUNDS = 4
SECONDS = 1
FEW, MANY = 16, 64
"""Connections."""
ROUND_TRIPS = 5
COUNTED = 40
"""Writes whose round trips are counted."""
_MOST = 12_000
"""More writes than a round has time for."""


def measure(surroundings: Surroundings) -> list[Budget]:
    """Measure both in turn with the peer's. Each write changes something."""
    server, peer = surroundings.server, surroundings.peer
    # Who takes turns goes through the users in turn, too: who comes again is changed again.
    ours, theirs = _Writes(surroundings, server), _Writes(surroundings, peer)
    bare = _Writes(surroundings, surroundings.ceiling("C6"))
    loads = load.medians(
        ROUNDS,
        preferences_16=partial(ours.put, update_of_preferences, FEW),
        peer_preferences_16=partial(theirs.put, update_of_preferences, FEW),
        bare_preferences_16=partial(bare.put, update_of_preferences, FEW),
        devices_16=partial(ours.put, registration_of_device, FEW),
        peer_devices_16=partial(theirs.put, registration_of_device, FEW),
        preferences_64=partial(ours.put, update_of_preferences, MANY),
        peer_preferences_64=partial(theirs.put, update_of_preferences, MANY),
        bare_preferences_64=partial(bare.put, update_of_preferences, MANY),
        devices_64=partial(ours.put, registration_of_device, MANY),
        peer_devices_64=partial(theirs.put, registration_of_device, MANY),
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
                *_beside_peer("preferences update", "preferences", loads),
                _trips("preferences update", trips[update_of_preferences]),
                *_beside_peer("device registration", "devices", loads),
                _trips("device registration", trips[registration_of_device]),
                answered(*(load for name, load in loads.items() if "peer" not in name)),
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


class _Writes:
    """The writes that one server gets, no two of which are the same."""

    def __init__(self, surroundings: Surroundings, server: Running) -> None:
        self._surroundings = surroundings
        self._server = server
        self._numbers: dict[Make, Iterator[int]] = defaultdict(itertools.count)

    def put(self, make: Make, connections: int) -> Load:
        """Put load on the server by writes of this kind."""
        requests = load.write(
            self._surroundings.directory / "writes",
            (
                make(number, self._surroundings.headers)
                for number in itertools.islice(self._numbers[make], _MOST)
            ),
            "once",
        )
        return load.put_on(self._server, requests, connections=connections, seconds=SECONDS)


def _beside_peer(name: str, key: str, loads: Mapping[str, Load]) -> Iterator[Goal]:
    for number in (FEW, MANY):
        case = f"{key}_{number}"
        yield beside_peer(f"{name}, {number} connections", loads, case, 2.5, ceiling="C6")


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
