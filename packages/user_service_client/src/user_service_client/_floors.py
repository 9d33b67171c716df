"""What is not believed any more: versions below a floor, and what was asked too early."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

FLOOR_FOR = 60.0
"""Seconds for which a version that was heard of is remembered: much longer than servers may lag
behind one another (1 s under faults, 20 ms otherwise)."""
MAX_FLOORS = 100_000
MAX_PAST_EPOCHS = 16
MAX_DROPPED = 10_000
ABOVE_ALL = 10**17
"""A version that no user has: what Postgres says is believed, and nothing else."""


class Floors:
    """The version below which no copy of a user is believed, within the newest epoch.

    Attributes:
        epoch: The newest epoch that was seen; versions of another say nothing of this one's.
        heard: Versions that were heard of, and when, oldest first. Not to be changed: the cache
            looks into it for each user of a batch, where a method call would be too dear.
    """

    __slots__ = ("_monotonic", "_past_epochs", "epoch", "heard")

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._past_epochs: dict[str, float] = {}
        self.epoch: str | None = None
        self.heard: dict[str, tuple[float, float]] = {}

    def of(self, user_id: str) -> int:
        """Return the version below which no copy of a user is believed."""
        version, _ = self.heard.get(user_id, (0.0, 0.0))
        return ABOVE_ALL if version == math.inf else int(version)

    def rise(self, user_id: str, version: float) -> None:
        """Believe nothing below this version; infinity, of who was erased, means nothing at all."""
        known, _ = self.heard.pop(user_id, (0.0, 0.0))
        now = self._monotonic()
        self.heard[user_id] = (max(known, version), now)
        # Two at a time, the oldest first: as fast as they come, and no pause for all of them.
        for other, (_, at) in list(islice(self.heard.items(), 2)):
            if at < now - FLOOR_FOR or len(self.heard) > MAX_FLOORS:
                del self.heard[other]

    def is_past(self, epoch: str) -> bool:
        """Whether an epoch has ended: only who lags behind still says it.

        Epochs have no order. Who lags behind says an old one for a second, not for a minute.
        """
        return self._monotonic() - self._past_epochs.get(epoch, -math.inf) < FLOOR_FOR

    def recall(self, epoch: str) -> None:
        """Do not take an epoch for a past one any more."""
        self._past_epochs.pop(epoch, None)

    def begin(self, epoch: str) -> bool:
        """Begin an epoch; returns whether that has ended another one, with all its floors."""
        self.recall(epoch)
        ended, self.epoch = self.epoch, epoch
        if ended is None:
            return False
        self._past_epochs[ended] = self._monotonic()
        if len(self._past_epochs) > MAX_PAST_EPOCHS:
            del self._past_epochs[next(iter(self._past_epochs))]
        self.heard.clear()
        return True


class Generations:
    """Which answers that are on their way may still be kept: none that an invalidation overtook.

    Attributes:
        current: Raised by whatever ends copies that are on their way.
        cleared_in: What was asked before is not kept.
        dropped: Nor, of these users, what was asked before theirs. Not to be changed.
    """

    __slots__ = ("cleared_in", "current", "dropped")

    def __init__(self) -> None:
        self.current = self.cleared_in = 0
        self.dropped: dict[str, int] = {}

    def allow(self, user_id: str, asked_in: int) -> bool:
        """Whether nothing has ended all copies of a user since something was asked."""
        return asked_in >= max(self.cleared_in, self.dropped.get(user_id, 0))

    def drop(self, user_id: str) -> None:
        """Keep nothing of a user that is on its way."""
        self.current += 1
        self.dropped.pop(user_id, None)
        self.dropped[user_id] = self.current
        if len(self.dropped) > MAX_DROPPED:
            self.cleared_in = self.dropped.pop(next(iter(self.dropped)))

    def drop_all(self) -> None:
        """Keep nothing that is on its way."""
        self.current += 1
        self.cleared_in = self.current
        self.dropped.clear()
