"""Who calls: the one guard before all routes, which no route can forget.

It knows the caller by its service key, looks whether that has the scope of the route, and counts
the request against the caller's limit; only then is the body read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

from litestar import Litestar
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.routes import HTTPRoute

from ..errors import Forbidden, Unauthenticated
from ..keys.ring import Caller, KeyRing
from ..settings import Settings
from .answers import HTTPRequest
from .limits import RateLimits
from .operations import Operation

Connection: TypeAlias = ASGIConnection[Any, Any, Any, Any]
Guard: TypeAlias = Callable[[Connection, BaseRouteHandler], Awaitable[None]]

_STATE = "caller"


def caller_of(request: HTTPRequest) -> Caller:
    """Return who makes a request that the guard has let through."""
    caller: Caller = request.scope["state"][_STATE]
    return caller


def make_guard(settings: Settings, ring: KeyRing, limits: RateLimits) -> Guard:
    """Return the guard of all routes under /api."""
    is_open = settings.auth == "off"

    async def guard(connection: Connection, handler: BaseRouteHandler) -> None:
        operation: Operation | None = handler.opt.get("operation")
        if operation is None:
            return  # OPTIONS, which Litestar answers: the app starts with no other such route
        if is_open:
            caller = ring.anybody
        else:
            caller = await ring.recognise(
                _key_of(connection), partial(_address_of, connection, settings.proxy_hops)
            )
        if operation.scope not in caller.scopes:
            raise Forbidden
        connection.scope["state"][_STATE] = caller
        connection.scope["state"]["ratelimit"] = await limits.take(caller.name, operation.traffic)

    return guard


def _key_of(connection: Connection) -> str:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        raise Unauthenticated
    return key.strip()


def _address_of(connection: Connection, proxy_hops: int) -> str:
    """Return from where a request comes, past so many proxies of our own.

    Each of them appends who called it: what stands further left anybody may have written.
    """
    host = connection.client.host if connection.client else ""
    if not proxy_hops:
        return host
    told = ",".join(connection.headers.getall("x-forwarded-for", [])).split(",")
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
