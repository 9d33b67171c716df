"""Who calls: the one guard before all routes, which no route can forget.

It knows the caller by its service key, looks whether that has the scope of the route, and counts
the request against the caller's limit; only then is the body read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeAlias, cast

from litestar import Litestar
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.routes import HTTPRoute
from litestar.types import HTTPScope

from ..errors import Forbidden, Unauthenticated
from ..keys.ring import Caller, KeyRing
from ..settings import Settings
from .answers import HTTPRequest
from .limits import RateLimits
from .operations import Operation
from .requests import header

Connection: TypeAlias = ASGIConnection[Any, Any, Any, Any]
Guard: TypeAlias = Callable[[Connection, BaseRouteHandler], Awaitable[None]]

_STATE = "caller"


def caller_of(request: HTTPRequest) -> Caller:
    """Return who makes a request that the guard has let through."""
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


def make_guard(gate: Gate) -> Guard:
    """Return the guard of Litestar's routes; a function, since Litestar copies what else it is."""

    async def guard(connection: Connection, handler: BaseRouteHandler) -> None:
        operation: Operation | None = handler.opt.get("operation")
        # Without one it is OPTIONS, which Litestar answers: the app starts with no other such route
        if operation is not None:
            await gate.admit(cast("HTTPScope", connection.scope), operation)

    return guard


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


def routes_without_scope(app: Litestar) -> Iterator[str]:
    """Yield the routes under /api that nobody has said a scope of: there must be none."""
    for route in app.routes:
        if isinstance(route, HTTPRoute) and route.path.startswith("/api/"):
            for handler in route.route_handlers:
                operation = handler.opt.get("operation")
                # Litestar answers OPTIONS by itself, with the methods that there are.
                if set(handler.http_methods) - {"OPTIONS"} and (
                    operation is None or operation.scope is None
                ):
                    yield f"{sorted(handler.http_methods)} {route.path}"
