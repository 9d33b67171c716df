"""The feed of one process: numbers changes when it is its turn, and reads them for all streams."""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec
import structlog
from user_service_schemas import Change, Changes, Heartbeat

from ..errors import DependencyUnavailable, InvalidCursor, Overloaded
from ..metrics import Metrics
from ..periodic import Periodic
from ..settings import Settings
from ..storage.database import Database, checked_out, create_engine, translated
from ..storage.replica import Replica
from ..storage.state import StateWatcher
from . import repository
from .repository import FeedState

INTERVAL = 0.05
"""Seconds between two looks at the log: what a change may wait for its position and its readers.

Not sooner for a write of this process: what is committed in between goes to all readers at once.
"""
SLOWEST_INTERVAL = 1.0
THROUGH_INTERVAL = timedelta(seconds=1)
"""How old `through` may be in a feed in which nothing happens."""
HEARTBEAT_INTERVAL = 15.0
BATCH = 1000
TAIL_BYTES = 4 * 1024 * 1024
"""How much of the latest events is kept for streams that continue."""
JOINED_BYTES = 64 * 1024
QUEUE_BYTES = 1024 * 1024
"""How much may wait for one reader before it is cut off, to continue when it reads again."""

_CURSOR = re.compile(r"([0-9A-Za-z]{1,32})\.(0|[1-9][0-9]{0,17})")
"""Each place has one cursor: no leading zeros, and no other scripts' digits."""

_log = structlog.get_logger()
_encode = msgspec.json.Encoder().encode


class Cursor(NamedTuple):
    """A place in the feed: `<epoch>.<position>`."""

    epoch: str
    position: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.position}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Return the cursor that `text` is; raises `InvalidCursor`."""
        found = _CURSOR.fullmatch(text)
        if not found:
            raise InvalidCursor
        return cls(found[1], int(found[2]))


class Event(NamedTuple):
    """An event as it goes to the socket, and the position behind which a stream continues."""

    position: int
    encoded: bytes


def encode_event(name: str, data: object, cursor: Cursor | None = None) -> bytes:
    """Return an event as the WHATWG's HTML standard has it (section 9.2.5)."""
    identified = f"id: {cursor}\n" if cursor else ""
    return b"%bevent: %b\ndata: %b\n\n" % (identified.encode(), name.encode(), _encode(data))


def encode_changes(changes: Iterable[Change]) -> Iterator[Event]:
    """Encode changes, each with its position as the id to go on from."""
    for change in changes:
        cursor = Cursor.parse(change.position)
        yield Event(cursor.position, encode_event("change", change, cursor))


class Subscription:
    """What waits for one reader: chunks of encoded events, which all readers share."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._filled = asyncio.Event()
        self.too_slow = False

    def put(self, chunk: bytes) -> None:
        """Add a chunk; a reader for whom too much waits is marked as too slow."""
        self._size += len(chunk)
        if self._size > QUEUE_BYTES:
            self.too_slow = True
            self._chunks.clear()
            self._size = 0
        else:
            self._chunks.append(chunk)
        self._filled.set()

    async def take(self) -> bytes:
        """Wait for what there is to send; empty if the reader was too slow.

        Small chunks are joined; large ones stay what all readers share.
        """
        await self._filled.wait()
        some = [self._chunks.popleft()] if self._chunks else []
        size = sum(map(len, some))
        while self._chunks and size + len(self._chunks[0]) <= JOINED_BYTES:
            some.append(self._chunks.popleft())
            size += len(some[-1])
        self._size -= size
        if not self._chunks:
            self._filled.clear()
        return some[0] if len(some) == 1 else b"".join(some)


class ChangeFeed:
    """The change feed as one process sees it.

    One sequencer at a time, of whichever process gets the lock, numbers committed changes; each
    process reads them once, and hands the encoded events to all its streams.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        state: StateWatcher,
        replica: Replica,
        metrics: Metrics,
    ) -> None:
        # Not of the pool that answers requests: the feed must not wait behind them.
        self._engine = create_engine(settings, pool_size=2)
        self._database = database
        self._state = state
        self._replica = replica
        self._retention_days = settings.changes_retention_days
        self._metrics = metrics
        self._running = Periodic("change-feed", self._run, self._interval)
        self._took = 0.0
        self._waits = False
        # Asked for when they are read: what stands still must not look well.
        metrics.feed_position.set_function(lambda: self._position)
        metrics.feed_through_lag.set_function(self._through_lag)
        metrics.feed_lag.set_function(lambda: self._through_lag() if self._waits else 0)
        metrics.stream_subscribers.set_function(lambda: len(self._subscriptions))
        self._epoch = ""
        self._position = 0
        self._pruned = 0
        self._through = datetime.now(UTC)
        self._clock_offset = timedelta()
        self._heartbeat_at = 0.0
        self._tail: deque[Event] = deque()
        self._tail_size = 0
        self._subscriptions: set[Subscription] = set()

    async def start(self) -> None:
        """Begin at the end of the log."""
        async with checked_out(self._engine) as connection:
            self._begin(await repository.read_feed_state(connection))
        self._running.start()

    def _begin(self, state: FeedState) -> None:
        self._epoch = self._state.epoch
        self._position = state.last_position
        self._tail.clear()
        self._tail_size = 0
        self._note(state)

    @property
    def end(self) -> Cursor:
        """The place behind the last change that was read."""
        return Cursor(self._epoch, self._position)

    def completeness(self) -> Heartbeat:
        """Return up to which time all that was acknowledged has been read."""
        return Heartbeat(through=self._through, now=datetime.now(UTC) + self._clock_offset)

    def heartbeat(self) -> bytes:
        """Return the event that says how complete the feed is."""
        return encode_event("heartbeat", self.completeness())

    async def why_not(self, cursor: Cursor) -> str | None:
        """Return why nobody can go on from here: `epoch`, `age`, or None if one can.

        Raises:
            DependencyUnavailable, Overloaded
        """
        if cursor.position > self._position or cursor.epoch != self._epoch:
            # Perhaps this process is the one that is behind.
            async with self._database.direct() as connection:
                state = await repository.read_feed_state(connection)
            if cursor.epoch != self._state.epoch or cursor.position > state.last_position:
                return "epoch"
        return "age" if cursor.position < self._pruned else None

    async def read(self, after: Cursor | None, limit: int) -> Changes:
        """Return a page of changes behind a cursor, or from the oldest.

        Raises:
            InvalidCursor: it is of another epoch, or older than what is kept.
            DependencyUnavailable, Overloaded
        """
        async with self._database.direct() as connection:
            state = await repository.read_feed_state(connection)
            epoch = self._state.epoch
            position = state.pruned_position if after is None else after.position
            if after is not None and (
                after.epoch != epoch or not state.pruned_position <= position <= state.last_position
            ):
                raise InvalidCursor
            items = await repository.read_changes(connection, epoch, position, limit)
        # Positions have no gaps: if the next one is missing, it was pruned just now.
        if after is not None and items and Cursor.parse(items[0].position).position > position + 1:
            raise InvalidCursor
        return Changes(
            items=tuple(items),
            next=items[-1].position if items else str(Cursor(epoch, position)),
        )

    def subscribe(self, cursor: Cursor) -> Subscription | None:
        """Follow the feed from `cursor`; None if this process has not what comes next.

        Raises:
            InvalidCursor: another epoch has begun.
        """
        if cursor.epoch != self._epoch:
            raise InvalidCursor
        first = self._tail[0].position - 1 if self._tail else self._position
        if not first <= cursor.position <= self._position:
            return None
        subscription = Subscription()
        missed = [event.encoded for event in self._tail if event.position > cursor.position]
        for chunk in missed:
            subscription.put(chunk)
        if subscription.too_slow:
            return None
        self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Follow the feed no longer."""
        self._subscriptions.discard(subscription)

    def _through_lag(self) -> float:
        complete = self.completeness()
        return (complete.now - complete.through).total_seconds()

    def end_streams(self) -> None:
        """Wake all readers, so that they see that they are to end."""
        for subscription in self._subscriptions:
            subscription.put(b"")

    async def _run(self) -> None:
        try:
            with translated():
                while await self._step():
                    pass  # the backlog of an import, or of an outage
        except DependencyUnavailable:
            pass  # the state watcher tells of it, and heartbeats show that nothing comes
        except Overloaded:
            _log.warning("feed.delayed")
        finally:
            self._beat()

    def _interval(self) -> float:
        # A look is slow while a long snapshot (a dump) keeps dead entries in the index of what
        # waits: 14 ms after 100,000 changes. It is to be a tenth of a core at the most.
        return min(max(INTERVAL, 10 * self._took), SLOWEST_INTERVAL)

    async def _step(self) -> bool:
        """Number and read what is there; returns whether there is more."""
        is_more = False
        async with checked_out(self._engine) as connection:
            began = time.monotonic()
            state = await repository.read_feed_state(connection)
            self._took = time.monotonic() - began
            complete = not state.is_waiting
            if state.is_waiting or state.now - state.complete_through > THROUGH_INTERVAL:
                numbering = time.monotonic()
                numbered = await repository.number_changes(connection, BATCH)
                if numbered is not None:
                    state, number = numbered
                    self._metrics.feed_numbered.inc(number)
                    is_more = number == BATCH
                    if not is_more:
                        complete, began = True, numbering
            if self._epoch != self._state.epoch:
                self._reset(state)
            while self._position < state.last_position:
                read = await repository.read_changes(connection, self._epoch, self._position, BATCH)
                if not read:
                    break
                self._replica.saw(read)
                self._publish(read)
            else:
                if complete:
                    self._replica.looked(began, self._position)
        self._note(state)
        return is_more

    def _note(self, state: FeedState) -> None:
        self._through = state.complete_through
        self._pruned = state.pruned_position
        self._clock_offset = state.now - datetime.now(UTC)
        self._waits = state.is_waiting

    def _reset(self, state: FeedState) -> None:
        """Begin anew in another epoch; the streams end, and are reset when they come back."""
        self._begin(state)
        for subscription in self._subscriptions:
            subscription.too_slow = True
            subscription.put(b"")
        self._subscriptions.clear()

    def _publish(self, read: list[Change]) -> None:
        events = list(encode_changes(read))
        for event in events:
            self._tail.append(event)
            self._tail_size += len(event.encoded)
        while self._tail_size > TAIL_BYTES:
            self._tail_size -= len(self._tail.popleft().encoded)
        self._position = events[-1].position
        self._broadcast(b"".join(event.encoded for event in events))
        self._metrics.stream_events.inc(len(events) * len(self._subscriptions))

    def _beat(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + HEARTBEAT_INTERVAL
            self._broadcast(self.heartbeat())

    def _broadcast(self, chunk: bytes) -> None:
        for subscription in self._subscriptions:
            subscription.put(chunk)

    async def prune(self) -> int:
        """Delete what is older than what is kept, a batch at a time; returns how much it was."""
        with translated():
            async with self._engine.begin() as connection:
                return await repository.prune_changes(connection, self._retention_days, BATCH)

    async def close(self) -> None:
        """Stop reading."""
        await self._running.stop()
        await self._engine.dispose()
