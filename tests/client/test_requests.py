"""What the client's methods put on the wire, and what they return."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
import pytest
import respx
from user_service_client import (
    ApiKey,
    CategoryUpdate,
    Consent,
    DecodeError,
    PreferencesUpdate,
    ServerError,
    UserServiceClient,
)

from tests.client.conftest import ETAG, USER, USER_ID, Service, envelope

DEVICE = {
    "id": "d-1",
    "token": "tok",
    "platform": "ios",
    "app": None,
    "active": True,
    "registered_at": "2026-01-01T00:00:00Z",
    "last_seen_at": "2026-01-01T00:00:00Z",
    "inactive_reason": None,
}
Make = Callable[[UserServiceClient], Awaitable[object]]
U = f"/api/v1/users/{USER_ID}"


@pytest.mark.parametrize(
    ("make", "data", "sent", "body"),
    [
        (lambda c: c.users.get(USER_ID), USER, f"GET {U}", None),
        (
            lambda c: c.users.lookup(email="a@b.example"),
            {"users": []},
            "POST /api/v1/users/lookup",
            {"email": "a@b.example"},
        ),
        (
            lambda c: c.users.update(USER_ID, phone=None, name="Ann"),
            USER,
            f"PATCH {U}",
            {"phone": None, "name": "Ann"},
        ),
        (lambda c: c.users.update(USER_ID), USER, f"PATCH {U}", {}),
        (lambda c: c.users.delete(USER_ID), None, f"DELETE {U}", None),
        (
            lambda c: c.users.set_password(USER_ID, "new password"),
            None,
            f"PUT {U}/password",
            {"password": "new password", "current_password": None},
        ),
        (lambda c: c.preferences.get(USER_ID), USER["preferences"], f"GET {U}/preferences", None),
        (
            lambda c: c.preferences.update(
                USER_ID,
                push=False,
                timezone=None,
                muted_until=datetime(2026, 1, 2, tzinfo=UTC),
                categories={"news": CategoryUpdate(push=None), "old": None},
                consent=Consent(source="settings_page"),
            ),
            USER["preferences"],
            f"PATCH {U}/preferences",
            {
                "push": False,
                "timezone": None,
                "muted_until": "2026-01-02T00:00:00Z",
                "categories": {"news": {"push": None}, "old": None},
                "consent": {"source": "settings_page", "policy_version": None},
            },
        ),
        (
            lambda c: c.preferences.update(USER_ID, categories=None),
            USER["preferences"],
            f"PATCH {U}/preferences",
            {"categories": None},
        ),
        (lambda c: c.devices.list(USER_ID), [DEVICE], f"GET {U}/devices", None),
        (
            lambda c: c.devices.register(USER_ID, token="tok", platform="ios"),
            DEVICE,
            f"POST {U}/devices",
            {"token": "tok", "platform": "ios", "app": None, "active": True},
        ),
        (
            lambda c: c.devices.update(USER_ID, "d-1", active=False),
            DEVICE,
            f"PATCH {U}/devices/d-1",
            {"active": False},
        ),
        (lambda c: c.devices.remove(USER_ID, "d-1"), None, f"DELETE {U}/devices/d-1", None),
    ],
    ids=[
        "get",
        "lookup",
        "update",
        "update-nothing",
        "delete",
        "set-password",
        "get-preferences",
        "update-preferences",
        "clear-categories",
        "list-devices",
        "register-device",
        "update-device",
        "remove-device",
    ],
)
async def test_methods_send_what_was_said_and_nothing_else(
    *, scripted: UserServiceClient, service: Service, make: Make, data: object, sent: str, body: Any
) -> None:
    service.answers(data)
    await make(scripted)
    assert f"{service.sent.method} {service.sent.url.raw_path.decode()}" == sent
    if body is None:
        assert service.sent.content == b""
        assert "Content-Type" not in service.sent.headers
    else:
        assert service.sent_body == body
        assert service.sent.headers["Content-Type"] == "application/json"


async def test_create_sends_the_preferences_that_were_named(
    scripted: UserServiceClient, service: Service
) -> None:
    service.answers(USER, status=201)
    user = await scripted.users.create(
        name="John Doe",
        email="john@example.com",
        password="correct horse",
        preferences=PreferencesUpdate(push=False),
    )
    assert user.preferences.categories["marketing"].email is False
    assert service.sent.url == "http://users.test/api/v1/users/"
    assert service.sent_body == {
        "name": "John Doe",
        "email": "john@example.com",
        "password": "correct horse",
        "phone": None,
        "external_id": None,
        "locale": None,
        "preferences": {"push": False},
    }


async def test_the_etag_of_a_read_makes_a_write_conditional(
    scripted: UserServiceClient, service: Service
) -> None:
    service.answers(USER)
    user, etag = await scripted.users.get_with_etag(USER_ID)
    assert (user.id, etag) == (USER_ID, ETAG)
    assert "If-Match" not in service.sent.headers
    service.answers(USER)
    await scripted.users.update(USER_ID, name="Ann", if_version=etag)
    assert service.sent.headers["If-Match"] == ETAG
    service.answers(USER["preferences"])
    _, etag = await scripted.preferences.get_with_etag(UUID(USER_ID))
    assert etag == ETAG


async def test_only_those_who_ask_for_an_etag_need_one(
    scripted: UserServiceClient, service: Service
) -> None:
    service.replies(200, envelope(USER))
    await scripted.users.get(USER_ID)
    service.replies(200, envelope(USER))
    with pytest.raises(DecodeError, match="no ETag"):
        await scripted.users.get_with_etag(USER_ID)


async def test_get_many_splits_and_keeps_the_order(
    scripted: UserServiceClient, service: Service
) -> None:
    ids = [str(UUID(int=i)) for i in range(1001)]
    service.answers({"users": [{**USER, "id": ids[0]}], "missing": ids[1:1000]})
    service.answers({"users": [{**USER, "id": ids[1000], "name": "Last"}], "missing": []})
    batch = await scripted.users.get_many([*ids, ids[0].upper(), UUID(int=5)])
    assert [user.name for user in batch.users] == ["John Doe", "Last"]
    assert batch.missing == tuple(ids[1:1000])
    assert service.sent_body == {"ids": [ids[1000]]}
    assert len(service.requests) == 2


async def test_get_many_of_nobody_calls_nobody(
    scripted: UserServiceClient, service: Service
) -> None:
    batch = await scripted.users.get_many([])
    assert (batch.users, batch.missing, service.requests) == ((), (), [])


async def test_listings_follow_the_cursor(scripted: UserServiceClient, service: Service) -> None:
    service.answers({"items": [USER, USER], "next_cursor": "a+b/c="})
    service.answers({"items": [USER], "next_cursor": None})
    assert len([user async for user in scripted.users.list(page_size=2)]) == 3
    assert [dict(request.url.params) for request in service.requests] == [
        {"limit": "2"},
        {"limit": "2", "cursor": "a+b/c="},
    ]
    revision = {
        "version": 2,
        "at": "2026-01-01T00:00:00Z",
        "actor": None,
        "source": "settings_page",
        "policy_version": None,
        "changes": [{"field": "push", "before": True, "after": False}],
    }
    service.answers({"items": [revision], "next_cursor": None})
    (seen,) = [entry async for entry in scripted.preferences.history(USER_ID)]
    assert seen.changes[0].before is True
    assert service.sent.url.path == f"{U}/preferences/history"


async def test_ids_cannot_leave_their_place_in_the_path(
    scripted: UserServiceClient, service: Service
) -> None:
    service.answers(USER)
    await scripted.users.get("a/../b?c#d e")
    assert service.sent.url.raw_path == b"/api/v1/users/a%2F..%2Fb%3Fc%23d%20e"
    for id_ in ("", ".", ".."):
        with pytest.raises(ValueError, match="an id is expected"):
            await scripted.users.delete(id_)
        with pytest.raises(ValueError, match="an id is expected"):
            await scripted.devices.remove(USER_ID, id_)
    assert len(service.requests) == 1


async def test_lookup_needs_exactly_one_criterion(client: UserServiceClient) -> None:
    with pytest.raises(ValueError, match="Exactly one"):
        await client.users.lookup(email="a@b.example", phone="+4822")


async def test_fields_and_enum_values_of_a_newer_server_are_accepted(
    scripted: UserServiceClient, service: Service
) -> None:
    device = {**DEVICE, "platform": "watch", "colour": "red"}
    service.answers({**USER, "devices": [device], "nickname": "J", "rules": 9})
    user = await scripted.users.get(USER_ID)
    assert (user.devices[0].platform, user.rules) == ("watch", 9)


HEALTH = {
    "status": "unhealthy",
    "version": "0.1.0",
    "dependencies": {
        "postgres": {"status": "down", "latency_ms": None},
        "redis": {"status": "up", "latency_ms": 1.5},
    },
}


@pytest.mark.parametrize("status", [200, 503])
async def test_health_is_told_also_when_it_is_bad(
    scripted: UserServiceClient, service: Service, status: int
) -> None:
    service.answers(HEALTH, status=status)
    health = await scripted.health()
    assert health.status == "unhealthy"
    assert health.dependencies["redis"].latency_ms == 1.5
    assert service.sent.url.path == "/health"


async def test_health_of_a_proxy_is_an_error(scripted: UserServiceClient, service: Service) -> None:
    service.replies(503, b"<html>down</html>")
    with pytest.raises(ServerError):
        await scripted.health()


async def test_keys_may_come_from_functions(service: Service) -> None:
    async def fetch() -> str:
        return "usk_2"

    async def header(api_key: ApiKey | None = None) -> str | None:
        service.answers(USER)
        transport = httpx.MockTransport(service.handle)
        async with UserServiceClient("http://h", api_key=api_key, transport=transport) as client:
            await client.users.get(USER_ID)
        authorization: str | None = service.sent.headers.get("Authorization")
        return authorization

    assert await header() is None
    assert await header("usk_0") == "Bearer usk_0"
    assert await header(lambda: "usk_1") == "Bearer usk_1"
    assert await header(fetch) == "Bearer usk_2"


@pytest.mark.parametrize("key", ["", "usk_secret\n", "usk_sécret", "a\x00b"], ids=range(4))
async def test_a_key_that_no_header_can_carry_is_refused_unseen(key: str) -> None:
    with pytest.raises(ValueError, match=r"^api_key is empty, or") as static:
        UserServiceClient("http://h", api_key=key)
    async with UserServiceClient("http://h", api_key=lambda: key) as client:
        with pytest.raises(ValueError, match=r"^api_key is empty, or") as made:
            await client.users.get(USER_ID)
    assert str(static.value) == str(made.value)


async def test_headers_of_a_call_override_and_its_id_is_sent(
    scripted: UserServiceClient, service: Service
) -> None:
    service.answers(USER)
    await scripted.users.get(USER_ID, headers={"x-request-id": "mine", "X-Min-Version": "3"})
    assert service.sent.headers["X-Request-ID"] == "mine"
    assert service.sent.headers["X-Min-Version"] == "3"
    assert service.sent.headers["User-Agent"].startswith("user-service-client/")


@pytest.mark.parametrize("name", ["timeout", "attempt_timeout", "retries"])
@pytest.mark.parametrize("number", [-1, float("nan")])
def test_a_number_that_bounds_nothing_is_refused(name: str, number: Any) -> None:
    with pytest.raises(ValueError, match="timeouts"):
        UserServiceClient("http://h", **{name: number})


@pytest.mark.parametrize("url", ["users:3001", "ftp://h", "http://", "http://k@h", "http://h?a=1"])
def test_a_base_url_that_would_be_misread_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        UserServiceClient(url)


async def test_respx_routes_can_be_the_service() -> None:
    router = respx.Router()
    router.get(f"https://gw.test/users-v1{U}").respond(200, content=envelope(USER))
    transport = httpx.MockTransport(router.async_handler)
    async with UserServiceClient("https://gw.test/users-v1/", transport=transport) as client:
        assert (await client.users.get(USER_ID)).name == "John Doe"
