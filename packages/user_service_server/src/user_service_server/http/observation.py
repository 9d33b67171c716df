"""What surrounds every request: its id, its log line, its metrics, and the last safety net.

One middleware of ours, because Litestar's two for this cost 60 µs a request together, log bodies
(and so passwords), and label metrics with paths (and so with ids).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping

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
from .answers import RawHeader
from .failures import BodyTooSlow, meaning, send_failure
from .limits import Quota
from .requests import header

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

# A caller can make up others without end, and each would be a series of its own.
_METHODS = frozenset(HttpMethod)
_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")


class Observation:
    """Wraps the router: observes also what no route was found for, and what crashed.

    `told` returns what every answer has besides, by the headers of its request.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        log: RequestLog,
        body_timeout: float,
        told: Callable[[Mapping[bytes, bytes]], Iterable[RawHeader]] | None,
    ) -> None:
        self.metrics = metrics
        self.log = log
        self.told = told
        self._app = app
        self._body_timeout = body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == ScopeType.WEBSOCKET:
            raise NotImplementedError  # serving.py accepts HTTP only
        observed = Observed(self, scope)
        try:
            if scope["method"] in _WITH_BODY:
                receive = _in_time(receive, self._body_timeout)
            await self._app(*_as_get(scope, receive, observed.telling(send)))
        except Exception as error:  # noqa: BLE001 - the last net
            await observed.fail(error, receive, send)
        finally:
            observed.end()


class Observed:
    """A request under way; `status` is that of its answer, and 0 before there is one."""

    __slots__ = ("_began", "_id", "_method", "_observation", "_scope", "_state", "_token", "status")

    def __init__(self, observation: Observation, scope: HTTPScope) -> None:
        self._began = time.perf_counter()
        self._observation = observation
        self._scope = scope
        self._method = scope["method"]
        self._state = state = scope["state"]
        # Of a header that is there more than once the first counts.
        state["headers"] = dict(list(scope["headers"])[::-1])
        self._id = state["request_id"] = _request_id(scope)
        self._token = logs.request_id.set(self._id)
        self.status = 0

    def headers(self) -> list[RawHeader]:
        """Return what the answer has besides its own headers."""
        headers = [(b"x-request-id", self._id.encode()), _NO_SNIFFING]
        quota: Quota | None = self._state.get("ratelimit")
        if quota is not None:
            headers += quota.headers()
        if self._observation.told is not None:
            headers += self._observation.told(self._state["headers"])
        return headers

    def telling(self, send: Send) -> Send:
        """Send an answer with these headers, and note its status."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                message["headers"] = [*message["headers"], *self.headers()]
            await send(message)

        return send_with_headers

    async def fail(self, error: Exception, receive: Receive, send: Send) -> None:
        """Answer with what an exception means, if there was no answer yet."""
        if self.status:
            meaning(error)  # it is logged; nobody can be told any more
            return
        try:
            await send_failure(error, self._scope, receive, self.telling(send))
        except Exception as unsent:  # noqa: BLE001 - below it is only the socket
            meaning(unsent)

    def end(self) -> None:
        """Log and count it."""
        seconds = time.perf_counter() - self._began
        route = self._scope.get("path_template", "unmatched")
        method = self._method if self._method in _METHODS else "other"
        self._observation.metrics.requests.note(method, route, self.status, seconds)
        self._observation.log.note(
            request_id=self._id,
            method=method,
            route=route,
            status=self.status,
            ms=round(seconds * 1000, 2),
        )
        logs.request_id.reset(self._token)


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
