"""Which origins' scripts may call, by the Fetch standard's CORS protocol: none that is not named.

Ours, since Litestar's answers a refused preflight in plain text, takes `Vary: Accept` away, and
tells every origin what the named ones may do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from litestar.enums import HttpMethod, ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from .answers import RawHeader, ReadyAnswer

_METHODS = b"GET, POST, PUT, PATCH, DELETE"
_MAY_SEND = (
    b"Accept, Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, Last-Event-ID,"
    b" X-Min-Version, X-Request-ID"
)
_MAY_READ = (
    b"ETag, Idempotency-Replayed, Location, RateLimit, RateLimit-Policy, Retry-After,"
    b" WWW-Authenticate, X-Document-Tag, X-Request-ID"
)
_PREFLIGHT = [
    (b"access-control-allow-methods", _METHODS),
    (b"access-control-allow-headers", _MAY_SEND),
    (b"access-control-max-age", b"600"),
]
_VARY = (b"vary", b"Origin")


class CrossOrigin:
    """Answers preflights where origins are named. Cookies are no part of it: there are none.

    Which origin is allowed is among what it has `told` beside each answer: it is for the
    observation to send that, with preflights as well.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origin.encode() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight of a named origin; leave all else to the app."""
        headers = scope["state"]["headers"]
        if (
            headers.get(b"origin") in self._origins
            and scope["type"] == ScopeType.HTTP
            and scope["method"] == HttpMethod.OPTIONS
            and b"access-control-request-method" in headers
        ):
            await ReadyAnswer(204, _PREFLIGHT, b"")(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def told(self, headers: Mapping[bytes, bytes]) -> Iterator[RawHeader]:
        """Yield what every answer has besides: whether its request's origin may read it."""
        yield _VARY  # also where it may not: a cache is to ask anew
        origin = headers.get(b"origin")
        if origin in self._origins:
            yield (b"access-control-allow-origin", origin)
            yield (b"access-control-expose-headers", _MAY_READ)
