"""Owns what callers were answered, and which of it breaks the promises about reads.

Times are seconds of `time.monotonic`, noted by the callers: a request begins before it is sent and
ends after its answer is read, so what is found here is never an artefact of when it was noted.
"""

from __future__ import annotations

import bisect
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

GONE = sys.maxsize
"""The version of a user who was erased: above every other, since nobody comes back."""
NEVER = math.inf
"""The end of a request that was not answered, or refused: it may have happened, or not."""


@dataclass(frozen=True, slots=True)
class Write:
    """A write of one user; `version` is the one acknowledged (`GONE` for an erasure)."""

    user: str
    server: int
    began: float
    ended: float
    version: int
    content: int | None = None
    """A digest of the document, where the answer held it."""


@dataclass(frozen=True, slots=True)
class Read:
    """One user as one answer showed it; a 304 shows the version that it names."""

    user: str
    server: int
    began: float
    ended: float
    version: int
    content: int | None = None
    tokens: tuple[str, ...] = ()
    at_least: int = 0
    """The `X-Min-Version` that was asked for."""


@dataclass(frozen=True, slots=True)
class Move:
    """A token given to a user. Those of one token follow each other, since one writer has it."""

    token: str
    user: str
    server: int
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Violation:
    """A read that should not have been answered so."""

    rule: str
    read: Read
    late: float = 0.0
    """Seconds between what the read should have known and its begin."""


class Lag(NamedTuple):
    """For how many seconds after its acknowledgement a write was not read by the other server."""

    writes: int
    p50: float
    p999: float
    most: float


@dataclass(slots=True)
class History:
    """All that was answered."""

    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)


class _Floor:
    """The highest version that was known at a time, of versions that became known one by one."""

    def __init__(self, known: Iterable[tuple[float, int]]) -> None:
        ordered = sorted(known)
        self.times = [time for time, _ in ordered]
        self.versions = [version for _, version in ordered]
        self._highest = list(accumulate(self.versions, max))

    def before(self, time: float) -> int:
        count = bisect.bisect_left(self.times, time)
        return self._highest[count - 1] if count else 0

    def late(self, read: Read) -> float:
        """How long before the read began something newer than what it shows was known."""
        count = bisect.bisect_left(self.times, read.began)
        first = bisect.bisect_right(self._highest, read.version, hi=count)
        return read.began - self.times[first]


def violations(history: History, bound: float) -> list[Violation]:
    """Return the reads that break a promise.

    A server never answers with less than it has acknowledged before; nor, `bound` seconds after
    another server acknowledged something or anybody was shown it, with less than that.
    """
    found = list(_stale(history, bound))
    found += _vanished(history)
    found += _ambiguous(history)
    found += _misplaced(history, bound)
    found += [
        Violation("below X-Min-Version", read)
        for read in history.reads
        if read.version < read.at_least
    ]
    return found


def _stale(history: History, bound: float) -> Iterator[Violation]:
    acknowledged: dict[str, list[Write]] = defaultdict(list)
    for write in history.writes:
        if write.ended < NEVER:
            acknowledged[write.user].append(write)
    shown: dict[str, list[Read]] = defaultdict(list)
    for read in history.reads:
        shown[read.user].append(read)
    for user, reads in shown.items():
        by_server = [
            _Floor((w.ended, w.version) for w in acknowledged[user] if w.server == server)
            for server in (0, 1)
        ]
        seen = _Floor((r.ended, r.version) for r in reads)
        for read in reads:
            for rule, floor, patience in (
                ("older than its server acknowledged", by_server[read.server], 0.0),
                ("older than the other server acknowledged", by_server[1 - read.server], bound),
                ("went back", seen, bound),
            ):
                if read.version < (highest := floor.before(read.began - patience)):
                    told = "a deleted user came back: " if highest == GONE else ""
                    yield Violation(told + rule, read, floor.late(read))


def _vanished(history: History) -> Iterator[Violation]:
    erased: dict[str, float] = {}
    for write in history.writes:
        if write.version == GONE:
            erased[write.user] = min(write.began, erased.get(write.user, NEVER))
    for read in history.reads:
        if read.version == GONE and read.ended < erased.get(read.user, NEVER):
            yield Violation("nobody has deleted it", read)


def _ambiguous(history: History) -> Iterator[Violation]:
    contents: dict[tuple[str, int], int] = {}
    for write in history.writes:
        if write.content is not None:
            contents[write.user, write.version] = write.content
    for read in history.reads:
        if read.content is not None:
            known = contents.setdefault((read.user, read.version), read.content)
            if known != read.content:
                yield Violation("two contents of one version", read)


def _misplaced(history: History, bound: float) -> Iterator[Violation]:
    """Find tokens shown where they were not any more."""
    moves: dict[str, list[Move]] = defaultdict(list)
    for move in sorted(history.moves, key=lambda move: move.began):
        moves[move.token].append(move)
    for read in history.reads:
        for token in read.tokens:
            owners: set[str] = set()
            since = 0.0
            for move in moves[token]:
                if move.began > read.ended:
                    break
                patience = 0.0 if move.server == read.server else bound
                if move.ended < read.began - patience:
                    owners.clear()
                    since = move.ended
                owners.add(move.user)
            if read.user not in owners:
                yield Violation("a token of somebody else", read, read.began - since)


def lag(history: History) -> Lag:
    """Return how long the other server still read what was older than an acknowledged write."""
    writes: dict[tuple[str, int], list[Write]] = defaultdict(list)
    for write in history.writes:
        if write.ended < NEVER:
            writes[write.user, write.server].append(write)
    for some in writes.values():
        some.sort(key=lambda write: write.ended)
    floors = {key: _Floor((w.ended, w.version) for w in some) for key, some in writes.items()}
    lags = dict.fromkeys((w for some in writes.values() for w in some), 0.0)
    for read in history.reads:
        elsewhere = (read.user, 1 - read.server)
        if elsewhere not in floors or floors[elsewhere].before(read.began) <= read.version:
            continue
        for write in writes[elsewhere]:
            if write.ended < read.began and write.version > read.version:
                lags[write] = max(lags[write], read.began - write.ended)
    ordered = sorted(lags.values())
    return Lag(len(ordered), _part(ordered, 0.5), _part(ordered, 0.999), _part(ordered, 1.0))


def _part(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, math.floor(part * len(ordered)))]
