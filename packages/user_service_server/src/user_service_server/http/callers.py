"""Who calls: what comes before all routes, and none can forget.

It knows the caller by its service key, looks whether that has the scope of the route, and counts
the request against the caller's limit; only then is the body read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TypeAlias

from litestar import Litestar
from litestar.routes import HTTPRoute
from litestar.types import HTTPScope

from ..errors import Forbidden, Unauthenticated
from ..keys.ring import Caller, KeyRing
from ..settings import Settings
from .answers import HTTPRequest
from .limits import RateLimits
from .operations import Operation
from .requests import header

Admission: TypeAlias = Callable[[HTTPRequest], Awaitable[None]]

_STATE = "caller"


def caller_of(request: HTTPRequest) -> Caller:
    """Return who makes a request that was admitted."""
    caller: Caller = request.scope["state"][_STATE]
    return caller


class Gate:
    """Lets requests through to the routes under /api."""

    def __init__(self, settings: Settings, ring: KeyRing, limits: RateLimits) -> None:
        self._is_open = settings.auth == "off"
        self._proxy_hops = settings.proxy_hops
        self._ring = ring
        self._limits = limits

    async def admit(self, scope: HTTPScope, operation: Operation) -> None:
        """Admit a request, and note who makes it.

        Raises:
            Unauthenticated, Forbidden, RateLimited
            DependencyUnavailable, Overloaded: nobody can tell whose key it shows.
        """
        if self._is_open:
            caller = self._ring.anybody
        else:
            key = _key_of(scope)
            caller = self._ring.known(key) or await self._ring.recognise(
                key, partial(_address_of, scope, self._proxy_hops)
            )
        if operation.scope not in caller.scopes:
            raise Forbidden
        name, traffic = caller.name, operation.traffic
        scope["state"][_STATE] = caller
        scope["state"]["ratelimit"] = self._limits.deal(name, traffic) or await self._limits.take(
            name, traffic
        )


def make_admission(gate: Gate) -> Admission:
    """Return what Litestar does before the routes, and before it reads a body.

    No guard of Litestar's: for each call of one it copies the route's handler, which takes 30 µs.
    """

    async def admit(request: HTTPRequest) -> None:
        operation: Operation | None = request.route_handler.opt.get("operation")
        # Without one it is OPTIONS, which Litestar answers: the app starts with no other such route
        if operation is not None:
            await gate.admit(request.scope, operation)

    return admit


def _key_of(scope: HTTPScope) -> str:
    scheme, _, key = (header(scope, b"authorization") or "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        raise Unauthenticated
    return key.strip()


def _address_of(scope: HTTPScope, proxy_hops: int) -> str:
    """Return from where a request comes, past so many proxies of our own.

    Each of them appends who called it: what stands further left anybody may have written.
    """
    client = scope["client"]
    host = client[0] if client else ""
    if not proxy_hops:
        return host
    values = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    told = b",".join(values).decode("latin-1").split(",")
    return told[-proxy_hops].strip() if len(told) >= proxy_hops else host


def open_routes(app: Litestar, admit: Admission) -> Iterator[str]:
    """Yield the routes under /api that Litestar answers without `admit`, or that have no scope."""
    for route in app.routes:
        if not route.path.startswith("/api/"):
            continue
        if not isinstance(route, HTTPRoute):  # ASGI's and WebSocket's have no such hook
            yield route.path
            continue
        for handler in route.route_handlers:
            operation = handler.opt.get("operation")
            is_guarded = (
                # A hook of the handler's, or of a router's below, takes this one's place.
                handler.resolve_before_request() is admit
                # What Litestar has cached it answers before.
                and not handler.cache
                and operation is not None
                and operation.scope is not None
            )
            # Litestar answers OPTIONS by itself, with the methods that there are.
            if not is_guarded and set(handler.http_methods) - {"OPTIONS"}:
                yield f"{sorted(handler.http_methods)} {route.path}"
