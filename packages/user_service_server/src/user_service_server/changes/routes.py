"""The HTTP of changes."""

from __future__ import annotations

import asyncio
from functools import partial

from litestar import Router, get
from litestar.params import FromQuery
from user_service_schemas import Change, Changes, ErrorCode, Scope

from ..http.answers import HTTPRequest, ReadyAnswer, answer
from ..http.callers import caller_of
from ..http.operations import operation
from ..http.requests import PageLimit, header
from ..keys.ring import KeyRing
from ..metrics import Metrics
from ..settings import Settings
from .feed import ChangeFeed, Cursor
from .stream import ChangeStream


def changes_router(
    feed: ChangeFeed,
    settings: Settings,
    draining: asyncio.Event,
    metrics: Metrics,
    ring: KeyRing,
) -> Router:
    """Return the routes of the change feed."""

    @get(
        "/",
        **operation(
            "list_changes",
            "List changes behind a cursor, or from the oldest that is kept",
            Changes,
            ErrorCode.INVALID_CURSOR,
            description="Nothing is skipped, and for one user nothing is out of order. Go on with"
            " `next`, also when there was nothing yet.",
            parameters=[
                {
                    "name": "after",
                    "in": "query",
                    "schema": {"type": "string"},
                    "description": "The `position` or `next` to go on from.",
                },
                {
                    "name": "limit",
                    "in": "query",
                    "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
                },
            ],
            scope=Scope.CHANGES_READ,
        ),
    )
    async def list_changes(
        after: FromQuery[str | None] = None, limit: PageLimit = 100
    ) -> ReadyAnswer:
        cursor = None if after is None else Cursor.parse(after)
        return answer(await feed.read(cursor, limit), "Changes listed")

    @get(
        "/stream",
        **operation(
            "stream_changes",
            "Follow changes as Server-Sent Events",
            Change,
            ErrorCode.INVALID_CURSOR,
            description="Events: `ready` (from now on), `change`, `heartbeat` (every 15 s; up to"
            " which time the feed is complete), `reset` (the cursor is of another epoch, or older"
            " than what is kept). Goes on from `Last-Event-ID`.",
            media_type="text/event-stream",
            parameters=[
                {
                    "name": "Last-Event-ID",
                    "in": "header",
                    "schema": {"type": "string"},
                    "description": "The id of the last event that was taken.",
                }
            ],
            scope=Scope.CHANGES_READ,
        ),
    )
    async def stream_changes(request: HTTPRequest) -> ChangeStream:
        last = header(request.scope, b"last-event-id")
        caller = caller_of(request)
        stream = ChangeStream(
            feed,
            Cursor.parse(last) if last else None,
            max_life=settings.stream_max_life,
            draining=draining,
            metrics=metrics,
            is_allowed=partial(ring.is_valid, caller) if caller.key is not None else None,
        )
        await stream.open()
        return stream

    return Router("/changes", route_handlers=[list_changes, stream_changes])
