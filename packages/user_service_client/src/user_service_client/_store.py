"""The bounded store of cached documents: which of them stay, and which are let go.

Eviction is S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): a
new document is on trial in a small queue, and comes to the main queue if it is read before it gets
to the head. So a campaign that reads everybody once passes through a tenth of the store. A hit
moves nothing: it counts, up to 3, and each count lets the document pass the head of a queue once.

Four things differ from the paper, each measured against it (tests/client/test_store.py):

- The ghosts, which let an evicted document that is wanted again skip the trial, are a table of
  hashes in which one overwrites another. It takes 4 bytes for each entry, not 130, and has the
  same hit ratio (52.3% on average over twenty cases, and 52.2%).
- What is evicted from the main queue becomes a ghost, too. It makes no difference but simpler code.
- A sweep that meets only documents in use gives up after 32 and evicts the next. Otherwise one
  `put` may have to pass all 50,000 three times, while the event loop waits.
- What is removed leaves its place, and takes it again when it is back: an invalidation says that
  a document has changed, not that nobody wants it.
"""

from __future__ import annotations

from array import array
from collections import deque
from itertools import filterfalse
from typing import Generic, TypeVar

MAX_FREQ = 3
_TRIAL_SHARE = 10  # one in so many is on trial
_PATIENCE = 32  # at about 0.1 µs each
_VACANT_SHARE = 4  # one vacant place for so many entries is kept,
_VACANT_FREE = 64  # and a few more, or a small store would tidy up all the time


class Stored:
    """What the store knows of a document. Subclasses add slots for the document itself.

    `size` must stay as it was when the entry was put: to change it, put a new entry.
    A key that is a string of the document itself (`user.id`) costs no memory of its own.
    """

    __slots__ = ("freq", "key", "size")

    def __init__(self, key: str, size: int) -> None:
        self.key = key
        self.size = size
        self.freq = 0


E = TypeVar("E", bound=Stored)


class Store(Generic[E]):
    """At most `max_entries` entries of at most `max_bytes` together. Not for several threads.

    Reading is left to the caller, because a method call would double its cost. It is all of:

        entry = store.entries.get(key)
        if entry is not None and entry.freq < MAX_FREQ:
            entry.freq += 1

    Count only what is wanted, not what is merely looked at. `entries` itself is not to be changed.
    """

    __slots__ = (
        "_ghosts",
        "_main",
        "_max_bytes",
        "_max_entries",
        "_trial",
        "_vacant",
        "bytes",
        "entries",
        "evictions",
    )

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        """Make an empty store. With a bound of 0 it stays empty."""
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self.evictions = 0
        self.entries: dict[str, E] = {}
        self.clear()

    def __len__(self) -> int:
        return len(self.entries)

    def clear(self) -> None:
        """Forget everything but the number of evictions."""
        self.entries.clear()  # and no new one: readers keep it at hand
        self.bytes = 0
        # The queues hold keys, not entries, so that a removed document is freed at once. Each key
        # is in one queue, once, and either in `entries` or in `_vacant`.
        self._trial: deque[str] = deque()
        self._main: deque[str] = deque()
        self._vacant: dict[str, int] = {}  # places of what was removed, with its `freq`
        self._ghosts = array("q")

    def put(self, entry: E) -> None:
        """Store `entry` in place of what lies under its key, and evict what has no room beside it.

        An entry larger than `max_bytes` is not kept, and neither is what it was to replace.
        """
        key, size, entries = entry.key, entry.size, self.entries
        if size > self._max_bytes or self._max_entries < 1:
            self.remove(key)
            return
        if (old := entries.pop(key, None)) is not None:  # `remove`, but sure to keep the place
            self.bytes -= old.size
            self._vacant[key] = old.freq
        while len(entries) >= self._max_entries or self.bytes + size > self._max_bytes:
            self._evict()
        freq = self._vacant.pop(key, None)
        if freq is not None:
            entry.freq = freq
        else:
            (self._main if self._is_ghost(key) else self._trial).append(key)
        entries[key] = entry
        self.bytes += size

    def remove(self, key: str) -> E | None:
        """Take out what lies under `key`, and return it."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.size
            self._vacant[key] = entry.freq
            self._tidy()
        return entry

    def _evict(self) -> None:
        """Let one entry go. There is at least one."""
        entries, trial, main = self.entries, self._trial, self._main
        patience = _PATIENCE
        while True:
            # A share of what there is, not of `max_entries`: the bytes may be the closer bound.
            queue = trial if len(trial) * _TRIAL_SHARE >= len(entries) else main
            key = queue.popleft()
            entry = entries.get(key)
            if entry is None:
                del self._vacant[key]
            elif entry.freq and patience:
                patience -= 1
                entry.freq -= 1
                main.append(key)
            else:
                break
        self._add_ghost(key)
        del entries[key]
        self.bytes -= entry.size
        self.evictions += 1

    def _add_ghost(self, key: str) -> None:
        count = len(self.entries)
        if len(self._ghosts) * 4 < count:
            self._ghosts = array("q", bytes(8 * (count // 2 + 1)))
        self._ghosts[hash(key) % len(self._ghosts)] = hash(key)

    def _is_ghost(self, key: str) -> bool:
        ghosts = self._ghosts
        return bool(ghosts) and ghosts[hash(key) % len(ghosts)] == hash(key)

    def _tidy(self) -> None:
        """Give up vacant places if they are many: of 50,000 in 3 ms, once in 12,500 removals."""
        if len(self._vacant) * _VACANT_SHARE > len(self.entries) + _VACANT_FREE:
            is_vacant = self._vacant.__contains__
            self._trial = deque(filterfalse(is_vacant, self._trial))
            self._main = deque(filterfalse(is_vacant, self._main))
            self._vacant.clear()
