"""What the stream of changes covers, and for how long that is relied upon."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime

LAG = 2.0
"""Seconds after a stream began from which what is read is covered by it: what a server read just
before may be older than the first event."""
COMPLETE_FOR = 30.0
"""Seconds that the stream's `through` may be behind."""
DRIFT = 0.001
"""Seconds a second by which the clocks of two machines may drift apart: twice what NTP slews."""


class Coverage:
    """Until when the stream has told of all changes, and of which copies.

    The stream covers what was validated `since` it began: it has told of all changes of that up to
    `through`, and is relied upon while that is not long ago.

    Reading an attribute is left to the cache where a method call would double what a read costs.

    Attributes:
        valid_from: What was validated before is to be revalidated: the epoch or the stream began
            anew then.
        since: What was validated before is not covered.
        complete_until: Until when covered copies are used without asking.
    """

    __slots__ = ("_fresh_for", "_monotonic", "_through", "complete_until", "since", "valid_from")

    def __init__(self, monotonic: Callable[[], float], fresh_for: float) -> None:
        self._monotonic = monotonic
        self._fresh_for = fresh_for
        self.valid_from = -math.inf
        self.since = math.inf
        self.complete_until = self._through = -math.inf

    @property
    def is_complete(self) -> bool:
        """Whether the stream tells of all changes in time."""
        return self._monotonic() < self.complete_until

    def known_good_at(self, validated_at: float) -> float:
        """Return when a copy that was validated then was certainly the newest version."""
        if validated_at < self.since:
            return validated_at
        # The stream was complete until then, and told of no change of it.
        return max(validated_at, self._through)

    def began(self) -> None:
        """The stream begins here: it covers what is read from now on."""
        self.since = self._monotonic() + LAG
        self.complete_until = self._through = -math.inf

    def complete(self, lag: float) -> None:
        """The stream has told of all changes until `lag` seconds ago."""
        self._through = max(self._through, self._monotonic() - max(0.0, lag))
        self.complete_until = self._through + COMPLETE_FOR

    def interrupted(self) -> None:
        """The stream is gone: changes are not told of, until it goes on from where it was.

        What it covers is as if it had been validated when it was last complete, or each restart of
        a server would have all copies revalidated at once.
        """
        self.complete_until = min(self.complete_until, self._through + self._fresh_for)

    def reset(self) -> None:
        """Something may have been missed: nothing from before now is valid, or covered."""
        self.valid_from = self._monotonic()
        self.began()


class Lateness:
    """How late the heartbeats of one connection are heard, beside the promptest of them.

    A heartbeat waits in the socket's buffer while the event loop stands still. The clocks of two
    machines cannot be compared, but how far they are apart can, with how far they were before.
    """

    __slots__ = ("_ahead", "_heard")

    def __init__(self) -> None:
        self._ahead, self._heard = -math.inf, 0.0

    def of(self, sent: datetime, *, heard: float) -> float:
        """Return by how many seconds a heartbeat is late.

        Args:
            sent: When, by the clock of the service.
            heard: When, by the clock here, which need not be of the same era.
        """
        ahead = sent.timestamp() - heard
        self._ahead = max(ahead, self._ahead - DRIFT * (heard - self._heard))
        self._heard = heard
        return self._ahead - ahead
