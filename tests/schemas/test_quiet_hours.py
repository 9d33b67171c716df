"""Quiet hours: exactly what a minute-by-minute walk along the wall clock of any zone finds."""

from __future__ import annotations

import random
import struct
from datetime import UTC, datetime, timedelta, timezone
from io import BytesIO
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from user_service_schemas import Choices, decide, effective_preferences
from user_service_schemas.zones import find_zone, parse_footer, parse_zone

from .strategies import steadily
from .wall_clocks import (
    EPOCH,
    STRANGE_ZONES,
    Situation,
    assert_decided_as_the_oracle_does,
    decided,
    first_allowed,
    naively,
    offset_at,
    situations,
    somebody,
    transitions,
    zone_of,
)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def hours(start: str, end: str) -> tuple[int, int]:
    return tuple(int(text[:2]) * 60 + int(text[3:]) for text in (start, end))  # type: ignore[return-value]


ROWS = {
    "the end falls into the gap": (
        *("Europe/Warsaw", "22:00", "02:30", None),
        *("2026-03-28T23:30Z", "2026-03-29T01:00Z"),
    ),
    "the second 02:30, seen from between the two": (
        *("Europe/Warsaw", "22:00", "02:30", None),
        *("2026-10-25T01:15Z", "2026-10-25T01:30Z"),
    ),
    "the first 02:30 ends the window, though it comes again": (
        *("Europe/Warsaw", "22:00", "02:30", None),
        *("2026-10-25T00:15Z", "2026-10-25T00:30Z"),
    ),
    "the window begins in the gap": (
        *("Europe/Warsaw", "02:15", "04:00", None),
        *("2026-03-29T01:00Z", "2026-03-29T02:00Z"),
    ),
    "the window lies in the gap whole": (
        *("Europe/Warsaw", "02:15", "02:45", None),
        *("2026-03-29T01:00Z", "2026-03-29T01:00Z"),
    ),
    "the window lies in the overlap whole, between its two": (
        *("Europe/Warsaw", "02:15", "02:45", None),
        *("2026-10-25T00:50Z", "2026-10-25T00:50Z"),
    ),
    "the day that Samoa left out": (
        *("Pacific/Apia", "22:00", "07:00", None),
        *("2011-12-30T09:00Z", "2011-12-30T17:00Z"),
    ),
    "half an hour back": (
        *("Australia/Lord_Howe", "22:00", "01:45", None),
        *("2026-04-04T15:05Z", "2026-04-04T15:15Z"),
    ),
    "23:59 hours": (
        *("UTC", "12:00", "11:59", None),
        *("2026-01-01T12:00Z", "2026-01-02T11:59Z"),
    ),
    "the minute that 23:59 hours leave": (
        *("UTC", "12:00", "11:59", None),
        *("2026-01-01T11:59:59.999999Z", "2026-01-01T11:59:59.999999Z"),
    ),
    "the start is in the window": (
        *("UTC", "22:00", "07:00", None),
        *("2026-01-01T22:00Z", "2026-01-02T07:00Z"),
    ),
    "the end is not": (
        *("UTC", "22:00", "07:00", None),
        *("2026-01-01T07:00Z", "2026-01-01T07:00Z"),
    ),
    "in the day's last microsecond": (
        *("UTC", "22:00", "07:00", None),
        *("2026-01-01T06:59:59.999999Z", "2026-01-01T07:00Z"),
    ),
    "seconds of local mean time": (
        *("Europe/Warsaw", "22:00", "07:00", None),  # 1:24:00 until 1915
        *("1850-01-01T00:00Z", "1850-01-01T05:36Z"),
    ),
    "odd seconds of local mean time": (
        *("Europe/Amsterdam", "22:00", "07:00", None),  # 0:17:30 before 1892, as Brussels
        *("1850-01-01T00:00Z", "1850-01-01T06:42:30Z"),
    ),
    "by the rule after the last change of the file": (
        *("Europe/Warsaw", "22:00", "02:30", None),
        *("2400-03-25T23:30Z", "2400-03-26T01:00Z"),
    ),
    "muted until before the window": (
        *("UTC", "22:00", "07:00", "2026-01-01T21:59:59.5Z"),
        *("2026-01-01T20:00Z", "2026-01-01T21:59:59.5Z"),
    ),
    "muted until inside of the window": (
        *("UTC", "22:00", "07:00", "2026-01-01T22:00Z"),
        *("2026-01-01T20:00Z", "2026-01-02T07:00Z"),
    ),
    "muted from inside of one window into the next": (
        *("UTC", "22:00", "07:00", "2026-01-03T03:00Z"),
        *("2026-01-01T23:00Z", "2026-01-03T07:00Z"),
    ),
    "muted in the window until after it": (
        *("UTC", "22:00", "07:00", "2026-01-02T09:00:00.000001Z"),
        *("2026-01-01T23:00Z", "2026-01-02T09:00:00.000001Z"),
    ),
    "muted until this very instant": (
        *("UTC", "22:00", "07:00", "2026-01-01T12:00Z"),
        *("2026-01-01T12:00Z", "2026-01-01T12:00Z"),
    ),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_the_first_allowed_instant(row: tuple[str, str, str, str | None, str, str]) -> None:
    zone, start, end, muted, asked, expected = row
    situation = Situation(zone, *hours(start, end), at(muted) if muted else None, at(asked))
    assert first_allowed(situation) == at(expected)
    decision = assert_decided_as_the_oracle_does(situation)
    assert (decision.deferred_until or at(asked)) == at(expected)


@settings(steadily, max_examples=1000)
@given(situations(st.sampled_from(STRANGE_ZONES)))
def test_a_decision_is_what_the_oracle_finds(situation: Situation) -> None:
    assert_decided_as_the_oracle_does(situation)


@settings(steadily, max_examples=200)
@given(situations(st.sampled_from(STRANGE_ZONES)))
def test_an_explanation_says_what_was_decided(situation: Situation) -> None:
    decision = decided(situation, explain=True)
    (deciding,) = (said for said in decision.explanation if said.rule == decision.reason)
    assert deciding.verdict == decision.decision


def test_the_property_finds_a_naive_implementation_wrong() -> None:
    once = settings(
        derandomize=True,
        database=None,
        max_examples=2000,
        phases=[Phase.generate, Phase.shrink],
    )
    wrong = find(
        situations(st.sampled_from(STRANGE_ZONES)),
        lambda situation: (
            situation.at.year in range(2000, 2030)
            and naively(situation) != first_allowed(situation)
        ),
        settings=once,
    )
    print(f"{wrong}: naively {naively(wrong)}, right is {first_allowed(wrong)}")  # noqa: T201
    assert naively(wrong) != first_allowed(wrong)
    assert_decided_as_the_oracle_does(wrong)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("2026-03-28T23:30Z", "2026-03-29T01:30Z"),  # half an hour too late
        ("2026-10-25T01:15Z", "2026-10-25T00:30Z"),  # in the past
    ],
)
def test_a_naive_implementation_fails_as_the_contract_says(asked: str, answer: str) -> None:
    situation = Situation("Europe/Warsaw", *hours("22:00", "02:30"), None, at(asked))
    assert naively(situation) == at(answer) != first_allowed(situation)


ENDS_OF_TIME = [
    datetime.min.replace(tzinfo=tz)
    for tz in (UTC, timezone(timedelta(hours=14)), timezone(-timedelta(hours=14)))
] + [
    datetime.max.replace(tzinfo=tz)
    for tz in (UTC, timezone(timedelta(hours=14)), timezone(-timedelta(hours=14)))
]


@pytest.mark.parametrize("zone", STRANGE_ZONES)
def test_the_ends_of_the_calendar_are_instants_like_others(zone: str) -> None:
    for asked in ENDS_OF_TIME:
        for muted in (None, *ENDS_OF_TIME):
            for start, end in ((0, 1), (0, 1439), (1439, 0), (720, 719)):
                situation = Situation(zone, start, end, muted, asked)
                decision = decided(situation, explain=True)
                assert len(decision.explanation) == 7
                assert (decision.deferred_until is None) == (decision.decision == "allow")


@pytest.mark.parametrize(
    ("start", "end"),
    [(None, None), ("22:00", None), (None, "07:00"), ("22:00", "22:00"), ("25:00", "07:00")],
)
def test_what_an_old_row_cannot_mean_is_no_quiet_hours(start: str | None, end: str | None) -> None:
    user = somebody(Choices(quiet_hours_start=start, quiet_hours_end=end))
    decision = decide(user, "push", at("2026-01-01T23:00Z"), explain=True)
    assert decision.decision == "allow"


# The zones, beside `zoneinfo` on the same files.


@pytest.mark.parametrize("name", STRANGE_ZONES)
def test_a_zone_has_the_offsets_that_zoneinfo_reads(name: str) -> None:
    assert_zone_is_read_rightly(name, 100)


def assert_zone_is_read_rightly(name: str, count: int) -> int:
    zone, known = find_zone(name), zone_of(name)
    assert zone is not None
    seeded = random.Random(name)  # noqa: S311
    first, last = (int((datetime(y, 1, 1, tzinfo=UTC) - EPOCH).total_seconds()) for y in (2, 9999))
    probes = [seeded.randrange(first, last) for _ in range(count)]
    probes += [int((change - EPOCH).total_seconds()) for change in transitions(name)]
    tried = 0
    for probe in probes:
        ends = [end for end in zone.span(probe)[:2] if end is not None]
        for second in (probe, probe - 1, *ends, *(end - 1 for end in ends)):
            if first <= second < last:
                expected = offset_at(known, EPOCH + timedelta(seconds=second))
                assert zone.span(second).offset == expected.total_seconds(), (name, second)
                tried += 1
    return tried


@pytest.mark.parametrize(
    "footer",
    [
        "CET-1CEST,M3.5.0,M10.5.0/3",
        "IST-1GMT0,M10.5.0,M3.5.0/1",
        "<-02>2<-01>,M3.5.0/-1,M10.5.0/0",
        "EET-2EEST,M3.4.4/50,M10.4.4/50",
        "AAA-3:30:15BBB-5,M2.4.6/0:00:01,M11.2.3/24",
        "AAA3BBB,J60,J300/1:30",
        "AAA-3BBB,M12.5.0,M1.1.0",
        "<+1245>-12:45",
    ],
)
def test_a_footer_is_understood_as_zoneinfo_understands_it(footer: str) -> None:
    header = b"TZif2" + bytes(15) + struct.pack(">6I", 0, 0, 0, 0, 1, 4)
    block = struct.pack(">ibB", 0, 0, 0) + b"LMT\0"
    # Any first transition, so that both go on by the footer from there.
    change = struct.pack(">6I", 0, 0, 0, 1, 1, 4)
    second = b"TZif2" + bytes(15) + change + struct.pack(">qB", -(10**10), 0) + block
    data = header + block + second + f"\n{footer}\n".encode()
    zone, known = parse_zone(data), ZoneInfo.from_file(BytesIO(data))
    for year in (1970, 1999, 2000, 2023, 2024, 2100, 2400, 9997):
        for day in range(366):
            for hour in (0, 1, 2, 11, 23):
                instant = datetime(year, 1, 1, hour, 30, tzinfo=UTC) + timedelta(days=day)
                second_ = int((instant - EPOCH).total_seconds())
                span = zone.span(second_)
                assert span.offset == offset_at(known, instant).total_seconds(), instant
                assert span.until is None or span.until > second_


@pytest.mark.parametrize(
    ("rule", "begins"),
    [
        # Days as numbers, where zoneinfo is a day off: no zone of the database has them.
        ("59/0", "2023-03-01T00:00Z"),
        ("59/0", "2024-02-29T00:00Z"),
        ("0/-1", "2023-12-31T23:00Z"),
        ("365/0", "2024-12-31T00:00Z"),
        ("J59/0", "2023-02-28T00:00Z"),
        ("J59/0", "2024-02-28T00:00Z"),
        ("J60/0", "2024-03-01T00:00Z"),
        ("J365/24", "2025-01-01T00:00Z"),
    ],
)
def test_a_footer_counts_days_as_posix_says(rule: str, begins: str) -> None:
    footer = parse_footer(f"AAA0BBB,{rule},M7.1.0")
    expected = int((at(begins) - EPOCH).total_seconds())
    assert footer.span(expected, None)[::2] == (expected, 3600)
    assert footer.span(expected - 1, None)[1:] == (expected, 0)


@pytest.mark.parametrize("text", ["", "CET", "CET-1CEST", "C-1", "CET-1CEST,M3.5.0"])
def test_what_is_no_footer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="POSIX"):
        parse_footer(text)


@pytest.mark.parametrize("data", [b"TZif" + bytes(40), b"no!!2" + bytes(39)])
def test_what_is_no_zone_file_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="TZif"):
        parse_zone(data)


@pytest.mark.parametrize("name", ["", "Mars/Olympus", "../zones", "/etc/passwd", "europe/warsaw"])
def test_a_zone_that_there_is_not_is_none(name: str) -> None:
    assert find_zone(name) is None


def test_a_zone_that_the_database_lost_falls_back_to_the_default() -> None:
    night = Choices(quiet_hours_start="22:00", quiet_hours_end="07:00", timezone="Mars/Olympus")
    shown = effective_preferences(night, "Asia/Tokyo")
    assert (shown.timezone, shown.effective_timezone) == ("Mars/Olympus", "Asia/Tokyo")
    user = msgspec.structs.replace(somebody(night), preferences=shown)
    decision = decide(user, "push", at("2026-01-01T14:00Z"), explain=True)
    assert decision.deferred_until == at("2026-01-01T22:00Z")
    (said,) = (said.why for said in decision.explanation if said.rule == "quiet_hours")
    assert "Mars/Olympus is not known, so the default, Asia/Tokyo, is used instead" in said
