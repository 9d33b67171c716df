"""The live stream of changes: what it tells the cache, and how it is reached again.

States and their order are those of LaunchDarkly's data sources; the wire format is that of
Server-Sent Events (WHATWG's HTML standard, section 9.2).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import msgspec
from user_service_schemas import Change, Heartbeat, Reset

from user_service_client._cache import DocumentCache
from user_service_client._calls import Call, Calls
from user_service_client._clock import Clock
from user_service_client._coverage import Lateness
from user_service_client._loops import Home
from user_service_client.errors import (
    BadRequest,
    DecodeError,
    Forbidden,
    NotFound,
    Unauthenticated,
    UserServiceError,
)
from user_service_client.hooks import Hooks, StreamEvent, StreamState, tell

PATIENCE = 5.0
"""Seconds that the service may take to begin a stream."""
SILENCE = 45.0
"""Seconds without anything, three heartbeats, after which a connection is taken for dead."""
FIRST_DELAY = 1.0
MAX_DELAY = 30.0
MAX_EVENT = 64 * 1024
"""Bytes of one event; one of ours has 300."""

_decode_change = msgspec.json.Decoder(Change).decode
_decode_heartbeat = msgspec.json.Decoder(Heartbeat).decode
_decode_reset = msgspec.json.Decoder(Reset).decode
_log = logging.getLogger("user_service_client")


class Event(NamedTuple):
    """An event of a stream; `id` is empty where it has none."""

    name: str
    data: bytes
    id: str


async def read_events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[Event]:
    """Yield the events of a stream, as far as a service sends them: comments are passed over.

    Raises:
        DecodeError: an event has no end.
    """
    rest = b""
    async for chunk in chunks:
        *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for lines in events:
            name, data, id_ = "message", [], ""
            for line in lines.split(b"\n"):
                field, _, value = line.partition(b":")
                value = value.removeprefix(b" ")
                if field == b"event":
                    name = value.decode(errors="replace")
                elif field == b"data":
                    data.append(value)
                elif field == b"id":
                    id_ = value.decode(errors="replace")
            if data:
                yield Event(name, b"\n".join(data), id_)
        if len(rest) > MAX_EVENT:
            raise DecodeError("changes.stream: an event has no end")


@dataclass(frozen=True, slots=True)
class ClientStatus:
    """Whether a client hears of changes.

    Attributes:
        stream: The state of the stream.
        since: When it came to that state.
        is_complete: Whether all changes were heard of until less than 30 s ago: then copies are
            used until a change of them is heard of, and else for `fresh_for` seconds only.
    """

    stream: StreamState
    since: datetime
    is_complete: bool


class LiveUpdates:
    """Follows the stream in the background, for as long as the client lives."""

    def __init__(
        self, calls: Calls, cache: DocumentCache, home: Home, clock: Clock, hooks: Hooks
    ) -> None:
        self._calls = calls
        self._cache = cache
        self._clock = clock
        self._hook = hooks.stream
        self._cursor = ""
        self._lateness = Lateness()
        self._task: asyncio.Task[None] | None = None
        self._pid = 0
        self._state = StreamState.OFF
        self._since = clock.now()
        home.on_move(self._let_go)
        home.on_arrival(self._start)

    @property
    def status(self) -> ClientStatus:
        """Whether it hears of changes, and since when."""
        is_complete = self._state is StreamState.LIVE and self._cache.coverage.is_complete
        return ClientStatus(self._state, self._since, is_complete)

    @property
    def is_following(self) -> bool:
        """Whether a task follows the stream, or tries to."""
        return self._task is not None and not self._task.done()

    def _start(self) -> None:
        self._come_to(StreamState.INITIALIZING, "start")
        self._pid = os.getpid()
        self._task = asyncio.create_task(self._run(), name="user-service-stream")

    async def _run(self) -> None:
        delay = FIRST_DELAY
        is_refused = False
        while self._task is asyncio.current_task():
            heard = False
            reason = "ended"
            self._lateness = Lateness()  # the next connection may lead to another machine
            try:
                async with aclosing(self._events()) as events:
                    async for event in events:
                        if not heard:
                            heard, delay, is_refused = True, FIRST_DELAY, False
                        self._take(event)
            except BadRequest as error:
                # A cursor that this service cannot read: what came since is not known.
                self._reset("", error.code or "bad_request")
                reason = "bad_request"
            except (Forbidden, NotFound, Unauthenticated) as error:
                if not is_refused:  # it goes on trying: a key may get the scope
                    _log.warning("the stream of changes is refused: %s", error)
                is_refused, reason = True, type(error).__name__
            except (UserServiceError, msgspec.MsgspecError, TimeoutError) as error:
                reason = type(error).__name__
            except Exception:  # noqa: BLE001 - nobody else would ever follow the stream again
                _log.exception("the stream of changes has failed")
                reason = "failure"
            self._cache.coverage.interrupted()
            if self._state is StreamState.LIVE:
                self._come_to(StreamState.INTERRUPTED, reason)
            await self._clock.pause(delay * random.uniform(0.5, 1))  # noqa: S311 - no secret
            delay = min(MAX_DELAY, delay * 2)

    async def _events(self) -> AsyncGenerator[Event]:
        headers = {"Accept": "text/event-stream"}
        if self._cursor:
            headers["Last-Event-ID"] = self._cursor
        call = Call("changes.stream", "GET", "/api/v1/changes/stream", headers=headers)
        async with AsyncExitStack() as stack:
            beginning = stack.enter_async_context(self._calls.stream(call))
            response = await self._clock.wait_for(beginning, PATIENCE)
            chunks = aclosing(self._unless_silent(response.aiter_bytes()))
            events = aclosing(read_events(await stack.enter_async_context(chunks)))
            async for event in await stack.enter_async_context(events):
                yield event

    async def _unless_silent(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        with suppress(StopAsyncIteration):
            while True:
                yield await self._clock.wait_for(anext(chunks), SILENCE)

    def _take(self, event: Event) -> None:
        if event.name == "change":
            self._take_change(event)
        elif event.name in {"heartbeat", "ready"}:
            heartbeat = _decode_heartbeat(event.data)
            if event.name == "ready":
                self._hear_of_epoch(event.id)
                self._cache.coverage.began()
            late = self._lateness.of(heartbeat.now, heard=self._clock.monotonic())
            lag = (heartbeat.now - heartbeat.through).total_seconds()
            self._cache.coverage.complete(lag + late)
        elif event.name == "reset":
            self._hear_of_epoch(event.id)
            self._reset(event.id, _decode_reset(event.data).reason)
        if event.id:
            self._cursor = event.id
        if self._state is not StreamState.LIVE:
            self._come_to(StreamState.LIVE, event.name)

    def _take_change(self, event: Event) -> None:
        try:
            change = _decode_change(event.data)
        except msgspec.MsgspecError:
            # Of a newer service: whom it is about is not known, and asking again tells no more.
            self._reset(event.id, "unreadable")
            return
        epoch, _, _ = change.position.partition(".")
        self._cache.heard_of(change.user_id, change.version, epoch)

    def _hear_of_epoch(self, cursor: str) -> None:
        epoch, dot, _ = cursor.partition(".")
        if dot:
            self._cache.epoch_is(epoch)

    def _reset(self, cursor: str, reason: str) -> None:
        self._cursor = cursor
        self._cache.reset()
        tell(self._hook, lambda: StreamEvent(self._state, f"reset: {reason}"))

    def _come_to(self, state: StreamState, reason: str) -> None:
        self._state, self._since = state, self._clock.now()
        tell(self._hook, lambda: StreamEvent(state, reason))

    def _let_go(self) -> None:
        """Forget the task of another event loop; the next goes on from the cursor."""
        task, self._task = self._task, None
        self._cache.coverage.interrupted()
        # A loop that stands still may go on one day; of a fork's parent, it is the parent's.
        if task is not None and self._pid == os.getpid() and not task.get_loop().is_closed():
            task.get_loop().call_soon_threadsafe(task.cancel)

    def abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop following, from wherever the client was forgotten."""
        if self._task is not None:
            loop.call_soon_threadsafe(self._task.cancel)

    async def aclose(self) -> None:
        """Stop following."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._cache.coverage.interrupted()
        if self._state is not StreamState.OFF:
            self._come_to(StreamState.OFF, "closed")
