"""Time zones: which there are, and what their wall clocks show at any instant, exactly.

The zones are those of the `tzdata` package, the same on every machine. `zoneinfo` would read the
system's first, which may be years older, and does not tell when an offset changes: whoever needs
the instant at which a wall clock jumps would have to search for it. So the files are read here
(TZif, RFC 9636), into the whole seconds since 1970 at which an offset begins.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from datetime import date
from functools import cache, lru_cache
from importlib.resources import files
from typing import NamedTuple, TypeAlias

_HEADER = struct.Struct(">4sc15x6I")
_MEAN_YEAR = 31_556_952
"""Seconds of a year of the Gregorian calendar, which has 97 leap years in 400."""

_Offsets: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Instants, and the offset that begins at each."""


class Span(NamedTuple):
    """A stretch of time with one offset from UTC; all in seconds, the ends since 1970.

    It is `[since, until)`; None is the beginning and the end of time.
    """

    since: int | None
    until: int | None
    offset: int


class Zone:
    """A time zone, as offsets from UTC."""

    __slots__ = ("_before", "_footer", "_instants", "_offsets", "_recent")

    def __init__(self, before: int, offsets: _Offsets, footer: Footer) -> None:
        self._before = before
        self._instants, self._offsets = offsets
        self._footer = footer
        # Who asks mostly asks about now. A tuple, so that threads see a whole one.
        self._recent = self._find(0)

    def span(self, instant: int) -> Span:
        """Return the span that an instant (in seconds since 1970) is in."""
        span = self._recent
        since, until, _ = span
        if (since is None or since <= instant) and (until is None or instant < until):
            return span
        self._recent = span = self._find(instant)
        return span

    def _find(self, instant: int) -> Span:
        instants = self._instants
        i = bisect_right(instants, instant)
        if i == len(instants):
            return self._footer.span(instant, instants[-1] if instants else None)
        since = instants[i - 1] if i else None
        return Span(since, instants[i], self._offsets[i - 1] if i else self._before)


class Footer(NamedTuple):
    """The rule for all time after the last instant of a file: a POSIX TZ string, parsed.

    `daylight` is None where one offset holds for ever.
    """

    standard: int
    daylight: int | None = None
    begins: str = ""
    ends: str = ""

    def span(self, instant: int, since: int | None) -> Span:
        """Return the span of an instant that is in the footer's time, which begins `since`."""
        if self.daylight is None:
            return Span(since, None, self.standard)
        instants, offsets = _around(self, 1970 + instant // _MEAN_YEAR)
        i = bisect_right(instants, instant)
        begin = instants[i - 1] if since is None else max(since, instants[i - 1])
        return Span(begin, instants[i], offsets[i - 1])


@lru_cache(maxsize=1024)
def _around(footer: Footer, year: int) -> _Offsets:
    """Return the changes of a footer around a year.

    By the mean length of a year an instant is at most one off the year it is in, so two on both
    sides bring what is before and after it.
    """
    daylight = footer.standard if footer.daylight is None else footer.daylight
    changes = sorted(
        change
        for y in range(year - 2, year + 3)
        for change in (
            (_rule_instant(footer.begins, y) - footer.standard, daylight),
            (_rule_instant(footer.ends, y) - daylight, footer.standard),
        )
    )
    return tuple(instant for instant, _ in changes), tuple(offset for _, offset in changes)


def _rule_instant(rule: str, year: int) -> int:
    """Return when a rule of a POSIX TZ string falls in a year, as its wall clock's seconds."""
    day, _, time = rule.partition("/")
    if day.startswith("M"):
        month, week, weekday = map(int, day[1:].split("."))
        first = _days(year, month)
        # 1970-01-01 was a Thursday, and Sunday is 0.
        days = first + (weekday - (first + 4)) % 7 + 7 * (week - 1)
        if days >= (_days(year, month + 1) if month < 12 else _days(year + 1, 1)):
            days -= 7  # the fifth week is the last one
    elif day.startswith("J"):  # 1 to 365, as if there was no 29 February
        number = int(day[1:])
        leap = _days(year, 3) - _days(year, 2) == 29
        days = _days(year, 1) + number - 1 + (leap and number >= 60)
    else:
        days = _days(year, 1) + int(day)
    return days * 86_400 + (_seconds(time) if time else 7200)


def _days(year: int, month: int) -> int:
    """Return the days from 1970 to the first of a month. The calendar repeats every 400 years."""
    return date(2000 + year % 400, month, 1).toordinal() - 719_163 + (year // 400 - 5) * 146_097


def _seconds(time: str) -> int:
    """Return `[+-]h[h[h]][:mm[:ss]]` in seconds."""
    hours, minutes, seconds = (*map(int, time.lstrip("+-").split(":")), 0, 0)[:3]
    value = hours * 3600 + minutes * 60 + seconds
    return -value if time.startswith("-") else value


_POSIX = re.compile(
    r"(?:[A-Za-z]{3,}|<[^>]+>)(?P<standard>[-+0-9:]+)"
    r"(?:(?:[A-Za-z]{3,}|<[^>]+>)(?P<daylight>[-+0-9:]+)?,(?P<begins>[^,]+),(?P<ends>[^,]+))?"
)


def parse_footer(text: str) -> Footer:
    """Parse a POSIX TZ string, with the extension of RFC 9636 (hours from -167 to 167).

    >>> parse_footer("CET-1CEST,M3.5.0,M10.5.0/3").daylight
    7200

    Raises:
        ValueError: it is none.
    """
    found = _POSIX.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a POSIX TZ string")
    standard = -_seconds(found["standard"])  # POSIX counts westwards
    if found["begins"] is None:
        return Footer(standard)
    daylight = standard + 3600 if found["daylight"] is None else -_seconds(found["daylight"])
    return Footer(standard, daylight, found["begins"], found["ends"])


def parse_zone(data: bytes) -> Zone:
    """Parse a TZif file of version 2 or later.

    Raises:
        ValueError: it is none.
    """
    first = _counts(data, 0)
    # The first block, of 32-bit times, is there for readers of 1990.
    isutc, isstd, leaps, times, types, chars = first
    start = _HEADER.size + times * 5 + types * 6 + chars + leaps * 8 + isstd + isutc
    isutc, isstd, leaps, times, types, chars = _counts(data, start)
    start += _HEADER.size
    instants = struct.unpack_from(f">{times}q", data, start)
    kinds = data[start + times * 8 : start + times * 9]
    start += times * 9
    offsets = [struct.unpack_from(">i", data, start + i * 6)[0] for i in range(types)]
    start += types * 6 + chars + leaps * 12 + isstd + isutc
    footer = data[start:].decode("ascii").strip("\n")
    last = offsets[kinds[-1]] if kinds else offsets[0]
    return Zone(
        offsets[0],
        (instants, tuple(offsets[kind] for kind in kinds)),
        parse_footer(footer) if footer else Footer(last),
    )


def _counts(data: bytes, start: int) -> tuple[int, ...]:
    magic, version, *counts = _HEADER.unpack_from(data, start)
    if magic != b"TZif" or version < b"2":
        raise ValueError("this is not a TZif file of version 2 or later")
    return tuple(counts)


@cache
def time_zones() -> frozenset[str]:
    """Return the names of all IANA zones, those of the `tzdata` package: the same everywhere."""
    return frozenset(files("tzdata").joinpath("zones").read_text("utf-8").split())


@lru_cache(maxsize=1024)
def find_zone(name: str) -> Zone | None:
    """Return the zone of a name, or None: there are about 600, and names come from old rows."""
    if name not in time_zones():
        return None
    return parse_zone(files("tzdata").joinpath("zoneinfo", *name.split("/")).read_bytes())


UTC_ZONE = Zone(0, ((), ()), Footer(0))
"""What holds where no zone is known."""
