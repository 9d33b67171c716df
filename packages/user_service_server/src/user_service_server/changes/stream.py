"""One stream of the change feed: Server-Sent Events to one reader."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

from litestar.types import (
    HTTPResponseBodyEvent,
    HTTPResponseStartEvent,
    Receive,
    Scope,
    Send,
)
from user_service_schemas import Reset

from ..errors import ServiceError
from ..keys.ring import WATCHED_EVERY
from ..metrics import Metrics
from .feed import INTERVAL, ChangeFeed, Cursor, Subscription, encode_changes, encode_event

SEND_TIMEOUT = 10.0
"""Seconds that a reader may take to take what was sent."""
RETRY_MS = 1000
"""After how long a reader is asked to come back; browsers and the client add their own jitter."""
PAGE = 1000
_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    # Buffering proxies would hold events back.
    (b"x-accel-buffering", b"no"),
]


class ChangeStream:
    """An ASGI answer that follows the feed from a cursor, or from now on.

    Ends after about `max_life` seconds, so that replicas share the streams again; when the service
    is shut down; when the key was revoked; and when the reader is too slow. It continues with
    `Last-Event-ID`.
    """

    def __init__(
        self,
        feed: ChangeFeed,
        cursor: Cursor | None,
        *,
        max_life: float,
        draining: asyncio.Event,
        metrics: Metrics,
        is_allowed: Callable[[], Awaitable[bool]] | None,
    ) -> None:
        self._is_allowed = is_allowed
        self._feed = feed
        self._cursor = cursor
        self._reason: str | None = None
        self._life = max_life * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
        self._draining = draining
        self._ended = metrics.streams_ended

    async def open(self) -> None:
        """See whether the reader can go on from its cursor.

        Raises:
            DependencyUnavailable, Overloaded: nobody can tell now.
        """
        self._reason = await self._feed.why_not(self._cursor) if self._cursor else None

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until something ends it."""
        await send(HTTPResponseStartEvent(type="http.response.start", status=200, headers=_HEADERS))
        gone = asyncio.create_task(_disconnected(receive))
        following = asyncio.create_task(self._follow(send))
        tasks: set[asyncio.Task[Any]] = {gone, following}
        if self._is_allowed is not None:
            tasks.add(asyncio.create_task(_until_refused(self._is_allowed)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if gone in done:
            reason = "client"
        else:
            if following in done:
                reason = following.result()
            else:
                reason = "revoked"
                await asyncio.wait({following})  # two at once would write into each other
            with contextlib.suppress(_TooSlow):
                await _send(send, b"", more=False)
        self._ended.labels(reason).inc()

    async def _follow(self, send: Send) -> str:
        """Send what there is, and then what comes; returns why it ended."""
        ends_at = asyncio.get_running_loop().time() + self._life
        try:
            subscription = await self._begin(send)
            try:
                return await self._pass_on(subscription, send, ends_at)
            finally:
                self._feed.unsubscribe(subscription)
        except _TooSlow:
            return "too_slow"
        except ServiceError:
            return "interrupted"  # no Postgres, or another epoch: the reader comes back and is told

    async def _pass_on(self, subscription: Subscription, send: Send, ends_at: float) -> str:
        while not self._draining.is_set():
            chunk = await subscription.take()  # a heartbeat at the latest
            if subscription.too_slow:
                return "too_slow"
            await _send(send, chunk)
            if asyncio.get_running_loop().time() >= ends_at:
                return "age"
        return "shutdown"

    async def _begin(self, send: Send) -> Subscription:
        """Send what the reader has missed, until this process has the rest in memory."""
        feed, cursor = self._feed, self._cursor
        if cursor is None:
            cursor = feed.end
            first = encode_event("ready", feed.completeness(), cursor)
        elif self._reason:
            cursor = feed.end
            first = encode_event("reset", Reset(reason=self._reason), cursor)
        else:
            first = b""
        await _send(send, b"retry: %d\n\n" % RETRY_MS + first)
        while (subscription := feed.subscribe(cursor)) is None:
            page = await feed.read(cursor, PAGE)
            if page.items:
                cursor = Cursor.parse(page.next)
                await _send(send, b"".join(event.encoded for event in encode_changes(page.items)))
            else:
                # The reader comes from a process that is ahead of this one.
                await asyncio.sleep(INTERVAL)
        # Only now: `through` promises that all before it was sent.
        subscription.put(feed.heartbeat())
        return subscription


class _TooSlow(Exception):
    """The reader did not take in time what was sent to it."""


async def _send(send: Send, chunk: bytes, *, more: bool = True) -> None:
    try:
        async with asyncio.timeout(SEND_TIMEOUT):
            await send(HTTPResponseBodyEvent(type="http.response.body", body=chunk, more_body=more))
    except TimeoutError as error:
        raise _TooSlow from error


async def _until_refused(is_allowed: Callable[[], Awaitable[bool]]) -> None:
    while await is_allowed():  # noqa: ASYNC110 - no event tells: it is asked
        await asyncio.sleep(WATCHED_EVERY)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
