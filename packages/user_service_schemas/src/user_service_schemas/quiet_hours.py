"""When a user is not to be disturbed: muted until, and quiet hours by a zone's wall clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from .zones import Zone

DAY = 86_400
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIRST = datetime.min.replace(tzinfo=UTC)
LAST = datetime.max.replace(tzinfo=UTC)
_FIRST_SECOND = -62_135_596_800

_OF_DAY = {
    f"{hour:02}:{minute:02}": hour * 3600 + minute * 60
    for hour in range(24)
    for minute in range(60)
}


def seconds_of(instant: datetime) -> int:
    """Return the whole seconds from 1970 to an aware datetime, rounded down.

    With an offset an instant can lie before the first that UTC can name, and counts as that.
    """
    since = instant - EPOCH
    return max(since.days * DAY + since.seconds, _FIRST_SECOND)


def instant_of(seconds: int) -> datetime:
    """Return the instant in UTC; what is beyond the calendar is the calendar's last instant."""
    try:
        return EPOCH + timedelta(seconds=seconds)
    except OverflowError:
        return LAST


def in_utc(instant: datetime) -> datetime:
    """Return an instant in UTC, or the end of the calendar that it lies beyond."""
    try:
        return instant.astimezone(UTC)
    except OverflowError:
        return FIRST if instant.year == 1 else LAST


def muted_until(until: datetime | None, at: datetime) -> datetime | None:
    """Return until when a user is muted at an instant; None if they are not, or no longer."""
    if until is None:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return until if at < until else None


def window_of(start: str | None, end: str | None) -> tuple[int, int] | None:
    """Return quiet hours as seconds of the day: the start, and how long they last.

    None where there are none: not both ends, nothing between them, or, in an old row, no `HH:MM`.

    >>> window_of("22:00", "07:00")
    (79200, 32400)
    """
    if start is None or end is None:
        return None
    begins, ends = _OF_DAY.get(start), _OF_DAY.get(end)
    if begins is None or ends is None or begins == ends:
        return None
    return begins, (ends - begins) % DAY


def quiet_until(window: tuple[int, int], zone: Zone, instant: int) -> int | None:
    """Return the first second at or after `instant` that is not quiet; None if that is `instant`.

    While one offset holds, the wall clock runs as time does: the window ends after what is left of
    it. Where the offset changes before, the new wall clock is asked: the end may have been jumped
    over (the gap is the end, if the clock is set to a time outside of the window), or be still to
    come, or come again.

    It ends: each turn is at a later change of the zone. Of these a file has finitely many, and its
    footer at most two a year, so that one span in a year is longer than a day; no window is, and it
    ends within such a span.
    """
    begins, length = window
    _, until, offset = zone.span(instant)
    passed = (instant + offset - begins) % DAY
    if passed >= length:
        return None
    while True:
        ends = instant + length - passed
        if until is None or ends < until:
            return ends
        instant = until
        _, until, offset = zone.span(instant)
        passed = (instant + offset - begins) % DAY
        if passed >= length:
            return instant
