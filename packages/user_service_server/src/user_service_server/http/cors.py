"""Which origins' scripts may call, by the Fetch standard's CORS protocol: none that is not named.

Ours, since Litestar's answers a refused preflight in plain text, takes `Vary: Accept` away, and
tells every origin what the named ones may do.
"""

from __future__ import annotations

from collections.abc import Collection

from litestar.enums import HttpMethod, ScopeType
from litestar.types import ASGIApp, HTTPResponseStartEvent, Message, Receive, Scope, Send

_METHODS = b"GET, POST, PUT, PATCH, DELETE"
_MAY_SEND = (
    b"Accept, Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, Last-Event-ID,"
    b" X-Min-Version, X-Request-ID"
)
_MAY_READ = (
    b"ETag, Idempotency-Replayed, Location, RateLimit, RateLimit-Policy, Retry-After,"
    b" WWW-Authenticate, X-Document-Tag, X-Request-ID"
)
_REMEMBERED_FOR = b"600"
_VARY = (b"vary", b"Origin")


class CrossOrigin:
    """Wraps the app where origins are named. Cookies are no part of it: there are none."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origin.encode() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight, or tell beside the app's answer that its origin may read it."""
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        allowed = origin if origin in self._origins else None
        if (
            allowed is not None
            and scope["type"] == ScopeType.HTTP
            and scope["method"] == HttpMethod.OPTIONS
            and b"access-control-request-method" in headers
        ):
            start: HTTPResponseStartEvent = {
                "type": "http.response.start",
                "status": 204,
                "headers": [
                    (b"access-control-allow-origin", allowed),
                    (b"access-control-allow-methods", _METHODS),
                    (b"access-control-allow-headers", _MAY_SEND),
                    (b"access-control-max-age", _REMEMBERED_FOR),
                    _VARY,
                ],
            }
            await send(start)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return

        async def send_with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = [*message["headers"], _VARY]  # also where it is not: a cache is to ask anew
                if allowed is not None:
                    told += [
                        (b"access-control-allow-origin", allowed),
                        (b"access-control-expose-headers", _MAY_READ),
                    ]
                message["headers"] = told
            await send(message)

        await self._app(scope, receive, send_with_origin)
