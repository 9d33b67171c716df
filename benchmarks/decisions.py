"""Budget 12: whether a message may go to a user whose document is at hand."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec
from user_service_schemas import User, decide

from benchmarks import documents
from benchmarks.budgets import Budget, Goal
from benchmarks.surroundings import Surroundings
from benchmarks.timing import Case, Spent, Stopwatch, medians

ROUNDS = 25
DECISIONS = 5000
ZONES = (
    *("Europe/Berlin", "Europe/Warsaw", "America/New_York", "America/Los_Angeles"),
    *("Asia/Tokyo", "Asia/Kolkata", "Australia/Sydney", "America/Sao_Paulo"),
)
"""Where the users live who are asked about in turn."""
_NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)


def measure(_surroundings: Surroundings) -> list[Budget]:
    """Measure decisions about many users, at many instants of a day."""
    spent = asyncio.run(_measure())
    return [
        Budget(
            12,
            "a decision",
            (
                _goal("without quiet hours", spent["without"], 1),
                _goal("with quiet hours, at any hour", spent["with_them"], 6),
                _goal("with quiet hours, while quiet", spent["quiet"], 6),
            ),
        )
    ]


async def _measure() -> dict[str, Spent]:
    users = [_living_in(ZONES[n % len(ZONES)], documents.user(n)) for n in range(documents.WARM)]
    without = [_without_quiet_hours(user) for user in users]
    # What decides is whether it is night there: all of these have theirs.
    berliners = [_living_in("Europe/Berlin", user) for user in users]
    chance = random.Random(12)  # noqa: S311
    any_time = [_NOON + timedelta(seconds=chance.randrange(86_400)) for _ in range(DECISIONS)]
    at_night = [
        _NOON.replace(hour=0) + timedelta(seconds=chance.randrange(3600)) for _ in range(DECISIONS)
    ]
    return await medians(
        ROUNDS,
        without=_decided(chance.choices(without, k=DECISIONS), any_time),
        with_them=_decided(chance.choices(users, k=DECISIONS), any_time),
        quiet=_decided(chance.choices(berliners, k=DECISIONS), at_night),
    )


def _living_in(zone: str, user: User) -> User:
    chosen = msgspec.structs.replace(user.preferences, timezone=zone, effective_timezone=zone)
    return msgspec.structs.replace(user, preferences=chosen)


def _without_quiet_hours(user: User) -> User:
    chosen = msgspec.structs.replace(user.preferences, quiet_hours_start=None, quiet_hours_end=None)
    return msgspec.structs.replace(user, preferences=chosen)


def _decided(users: Sequence[User], instants: Sequence[datetime]) -> Case:
    async def case() -> Spent:
        with Stopwatch() as watch:
            for user, at in zip(users, instants, strict=True):
                decide(user, "push", at, category="marketing")
        return watch.per(len(users))

    return case


def _goal(name: str, spent: Spent, limit: float) -> Goal:
    return Goal(name=name, figure=spent.cpu * 1e6, unit="µs", bound="≤", limit=limit, of="figure")
