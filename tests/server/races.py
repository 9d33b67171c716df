"""Owns the races for a token: the suite runs a few rounds of each, tests/chaos many."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from .test_users import register, rows

_numbers = count()
_TOKEN = "race-{}"


def no_deadlock(log: Path) -> bool:
    """Whether Postgres' log tells of none."""
    return "deadlock" not in log.read_text(errors="replace")


async def _someone(http: httpx.AsyncClient) -> str:
    return str((await register(http, password=None))["id"])


async def _post(http: httpx.AsyncClient, user_id: str, token: str) -> int:
    answer = await http.post(
        f"/api/v1/users/{user_id}/devices", json={"token": token, "platform": "ios"}
    )
    assert answer.status_code in (200, 201), answer.text
    return answer.status_code


async def _document(http: httpx.AsyncClient, user_id: str) -> dict[str, Any]:
    """Return the document, which is cached as Postgres has it."""
    path = f"/api/v1/users/{user_id}"
    cached: dict[str, Any] = (await http.get(path)).json()["data"]
    passed_over = {"X-Min-Version": str(10**9)}
    assert (await http.get(path, headers=passed_over)).json()["data"] == cached
    return cached


async def _has(http: httpx.AsyncClient, user_id: str, token: str) -> bool:
    return token in [device["token"] for device in (await _document(http, user_id))["devices"]]


async def _assert_complete_logs(database_url: str, users: list[str]) -> None:
    """Each version of each user is logged, once, and the last is what the user has."""
    logged = await rows(
        database_url,
        "SELECT array_agg(c.version ORDER BY c.version), max(users.version)"
        " FROM changes c JOIN users ON users.id = c.user_id WHERE users.id = ANY ($1)"
        " GROUP BY users.id",
        users,
    )
    assert len(logged) == len(users)
    for versions, last in logged:
        assert versions == list(range(1, last + 1))


async def register_by_many(http: httpx.AsyncClient, database_url: str, rounds: int) -> None:
    """24 registrations of one token by 8 users at once: one owner after each round."""
    users = [await _someone(http) for _ in range(8)]
    for _ in range(rounds):
        token = _TOKEN.format(next(_numbers))
        said = await asyncio.gather(*(_post(http, user_id, token) for user_id in users * 3))
        assert Counter(said)[201] >= 8, "each had it once"
        assert [await _has(http, user_id, token) for user_id in users].count(True) == 1
        owners = await rows(database_url, "SELECT active FROM devices WHERE token = $1", token)
        assert owners == [(True,)]
    await _assert_complete_logs(database_url, users)


async def opposite_moves(http: httpx.AsyncClient, database_url: str, rounds: int) -> None:
    """Two users take each other's token, several times at once."""
    one, other = await _someone(http), await _someone(http)
    first, second = (_TOKEN.format(next(_numbers)) for _ in range(2))
    await _post(http, one, first)
    await _post(http, other, second)
    for _ in range(rounds):
        await asyncio.gather(
            *(_post(http, *move) for move in [(one, second), (other, first)] * 3),
        )
        assert await _has(http, one, second)
        assert await _has(http, other, first)
        one, other = other, one
    await _assert_complete_logs(database_url, [one, other])


async def race_feedback(http: httpx.AsyncClient, database_url: str, rounds: int) -> None:
    """A token moves while its end is reported: some order of the two explains what comes of it.

    The report is of now, so that it holds for whatever was there before it, and in every other
    round a report and a registration of the owner's race, too.
    """
    items = {"channel": "push", "reason": "unregistered", "at": "2100-01-01T00:00:00Z"}
    former, heir = await _someone(http), await _someone(http)
    for number in range(rounds):
        token = _TOKEN.format(next(_numbers))
        await _post(http, former, token)
        before = {user: (await _document(http, user))["version"] for user in (former, heir)}
        racer = heir if number % 2 else former
        answer, status = await asyncio.gather(
            http.post("/api/v1/feedback", json={"items": [{**items, "token": token}]}),
            _post(http, racer, token),
        )
        assert answer.status_code == 200, answer.text
        (result,) = (item["result"] for item in answer.json()["data"])
        steps = {
            user: (await _document(http, user))["version"] - version
            for user, version in before.items()
        }
        state = (
            result,
            status,
            steps[former],
            steps[heir],
            await _has(http, former, token),
            await _has(http, heir, token),
        )
        assert state in (_MOVES if racer == heir else _RENEWALS), state
    await _assert_complete_logs(database_url, [former, heir])


# (result, status of the registration, versions of the former owner and of the heir, who has it)
_MOVES = {
    ("applied", 201, 2, 1, False, True),  # reported, then moved
    ("applied", 201, 1, 2, False, False),  # moved, then reported
}
_RENEWALS = {
    ("applied", 200, 2, 0, True, False),  # reported, then registered anew
    ("applied", 200, 1, 0, False, False),  # registered again, then reported
    ("ignored", 200, 0, 0, True, False),  # seen by the time that counts as now
}
