"""Service keys and their scopes, refused by the fake as the server refuses them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import httpx
import pytest
from user_service_client import UserServiceClient
from user_service_client.errors import Forbidden, Unauthenticated
from user_service_client.testing import FakeUserService
from user_service_schemas import Scope
from user_service_server.app import create_app

from ..engines import settings_for
from ..keys import EVERYTHING, REQUIRED, make_key, showing
from .conftest import PATIENCE
from .people import NOBODY, PASSWORD, new_email

UNKNOWN = f"usk_{'0' * 12}_{'0' * 64}"
ROUTES = [
    ("POST", "/api/v1/users", Scope.USERS_WRITE),
    ("GET", "/api/v1/users", Scope.USERS_LIST),
    ("POST", "/api/v1/users/lookup", Scope.USERS_READ),
    ("POST", "/api/v1/users/batch", Scope.USERS_READ),
    ("GET", f"/api/v1/users/{NOBODY}", Scope.USERS_READ),
    ("HEAD", f"/api/v1/users/{NOBODY}", Scope.USERS_READ),
    ("PATCH", f"/api/v1/users/{NOBODY}", Scope.USERS_WRITE),
    ("PUT", f"/api/v1/users/{NOBODY}", Scope.USERS_WRITE),
    ("DELETE", f"/api/v1/users/{NOBODY}", Scope.USERS_WRITE),
    ("PUT", f"/api/v1/users/{NOBODY}/password", Scope.CREDENTIALS_WRITE),
    ("GET", f"/api/v1/users/{NOBODY}/preferences", Scope.USERS_READ),
    ("PATCH", f"/api/v1/users/{NOBODY}/preferences", Scope.PREFERENCES_WRITE),
    ("GET", f"/api/v1/users/{NOBODY}/preferences/history", Scope.USERS_READ),
    ("DELETE", f"/api/v1/users/{NOBODY}/suppression", Scope.USERS_WRITE),
    ("GET", f"/api/v1/users/{NOBODY}/devices", Scope.USERS_READ),
    ("POST", f"/api/v1/users/{NOBODY}/devices", Scope.DEVICES_WRITE),
    ("PATCH", f"/api/v1/users/{NOBODY}/devices/{NOBODY}", Scope.DEVICES_WRITE),
    ("DELETE", f"/api/v1/users/{NOBODY}/devices/{NOBODY}", Scope.DEVICES_WRITE),
    ("POST", "/api/v1/deliveries/resolve", Scope.USERS_READ),
    ("POST", "/api/v1/feedback", Scope.FEEDBACK_WRITE),
    ("POST", "/api/v1/credentials/verify", Scope.CREDENTIALS_VERIFY),
    ("GET", "/api/v1/changes", Scope.CHANGES_READ),
    ("GET", "/api/v1/changes/stream", Scope.CHANGES_READ),
]


@pytest.fixture(scope="module")
async def keys(database_url: str, redis_url: str) -> Mapping[str, str]:
    """A key for each scope alone, and one for all but it (`-scope`)."""
    settings = settings_for(database_url, redis_url)
    made = {str(scope): await make_key(settings, scope.name, scope) for scope in Scope}
    for scope in Scope:
        others = [other for other in Scope if other != scope]
        made[f"-{scope}"] = await make_key(settings, f"not-{scope.name}", *others)
    return made


@pytest.fixture(scope="module")
async def everything(database_url: str, redis_url: str) -> str:
    return await make_key(settings_for(database_url, redis_url), "everything", *EVERYTHING)


@pytest.fixture(scope="module", params=["fake", "server"])
async def transport(
    request: pytest.FixtureRequest,
    database_url: str,
    redis_url: str,
    keys: Mapping[str, str],
    everything: str,
) -> AsyncIterator[httpx.AsyncBaseTransport]:
    if request.param == "fake":
        scopes = {
            key: [s for s in Scope if (s == name if name[0] != "-" else f"-{s}" != name)]
            for name, key in keys.items()
        }
        yield FakeUserService(api_keys={**scopes, everything: EVERYTHING})
        return
    app = create_app(settings_for(database_url, redis_url, **REQUIRED))
    async with app.lifespan():
        yield httpx.ASGITransport(app)  # type: ignore[arg-type]  # Litestar's ASGI types are narrower


def assert_refused(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    if answer.request.method != "HEAD":
        assert answer.json()["error"]["code"] == code
    assert answer.headers.get("WWW-Authenticate") == ("Bearer" if status == 401 else None)


@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
async def test_a_route_lets_its_scope_in_and_nobody_else(
    raw: httpx.AsyncClient, keys: Mapping[str, str], method: str, path: str, scope: Scope
) -> None:
    # The stream would not end by itself: a cursor that is none ends it before it begins.
    others = {"Last-Event-ID": "none"} if path.endswith("/stream") else {}
    for headers in ({}, showing(UNKNOWN), {"Authorization": f"Basic {keys[scope]}"}):
        answer = await raw.request(method, path, headers={**others, **headers})
        assert_refused(answer, 401, "unauthenticated")
    answer = await raw.request(method, path, headers={**others, **showing(keys[f"-{scope}"])})
    assert_refused(answer, 403, "forbidden")
    answer = await raw.request(method, path, headers={**others, **showing(keys[scope])})
    assert answer.status_code not in {401, 403}, answer.text


async def test_what_needs_no_key_is_answered_without_one(raw: httpx.AsyncClient) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        assert (await raw.get(path)).status_code == 200
    assert (await raw.get("/api/v1/nothing")).status_code == 404
    assert (await raw.request("TRACE", "/api/v1/users")).status_code == 405


async def test_the_client_tells_what_its_key_lacks(
    transport: httpx.AsyncBaseTransport, keys: Mapping[str, str], everything: str
) -> None:
    for key, error in ((UNKNOWN, Unauthenticated), (keys["users:list"], Forbidden)):
        async with UserServiceClient(
            "http://test", api_key=key, transport=transport, timeout=PATIENCE
        ) as client:
            with pytest.raises(error):
                await client.users.get(NOBODY)
    async with UserServiceClient(
        "http://test", api_key=everything, transport=transport, timeout=PATIENCE
    ) as client:
        user = await client.users.create(name="K", email=new_email(), password=PASSWORD)
        assert await client.users.get(user.id) == user


async def test_wrong_credentials_are_told_with_a_challenge(
    raw: httpx.AsyncClient, everything: str
) -> None:
    """RFC 9110, section 15.5.2: every 401 has one."""
    body = {"email": "nobody@example.com", "password": "Wrong-Password-1"}
    answer = await raw.post("/api/v1/credentials/verify", json=body, headers=showing(everything))
    assert_refused(answer, 401, "invalid_credentials")


async def test_the_repeats_of_one_caller_are_not_those_of_another(
    raw: httpx.AsyncClient, keys: Mapping[str, str], everything: str
) -> None:
    body = {"name": "R", "email": "repeats.of.callers@example.com", "password": "StrongPass123!"}
    once = {"Idempotency-Key": "the same"}
    for key, status in ((everything, 201), (everything, 201), (keys["users:write"], 409)):
        answer = await raw.post("/api/v1/users", json=body, headers={**once, **showing(key)})
        assert answer.status_code == status, answer.text
