"""Owns the oracle of quiet hours, which goes through time minute by minute, and what it is fed.

It shares nothing with the code under test but the files of `tzdata`, which `zoneinfo` reads here.
"""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from functools import cache
from importlib.resources import files
from typing import NamedTuple
from zoneinfo import ZoneInfo

from hypothesis import strategies as st
from user_service_schemas import (
    Choices,
    Decision,
    Device,
    User,
    decide,
    effective_preferences,
    time_zones,
)

SECOND, MINUTE, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(days=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

ALL_ZONES = sorted(time_zones())
STRANGE_ZONES = [
    "Europe/Warsaw",
    "Africa/Casablanca",  # suspends daylight saving for Ramadan
    "Africa/Monrovia",  # 44 minutes and 30 seconds until 1972
    "America/Havana",  # the clock goes back at 1 to 0
    "America/New_York",
    "America/Nuuk",
    "America/Santiago",  # midnight does not exist
    "America/Sao_Paulo",
    "America/St_Johns",  # changed at 00:01
    "Antarctica/Troll",  # two hours
    "Asia/Gaza",
    "Asia/Kathmandu",
    "Asia/Kolkata",
    "Asia/Manila",  # skipped a day in 1844
    "Asia/Pyongyang",
    "Asia/Tehran",
    "Atlantic/Azores",
    "Australia/Lord_Howe",  # half an hour
    "Etc/GMT+12",
    "Europe/Amsterdam",
    "Europe/Dublin",  # winter is its daylight saving
    "Pacific/Apia",  # skipped 2011-12-30
    "Pacific/Chatham",
    "Pacific/Kiritimati",
    "Pacific/Kwajalein",  # skipped 1993-08-21
    "Pacific/Norfolk",
    "UTC",
]
"""Zones that have something of their own, one of each sort."""


@cache
def zone_of(name: str) -> ZoneInfo:
    with files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as file:
        return ZoneInfo.from_file(file, key=name)


def offset_at(zone: ZoneInfo, instant: datetime) -> timedelta:
    offset = instant.astimezone(zone).utcoffset()
    assert offset is not None
    return offset


@cache
def transitions(name: str) -> list[datetime]:
    """Return instants at which a zone's offset changes, found by looking at it every week."""
    zone = zone_of(name)
    found = []
    for first, last in ((1840, 2045), (2100, 2102), (2399, 2402), (9990, 9993)):
        before, end = datetime(first, 1, 1, tzinfo=UTC), datetime(last, 1, 1, tzinfo=UTC)
        while before < end:
            after = before + 7 * DAY
            if offset_at(zone, before) != offset_at(zone, after):
                found.append(_change_between(zone, before, after))
            before = after
    return found


def _change_between(zone: ZoneInfo, before: datetime, after: datetime) -> datetime:
    old = offset_at(zone, before)
    while after - before > SECOND:
        middle = before + (after - before) // 2
        middle = middle.replace(microsecond=0)
        if offset_at(zone, middle) == old:
            before = max(middle, before + SECOND)
        else:
            after = middle
    return after


class Situation(NamedTuple):
    """Somebody with quiet hours, muted or not, at an instant. Times of day are in minutes."""

    zone: str
    start: int
    end: int
    muted_until: datetime | None
    at: datetime

    @property
    def earliest(self) -> datetime:
        """From when on quiet hours alone decide."""
        return self.at if self.muted_until is None else max(self.at, self.muted_until)

    def is_quiet(self, wall: datetime) -> bool:
        now = wall.hour * 60 + wall.minute
        if self.start < self.end:
            return self.start <= now < self.end
        return now >= self.start or now < self.end


def first_allowed(situation: Situation) -> datetime:
    """Return the first instant at which nothing holds a message, by trying one after the other."""
    zone = zone_of(situation.zone)
    instant = situation.earliest
    wall = instant.astimezone(zone)
    if not situation.is_quiet(wall):
        return instant
    instant = instant.replace(microsecond=0)
    while situation.is_quiet(wall):
        # To where the wall clock's minute ends; by the second, where the clock is changed before.
        step = timedelta(seconds=60 - wall.second)
        later = (instant + step).astimezone(zone)
        if later.utcoffset() != wall.utcoffset():
            step = SECOND
            later = (instant + step).astimezone(zone)
        instant += step
        wall = later
    return instant


def naively(situation: Situation) -> datetime:
    """Return what one writes who trusts `datetime` to know about wall clocks."""
    local = situation.earliest.astimezone(zone_of(situation.zone))
    if not situation.is_quiet(local):
        return situation.earliest
    end = datetime.combine(local, time(*divmod(situation.end, 60)), local.tzinfo)
    if end <= local:
        end += DAY
    return end.astimezone(UTC)


def time_of_day(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


PHONE = Device(
    id="a phone",
    token="a token",
    platform="android",
    app=None,
    active=True,
    registered_at=EPOCH,
)


def somebody(choices: Choices) -> User:
    return User(
        id="somebody",
        external_id=None,
        name="Jane Roe",
        email="jane@example.com",
        phone=None,
        locale=None,
        email_deliverable=True,
        preferences=effective_preferences(choices, "UTC"),
        devices=(PHONE,),
        version=7,
        rules=1,
        created_at=EPOCH,
        updated_at=EPOCH,
    )


def decided(situation: Situation, *, explain: bool = False) -> Decision:
    choices = Choices(
        quiet_hours_start=time_of_day(situation.start),
        quiet_hours_end=time_of_day(situation.end),
        timezone=situation.zone,
        muted_until=situation.muted_until,
    )
    return decide(somebody(choices), "push", situation.at, explain=explain)


def assert_decided_as_the_oracle_does(situation: Situation) -> Decision:
    decision = decided(situation)
    expected = first_allowed(situation)
    if expected == situation.at:
        assert (decision.decision, decision.reason) == ("allow", "allowed")
        assert decision.deferred_until is None
    else:
        muted = situation.earliest > situation.at
        assert decision.deferred_until == expected
        assert decision.decision == "defer"
        assert decision.reason == ("muted" if muted else "quiet_hours")
    return decision


@st.composite
def situations(draw: st.DrawFn, names: st.SearchStrategy[str]) -> Situation:
    """Draw a situation, most of them within two days of a change of the zone.

    The ends of the window are often what the clock shows at the change, before and after it. Each
    part is drawn as one number: of the time that an example takes, most is drawing.
    """
    name = draw(names)
    changes = transitions(name)
    which = draw(st.integers(-(len(changes) // 8) - 1, len(changes) - 1))
    if which >= 0:
        near = changes[which]
    else:
        near = EPOCH + draw(st.integers(-62_000, 253_000)) * timedelta(seconds=1_000_000)
    zone = zone_of(name)
    clocks = ((near - SECOND).astimezone(zone), near.astimezone(zone))
    start, end = (_time_near(draw(_times), clocks) for _ in range(2))
    if start == end:
        end = (end + 1439) % 1440  # the longest there is: 23:59 h
    at = near + _delta(draw(_deltas))
    mute = draw(_mutes)
    muted_until = at + _delta(mute - 3 * _DELTAS) if mute > 2 * _DELTAS else None
    return Situation(name, start, end, muted_until, at)


_NEARBY = (0, 0, 1, -1, 15, 30, -30, 45, 60, -60, 120)
_times = st.integers(-len(_NEARBY) * 64, 1439)


def _time_near(drawn: int, clocks: tuple[datetime, datetime]) -> int:
    if drawn >= 0:
        return drawn
    clock = clocks[drawn % 2]
    return (clock.hour * 60 + clock.minute + _NEARBY[-drawn // 2 % len(_NEARBY)]) % 1440


_DELTAS = 16_000
_deltas = st.integers(-_DELTAS, _DELTAS)
_mutes = st.integers(0, 4 * _DELTAS)


def _delta(drawn: int) -> timedelta:
    """Return some minutes, up to two days; or seconds, up to three hours; or odd microseconds."""
    size, sign = abs(drawn), 1 if drawn > 0 else -1
    if size <= 2880:
        return sign * timedelta(minutes=size)
    if size <= 13_680:
        return sign * timedelta(seconds=size - 2880)
    return sign * timedelta(microseconds=(size - 13_680) * 1_234_567)
