"""Who may call what: every route with every kind of key, and in which order it is looked at."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from itertools import chain
from typing import Any
from uuid import uuid4

import httpx
import pytest
from litestar import Litestar, Router, asgi, get
from litestar.handlers import ASGIRouteHandler, HTTPRouteHandler
from litestar.routes import HTTPRoute
from litestar.types import Receive, Send
from litestar.types import Scope as LitestarScope
from user_service_schemas import Scope
from user_service_server import app as app_module
from user_service_server.app import create_app
from user_service_server.http.answers import HTTPRequest
from user_service_server.http.callers import open_routes
from user_service_server.http.operations import operation
from user_service_server.settings import Settings

from ..engines import settings_for
from ..keys import EVERYTHING, REQUIRED, change_key, make_key, showing
from .test_users import assert_failed

NOBODY = str(uuid4())
SCOPES = {
    "create_user": "users:write",
    "get_user": "users:read",
    "list_users": "users:list",
    "lookup_users": "users:read",
    "batch_users": "users:read",
    "update_user": "users:write",
    "delete_user": "users:write",
    "set_password": "credentials:write",
    "get_preferences": "users:read",
    "update_preferences": "preferences:write",
    "list_preference_history": "users:read",
    "list_devices": "users:read",
    "register_device": "devices:write",
    "update_device": "devices:write",
    "delete_device": "devices:write",
    "resolve_deliveries": "users:read",
    "report_feedback": "feedback:write",
    "restore_address": "users:write",
    "verify_credentials": "credentials:verify",
    "list_changes": "changes:read",
    "stream_changes": "changes:read",
}
"""Section 3 of the contract, once more: a route is not to be let in by the scope it was given."""

Route = tuple[str, str, str]


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    return settings_for(database_url, redis_url, **REQUIRED)


@pytest.fixture(scope="module")
async def keys(settings: Settings) -> dict[str, str]:
    """A key for each scope alone, and one for all but it (`-scope`)."""
    made = {scope: await make_key(settings, f"only-{scope.name}", scope) for scope in Scope}
    for scope in Scope:
        others = [other for other in Scope if other != scope]
        made[f"-{scope}"] = await make_key(settings, f"not-{scope.name}", *others)  # type: ignore[index]
    return {str(name): key for name, key in made.items()}


@pytest.fixture(scope="module")
async def bad_keys(settings: Settings) -> dict[str, str | None]:
    """What is shown in `Authorization` by those who are nobody."""
    expired, revoked, good = [
        await make_key(settings, name, *EVERYTHING) for name in ("expired", "revoked", "good")
    ]
    await change_key(settings, expired, "expires_at = now()")
    await change_key(settings, revoked, "revoked_at = now()")
    return {
        "none": None,
        "empty": "Bearer ",
        "scheme": f"Basic {good}",
        "malformed": "Bearer usk_not-a-key",
        "cut": f"Bearer {good[:-1]}",
        "capitals": f"Bearer {good.upper()}",
        "two": f"Bearer {good} {good}",
        "expired": f"Bearer {expired}",
        "revoked": f"Bearer {revoked}",
        "foreign": f"Bearer usk_{'0' * 12}_{'0' * 64}",
        "another's secret": f"Bearer {good[:16]}_{'0' * 64}",
    }


def routes_of(app: Litestar) -> list[Route]:
    """Return the operation, method and path of every route under /api."""
    found: list[Route] = []
    for route in app.routes:
        if isinstance(route, HTTPRoute) and route.path.startswith("/api/"):
            for handler in route.route_handlers:
                for method in sorted(handler.http_methods - {"OPTIONS"}):
                    path = route.path_format
                    for name in ("user_id", "device_id"):
                        path = path.replace(f"{{{name}:str}}", NOBODY)
                        path = path.replace(f"{{{name}}}", NOBODY)
                    found.append((handler.opt["operation"].id, str(method), path))
    assert len(found) > 20
    return found


async def call(
    http: httpx.AsyncClient, route: Route, authorization: str | None, body: str = "{"
) -> httpx.Response:
    """Call a route, with a body that cannot be read."""
    _, method, path = route
    headers = {"Content-Type": "application/json"}
    if authorization is not None:
        headers["Authorization"] = authorization
    # The stream would not end by itself: a cursor that is none ends it before it begins.
    if path.endswith("/stream"):
        headers["Last-Event-ID"] = "none"
    content = None if method == "GET" else body
    return await http.request(method, path, headers=headers, content=content)


async def test_nobody_is_let_in_anywhere(
    app: Litestar, http: httpx.AsyncClient, bad_keys: dict[str, str | None]
) -> None:
    for route in routes_of(app):
        for kind, authorization in bad_keys.items():
            answer = await call(http, route, authorization)
            assert answer.status_code == 401, (route, kind, answer.text)
            assert_failed(answer, 401, "unauthenticated")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            shown = (authorization or "").removeprefix("Bearer").strip()
            assert not shown or shown not in answer.text


async def test_every_route_lets_its_scope_in_and_no_other(
    app: Litestar, http: httpx.AsyncClient, keys: dict[str, str]
) -> None:
    """A user that is not there, a body that is none: with the right scope that is what is told."""
    for route in routes_of(app):
        right = SCOPES[route[0]]
        for scope in Scope:
            answer = await call(http, route, f"Bearer {keys[scope]}")
            if scope == right:
                assert answer.status_code in {200, 400, 404}, (route, scope, answer.text)
            else:
                assert_failed(answer, 403, "forbidden")
        assert_failed(await call(http, route, f"Bearer {keys[f'-{right}']}"), 403, "forbidden")


async def test_options_and_unknown_paths_tell_nothing_that_is_not_documented(
    app: Litestar, http: httpx.AsyncClient
) -> None:
    for route in routes_of(app):
        answer = await http.options(route[2])
        assert answer.status_code == 204, answer.text
        assert "OPTIONS" in answer.headers["allow"]
        answer = await http.request("TRACE", route[2])
        assert_failed(answer, 405, "method_not_allowed")
    assert_failed(await http.get("/api/v1/nothing"), 404, "route_not_found")
    for path in ("/health", "/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json"):
        assert (await http.get(path)).status_code == 200


async def test_head_needs_what_get_needs(http: httpx.AsyncClient, keys: dict[str, str]) -> None:
    path = "/api/v1/users"
    assert (await http.head(path)).status_code == 401
    assert (await http.head(path, headers=showing(keys["users:read"]))).status_code == 403
    assert (await http.head(path, headers=showing(keys["users:list"]))).status_code == 200


async def test_who_may_not_call_cannot_tell_who_exists(
    http: httpx.AsyncClient, keys: dict[str, str]
) -> None:
    body = {"name": "Known", "email": "known@example.com", "password": "StrongPass123!"}
    created = await http.post("/api/v1/users/", json=body, headers=showing(keys["users:write"]))
    assert created.status_code == 201, created.text
    paths = [f"/api/v1/users/{user}" for user in (created.json()["data"]["id"], NOBODY)]
    for headers in ({}, showing(keys["users:list"])):
        known, unknown = [await http.get(path, headers=headers) for path in paths]
        assert known.status_code == unknown.status_code
        assert {**known.json(), "error": None} == {**unknown.json(), "error": None}
        assert known.json()["error"]["code"] == unknown.json()["error"]["code"]


async def test_the_scheme_is_not_case_sensitive(
    http: httpx.AsyncClient, keys: dict[str, str]
) -> None:
    headers = {"Authorization": f"bEARER  {keys['users:list']} "}
    assert (await http.get("/api/v1/users", headers=headers)).status_code == 200


async def test_refusals_are_problems_for_those_who_read_problems(
    http: httpx.AsyncClient, keys: dict[str, str]
) -> None:
    accept = {"Accept": "application/problem+json"}
    for headers, status in ((accept, 401), ({**accept, **showing(keys["users:list"])}, 403)):
        answer = await http.get(f"/api/v1/users/{NOBODY}", headers=headers)
        assert answer.status_code == status
        assert answer.headers["Content-Type"].startswith("application/problem+json")
        assert answer.json()["status"] == status


async def test_what_a_key_does_is_noted_under_its_name(
    http: httpx.AsyncClient, settings: Settings
) -> None:
    key = await make_key(settings, "registration", *EVERYTHING)
    http_headers = showing(key)
    body: dict[str, Any] = {"name": "A", "email": "noted@example.com", "password": "StrongPass123!"}
    repeated = {**http_headers, "Idempotency-Key": "once"}
    created = await http.post("/api/v1/users/", json=body, headers=repeated)
    user = created.json()["data"]["id"]
    path = f"/api/v1/users/{user}/preferences"
    await http.patch(path, json={"push": False}, headers=http_headers)
    history = await http.get(f"{path}/history", headers=http_headers)
    assert {item["actor"] for item in history.json()["data"]["items"]} == {"registration"}
    changes: list[dict[str, Any]] = []
    while len(changes) < 2:
        page = await http.get("/api/v1/changes", headers=http_headers, params={"limit": "1000"})
        changes = [item for item in page.json()["data"]["items"] if item["user_id"] == user]
    assert {change["actor"] for change in changes} == {"registration"}

    # Another service's Idempotency-Keys are others, another key of the same service's are not.
    twin = await make_key(settings, "registration", *EVERYTHING)
    replayed = await http.post("/api/v1/users/", json=body, headers={**repeated, **showing(twin)})
    assert replayed.headers["Idempotency-Replayed"] == "true"
    other = await make_key(settings, "other", *EVERYTHING)
    taken = await http.post("/api/v1/users/", json=body, headers={**repeated, **showing(other)})
    assert_failed(taken, 409, "email_taken", "email")


def test_the_documentation_names_every_scope(settings: Settings) -> None:
    from user_service_server.http.openapi import openapi_document  # noqa: PLC0415

    document = openapi_document(create_app(settings), "0")
    described = {
        one["operationId"].removesuffix("_by_put"): one["security"]
        for one in chain.from_iterable(path.values() for path in document["paths"].values())
        if "security" in one
    }
    assert described == {name: [{"serviceKey": [SCOPES[name]]}] for name in described}
    assert json.dumps(document["components"]["securitySchemes"]).count("bearer") == 1


@get("/forgotten", **operation("forgotten", "Has no scope", None))
async def forgotten() -> None: ...


@get("/undescribed")
async def undescribed() -> None: ...


async def _admit(_request: HTTPRequest) -> None: ...


async def _let_through(_request: HTTPRequest) -> None: ...


def _open(handler: HTTPRouteHandler | ASGIRouteHandler) -> Iterator[str]:
    api = Router("/api/v1", route_handlers=[handler], before_request=_admit)
    return open_routes(Litestar([api], openapi_config=None), _admit)


def test_no_route_can_take_the_place_of_what_admits() -> None:
    described = operation("described", "Has a scope", None, scope=Scope.USERS_READ)

    async def answer() -> None: ...

    assert list(_open(get("/described", **described)(answer))) == []
    for other in (
        get("/described", before_request=_let_through, **described)(answer),
        get("/described", cache=60, **described)(answer),
    ):
        assert list(_open(other)) == ["['GET'] /api/v1/described"]

    async def below_http(scope: LitestarScope, receive: Receive, send: Send) -> None: ...

    assert list(_open(asgi("/below", copy_scope=True, **described)(below_http))) == [
        "/api/v1/below"
    ]


async def test_the_app_does_not_start_with_a_route_that_has_no_scope(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for handler in (forgotten, undescribed):
        assert len(list(_open(handler))) == 1
        with monkeypatch.context() as patched:
            patched.setattr(
                app_module,
                "deliveries_router",
                lambda _, handler=handler: Router("/deliveries", route_handlers=[handler]),
            )
            with pytest.raises(RuntimeError, match=r"nobody is asked for a key .*GET.*/api/v1"):
                create_app(settings)


@pytest.fixture(scope="module")
async def app(settings: Settings) -> AsyncIterator[Litestar]:
    app = create_app(settings)
    async with app.lifespan():
        yield app
