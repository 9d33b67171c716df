"""The change feed of the fake: its log, and the streams that follow it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from typing import NamedTuple

import httpx
import msgspec
from user_service_schemas import Change, ChangeKind, Changes, ErrorCode, Heartbeat, Reset

from ._clock import VirtualClock
from ._refusals import Refusal

HEARTBEAT_INTERVAL = 15.0
RETRY_MS = 1000

_CURSOR = re.compile(r"([0-9A-Za-z]{1,32})\.(0|[1-9][0-9]{0,17})")
_encode = msgspec.json.Encoder().encode


class Cursor(NamedTuple):
    """A place in the feed: `<epoch>.<position>`."""

    epoch: str
    position: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.position}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Return the cursor that `text` is; raises `Refusal`."""
        found = _CURSOR.fullmatch(text)
        if not found:
            raise Refusal(ErrorCode.INVALID_CURSOR)
        return cls(found[1], int(found[2]))


class _Waiting(NamedTuple):
    """A change that is committed and has no position yet."""

    user_id: str
    version: int
    kind: ChangeKind
    at: datetime


class Stream(httpx.AsyncByteStream):
    """What one reader is sent. It ends when it is told to, and never by time."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._chunks: asyncio.Queue[bytes | None | httpx.TransportError] = asyncio.Queue()

    def put(self, chunk: bytes) -> None:
        """Send something."""
        self._chunks.put_nowait(chunk)

    def end(self, error: httpx.TransportError | None = None) -> None:
        """End the answer in good order, or break the connection with `error`."""
        self._chunks.put_nowait(error)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (chunk := await self._chunks.get()) is not None:
            if isinstance(chunk, httpx.TransportError):
                raise chunk
            yield chunk

    async def aclose(self) -> None:
        """Note that the reader has gone."""
        self._feed.unsubscribe(self)


class Feed:
    """Numbers changes, keeps them, and passes them on to all streams."""

    def __init__(self, clock: VirtualClock, epoch: str) -> None:
        self.epoch = epoch
        self._clock = clock
        self._kept: list[Change] = []
        self._waiting: list[_Waiting] = []
        self._last = 0
        self._pruned = 0
        self._stalled_at: datetime | None = None
        self._streams: set[Stream] = set()
        self._beats = False

    @property
    def streams(self) -> int:
        """How many readers follow the feed."""
        return len(self._streams)

    def append(self, user_id: str, version: int, kind: ChangeKind, at: datetime) -> None:
        """Add a change; `publish` gives it its position."""
        self._waiting.append(_Waiting(user_id, version, kind, at))

    def publish(self) -> None:
        """Number what waits, by user and version, and send it to all streams."""
        if self._stalled_at is not None:
            return
        for user_id, version, kind, at in sorted(self._waiting):
            self._last += 1
            change = Change(
                position=str(self._end),
                user_id=user_id,
                version=version,
                kind=kind,
                at=at,
                actor=None,
            )
            self._kept.append(change)
            self._broadcast(_encode_change(change))
        self._waiting.clear()

    def stall(self) -> None:
        """Have no change come through from now on, and say so in heartbeats."""
        self._stalled_at = self._stalled_at or self._clock.now()

    def go_on(self) -> None:
        """Have what waits, and all that comes, come through again."""
        self._stalled_at = None
        self.publish()

    def prune(self) -> None:
        """Forget all changes, as the service does after some days."""
        self._pruned = self._last
        self._kept.clear()

    def renew(self, epoch: str) -> None:
        """Begin another epoch: all streams end, and no cursor of before is good."""
        self.epoch = epoch
        self._kept = [
            msgspec.structs.replace(
                change, position=str(Cursor(epoch, Cursor.parse(change.position).position))
            )
            for change in self._kept
        ]
        self.break_streams(None)

    def break_streams(self, error: httpx.TransportError | None) -> None:
        """End all streams: in good order, or with `error`."""
        for stream in self._streams:
            stream.end(error)
        self._streams.clear()

    def read(self, after: str | None, limit: int) -> Changes:
        """Return a page behind a cursor, or from the oldest; raises `Refusal`."""
        position = self._pruned
        if after is not None:
            epoch, position = Cursor.parse(after)
            if epoch != self.epoch or not self._pruned <= position <= self._last:
                raise Refusal(ErrorCode.INVALID_CURSOR)
        items = tuple(self._behind(position))[:limit]
        return Changes(
            items=items,
            next=items[-1].position if items else str(Cursor(self.epoch, position)),
        )

    def subscribe(self, last_event_id: str | None) -> Stream:
        """Follow the feed behind an event, or from now on; raises `Refusal`."""
        cursor = Cursor.parse(last_event_id) if last_event_id else None
        stream = Stream(self)
        stream.put(b"retry: %d\n\n" % RETRY_MS + self._first(cursor))
        if cursor is not None and self._why_not(cursor) is None:
            for change in self._behind(cursor.position):
                stream.put(_encode_change(change))
        stream.put(self._heartbeat())
        self._streams.add(stream)
        if not self._beats:
            self._beats = True
            self._clock.call_later(HEARTBEAT_INTERVAL, self._beat)
        return stream

    def unsubscribe(self, stream: Stream) -> None:
        """Follow the feed no longer."""
        self._streams.discard(stream)

    @property
    def _end(self) -> Cursor:
        return Cursor(self.epoch, self._last)

    def _behind(self, position: int) -> Iterable[Change]:
        return self._kept[max(0, position - self._pruned) :]

    def _first(self, cursor: Cursor | None) -> bytes:
        if cursor is None:
            return _encode_event("ready", self._completeness(), self._end)
        if reason := self._why_not(cursor):
            return _encode_event("reset", Reset(reason=reason), self._end)
        return b""

    def _why_not(self, cursor: Cursor) -> str | None:
        if cursor.epoch != self.epoch or cursor.position > self._last:
            return "epoch"
        return "age" if cursor.position < self._pruned else None

    def _completeness(self) -> Heartbeat:
        now = self._clock.now()
        return Heartbeat(through=self._stalled_at or now, now=now)

    def _heartbeat(self) -> bytes:
        return _encode_event("heartbeat", self._completeness())

    def _beat(self) -> None:
        self._beats = bool(self._streams)
        if self._beats:
            self._broadcast(self._heartbeat())
            self._clock.call_later(HEARTBEAT_INTERVAL, self._beat)

    def _broadcast(self, chunk: bytes) -> None:
        for stream in self._streams:
            stream.put(chunk)


def _encode_event(name: str, data: object, cursor: Cursor | None = None) -> bytes:
    identified = f"id: {cursor}\n" if cursor else ""
    return b"%bevent: %b\ndata: %b\n\n" % (identified.encode(), name.encode(), _encode(data))


def _encode_change(change: Change) -> bytes:
    return _encode_event("change", change, Cursor.parse(change.position))
