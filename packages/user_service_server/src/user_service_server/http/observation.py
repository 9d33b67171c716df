"""What surrounds every request: its id, its log line, its metrics, and the last safety net.

One middleware of ours, because Litestar's two for this cost 60 µs a request together, log bodies
(and so passwords), and label metrics with paths (and so with ids).
"""

from __future__ import annotations

import asyncio
import re
import time

from litestar.enums import HttpMethod, ScopeType
from litestar.types import (
    ASGIApp,
    HTTPReceiveMessage,
    HTTPScope,
    Message,
    Receive,
    Scope,
    Send,
    WebSocketReceiveMessage,
)
from uuid_utils import uuid7

from .. import logs
from ..errors import MalformedBody
from ..logs import RequestLog
from ..metrics import Metrics
from .failures import BodyTooSlow, meaning, send_failure
from .requests import header

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

# A caller can make up others without end, and each would be a series of its own.
_METHODS = frozenset(HttpMethod)
_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")


class Observation:
    """Wraps the whole app: also what no route was found for, and what crashed."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, log: RequestLog, body_timeout: float
    ) -> None:
        self._app = app
        self._log = log
        self._body_timeout = body_timeout
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == ScopeType.WEBSOCKET:
            raise NotImplementedError  # serving.py accepts HTTP only
        began = time.perf_counter()
        method = scope["method"]
        state = scope["state"]
        # Of a header that is there more than once the first counts.
        state["headers"] = dict(list(scope["headers"])[::-1])
        request_id = state["request_id"] = _request_id(scope)
        id_header = (b"x-request-id", request_id.encode())
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                quota = state.get("ratelimit")
                counted = quota.headers() if quota is not None else ()
                message["headers"] = [*message["headers"], id_header, _NO_SNIFFING, *counted]
            await send(message)

        token = logs.request_id.set(request_id)
        try:
            if method in _WITH_BODY:
                receive = _in_time(receive, self._body_timeout)
            await self._app(*_as_get(scope, receive, send_with_id))
        except Exception as error:  # noqa: BLE001 - the last net, below it is only the socket
            if status:
                meaning(error)  # it is logged; nobody can be told any more
            else:
                await send_failure(error, scope, receive, send_with_id)
        finally:
            self._note(scope, method, status, time.perf_counter() - began)
            logs.request_id.reset(token)

    def _note(self, scope: HTTPScope, method: str, status: int, seconds: float) -> None:
        route = str(scope.get("path_template", "unmatched"))
        if method not in _METHODS:
            method = "other"
        self._metrics.requests.note(method, route, status, seconds)
        self._log.note(
            request_id=scope["state"]["request_id"],
            method=method,
            route=route,
            status=status,
            ms=round(seconds * 1000, 2),
        )


def _request_id(scope: HTTPScope) -> str:
    """Return the caller's `X-Request-ID` if it is fit for a log, else a new one."""
    given = header(scope, b"x-request-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else str(uuid7())


def _in_time(receive: Receive, seconds: float) -> Receive:
    """Receive a body that is whole within `seconds` from when it is first asked for.

    Raises:
        BodyTooSlow: it is not. Byte by byte it could hold a connection, and memory, without end.
        MalformedBody: the caller went away in the middle of it.
    """
    loop = asyncio.get_running_loop()
    ends_at: float | None = None
    is_whole = False

    async def receive_in_time() -> HTTPReceiveMessage | WebSocketReceiveMessage:
        nonlocal ends_at, is_whole
        if is_whole:
            return await receive()  # what comes is that the caller has gone
        if ends_at is None:
            ends_at = loop.time() + seconds
        try:
            async with asyncio.timeout_at(ends_at):
                message = await receive()
        except TimeoutError:
            raise BodyTooSlow from None
        if message["type"] == "http.disconnect":
            # Nobody reads it, but what Litestar says of it would be logged as a crash of ours.
            raise MalformedBody(message="The connection ended before the body did.")
        is_whole = not message.get("more_body", False)
        return message

    return receive_in_time


def _as_get(scope: HTTPScope, receive: Receive, send: Send) -> tuple[HTTPScope, Receive, Send]:
    """Serve HEAD as GET without its body (RFC 9110, section 9.3.2)."""
    if scope["method"] != "HEAD":
        return scope, receive, send

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message["body"] = b""
        await send(message)

    scope["method"] = HttpMethod.GET
    return scope, receive, send_head
