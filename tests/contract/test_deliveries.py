"""May a message go now, by the fake and by the server alike."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
import pytest
from user_service_client import (
    CategoryUpdate,
    Invalid,
    PreferencesUpdate,
    Reason,
    User,
    UserServiceClient,
    Verdict,
)
from user_service_client.testing import FakeUserService
from user_service_schemas import CHANNELS
from user_service_server.app import create_app

from ..engines import settings_for
from .conftest import PATIENCE
from .people import (
    NOBODY,
    PASSWORD,
    RESOLVE,
    USERS,
    assert_refused,
    data_of,
    new_email,
    new_token,
    register,
)

CATALOGUE = (
    '{"security": {"email": "required", "push": "on"}, "news": {"email": "off", "push": "on"}}'
)
KEYS = ["user_id", "decision", "reason", "deferred_until", "email", "devices", "version"]


@pytest.fixture(scope="module", params=["fake", "server"])
def engines_of_it(request: pytest.FixtureRequest) -> tuple[str, str] | None:
    """The database and the Redis of a server with a catalogue; None: the fake has neither."""
    if request.param == "fake":
        return None
    return request.getfixturevalue("database_url"), request.getfixturevalue("redis_url")


@pytest.fixture(scope="module")
async def catalogued(
    engines_of_it: tuple[str, str] | None,
) -> AsyncIterator[httpx.AsyncBaseTransport]:
    """A service with a catalogue: news need an opt-in by mail, security cannot be refused there."""
    if engines_of_it is None:
        yield FakeUserService(categories=CATALOGUE)
        return
    app = create_app(settings_for(*engines_of_it, CATEGORIES=CATALOGUE))
    async with app.lifespan():
        yield httpx.ASGITransport(app)  # type: ignore[arg-type]  # Litestar's ASGI types are narrower


@pytest.fixture
async def shop(catalogued: httpx.AsyncBaseTransport) -> AsyncIterator[httpx.AsyncClient]:
    """Requests to the service with a catalogue."""
    async with httpx.AsyncClient(
        transport=catalogued, base_url="http://test", timeout=PATIENCE
    ) as made:
        yield made


@pytest.fixture
async def ada(client: UserServiceClient) -> User:
    return await client.users.create(name="Ada", email=new_email(), password=PASSWORD)


async def test_decisions_are_in_the_order_of_the_request(raw: httpx.AsyncClient) -> None:
    ada = await register(raw)
    bob = await register(raw, preferences={"email": False})
    ids = [bob["id"], NOBODY, ada["id"], bob["id"].upper(), NOBODY, ada["id"]]
    answer = await raw.post(f"{RESOLVE}/", json={"channel": "email", "user_ids": ids})
    decisions = data_of(answer)
    assert [one["user_id"] for one in decisions] == [user_id.lower() for user_id in ids]
    assert [one["reason"] for one in decisions] == [
        *("channel_opted_out", "user_not_found", "allowed"),
        *("channel_opted_out", "user_not_found", "allowed"),
    ]
    assert [one["email"] for one in decisions] == [None, None, ada["email"]] * 2
    assert [one["version"] for one in decisions] == [1, None, 1, 1, None, 1]
    assert {tuple(one) for one in decisions} == {tuple(KEYS)}
    assert answer.headers["cache-control"] == "no-store"


async def test_of_nobody_nothing_is_decided(raw: httpx.AsyncClient) -> None:
    assert data_of(await raw.post(RESOLVE, json={"channel": "push", "user_ids": []})) == []


async def test_a_thousand_are_decided_at_once_and_no_more(raw: httpx.AsyncClient) -> None:
    ids = [f"01a205c7-a743-7a16-a135-{number:012x}" for number in range(999)]
    ids.insert(500, (await register(raw))["id"])
    decisions = data_of(await raw.post(RESOLVE, json={"channel": "email", "user_ids": ids}))
    assert [one["user_id"] for one in decisions] == ids
    assert [number for number, one in enumerate(decisions) if one["version"]] == [500]
    answer = await raw.post(RESOLVE, json={"channel": "email", "user_ids": [*ids, NOBODY]})
    assert_refused(answer, 422, "validation_failed", "user_ids")


async def test_where_to_is_told_with_allow_alone(client: UserServiceClient, ada: User) -> None:
    push = await client.deliveries.resolve(ada.id, channel="push")
    assert (push.decision, push.reason) == (Verdict.SUPPRESS, Reason.NO_ACTIVE_DEVICE)
    old = await client.devices.register(ada.id, token=new_token(), platform="ios", app="shop")
    off = await client.devices.register(ada.id, token=new_token(), platform="web", active=False)
    new = await client.devices.register(ada.id, token=new_token(), platform="android")
    push = await client.deliveries.resolve(ada.id, channel="push")
    assert push.decision == Verdict.ALLOW
    assert [(d.id, d.token, d.platform, d.app) for d in push.devices] == [
        (d.id, d.token, d.platform, d.app) for d in (new, old)
    ]
    assert off.id not in {device.id for device in push.devices}
    assert (push.email, push.version) == (None, 4)
    mail = await client.deliveries.resolve(ada.id, channel="email")
    assert (mail.email, mail.devices) == (ada.email, ())
    await client.preferences.update(ada.id, push=False, email=False)
    for channel in CHANNELS:
        refused = await client.deliveries.resolve(ada.id, channel=channel)
        assert (refused.email, refused.devices, refused.version) == (None, (), 5)


async def test_an_app_has_devices_of_its_own(
    raw: httpx.AsyncClient, client: UserServiceClient, ada: User
) -> None:
    shop = await client.devices.register(ada.id, token=new_token(), platform="ios", app="shop")
    await client.devices.register(ada.id, token=new_token(), platform="ios", app="bank")
    for app, ids, reason in (
        ("shop", [shop.id], "allowed"),
        ("news", [], "no_active_device"),
    ):
        asked = {"channel": "push", "user_ids": [ada.id], "app": app}
        (by_service,) = data_of(await raw.post(RESOLVE, json=asked))
        assert [device["id"] for device in by_service["devices"]] == ids
        assert by_service["reason"] == reason
        by_client = await client.deliveries.resolve(ada.id, channel="push", app=app)
        assert ([device.id for device in by_client.devices], by_client.reason) == (ids, reason)


async def test_it_is_explained_on_request(
    raw: httpx.AsyncClient, client: UserServiceClient, ada: User
) -> None:
    await client.preferences.update(ada.id, email=False)
    asked: dict[str, Any] = {"channel": "email", "user_ids": [ada.id, NOBODY]}
    plain = data_of(await raw.post(RESOLVE, json=asked))
    explained = data_of(await raw.post(RESOLVE, json=asked | {"explain": True}))
    assert [
        {name: said for name, said in one.items() if name != "explanation"} for one in explained
    ] == plain
    for one in explained:
        rules = [said["rule"] for said in one["explanation"]]
        assert len(rules) == 7
        assert {tuple(said) for said in one["explanation"]} == {("rule", "verdict", "why")}
        (decided,) = (s for s in one["explanation"] if s["verdict"] == one["decision"])
        assert decided["rule"] == one["reason"]
    by_client = await client.deliveries.resolve([ada.id, NOBODY], channel="email", explain=True)
    assert [[said.why for said in one.explanation] for one in by_client] == [
        [said["why"] for said in one["explanation"]] for one in explained
    ]


async def test_a_deferral_is_to_an_instant_in_utc(
    raw: httpx.AsyncClient, client: UserServiceClient, ada: User
) -> None:
    """The two rows of the contract's table, by service and by client."""
    await client.preferences.update(
        ada.id, quiet_hours_start="22:00", quiet_hours_end="02:30", timezone="Europe/Warsaw"
    )
    for at, until in (
        ("2026-03-28T23:30:00Z", "2026-03-29T01:00:00Z"),
        ("2026-03-29T00:30:00+01:00", "2026-03-29T01:00:00Z"),
        ("2026-10-25T01:15:00Z", "2026-10-25T01:30:00Z"),
        ("2026-10-25T12:00:00Z", None),
    ):
        asked = {"channel": "email", "user_ids": [ada.id], "at": at}
        (by_service,) = data_of(await raw.post(RESOLVE, json=asked))
        assert by_service["deferred_until"] == until
        by_client = await client.deliveries.resolve(
            ada.id, channel="email", at=datetime.fromisoformat(at)
        )
        assert by_client.deferred_until == (until and datetime.fromisoformat(until))
        assert by_client.decision == by_service["decision"] == ("defer" if until else "allow")


async def test_without_an_instant_it_is_now(client: UserServiceClient, ada: User) -> None:
    far = datetime(2100, 1, 1, tzinfo=UTC)
    await client.preferences.update(ada.id, muted_until=far)
    assert (await client.deliveries.resolve(ada.id, channel="email")).deferred_until == far
    past = datetime(2020, 1, 1, tzinfo=UTC)
    await client.preferences.update(ada.id, muted_until=past)
    assert (await client.deliveries.resolve(ada.id, channel="email")).decision == Verdict.ALLOW


@pytest.mark.parametrize(
    ("fields", "bad"),
    [
        ({"channel": "sms"}, ["channel"]),
        ({"channel": None}, ["channel"]),
        ({"user_ids": None}, ["user_ids"]),
        ({"user_ids": NOBODY}, ["user_ids"]),
        ({"user_ids": [NOBODY, "x", 3]}, ["user_ids[1]", "user_ids[2]"]),
        ({"category": "Not a name"}, ["category"]),
        ({"category": ""}, ["category"]),
        ({"category": "a" * 65}, ["category"]),
        ({"app": ""}, ["app"]),
        ({"app": "a" * 129}, ["app"]),
        ({"priority": "loud"}, ["priority"]),
        ({"priority": None}, ["priority"]),
        ({"at": "2026-01-01T00:00:00"}, ["at"]),
        ({"at": "yesterday"}, ["at"]),
        ({"at": 1767225600}, ["at"]),
        ({"explain": 1}, ["explain"]),
        ({"explain": None}, ["explain"]),
        ({"who": "me"}, ["who"]),
        ({"channel": "sms", "at": "x", "app": 1, "more": 1}, ["channel", "at", "app", "more"]),
    ],
)
async def test_every_bad_field_is_named(
    raw: httpx.AsyncClient, fields: dict[str, Any], bad: list[str]
) -> None:
    asked = {"channel": "push", "user_ids": [NOBODY]} | fields
    assert_refused(await raw.post(RESOLVE, json=asked), 422, "validation_failed", *bad)


async def test_channel_and_recipients_must_be_said(raw: httpx.AsyncClient) -> None:
    answer = await raw.post(RESOLVE, json={})
    assert_refused(answer, 422, "validation_failed", "channel", "user_ids")
    assert_refused(await raw.get(RESOLVE), 405, "method_not_allowed")


@pytest.mark.parametrize("ends", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"])
async def test_the_ends_of_the_calendar_are_decided(
    raw: httpx.AsyncClient, client: UserServiceClient, ada: User, ends: str
) -> None:
    await client.preferences.update(ada.id, quiet_hours_start="12:00", quiet_hours_end="11:59")
    for explain in (False, True):
        asked = {"channel": "email", "user_ids": [ada.id], "at": ends, "explain": explain}
        (decision,) = data_of(await raw.post(RESOLVE, json=asked))
        assert decision["reason"] in ("allowed", "quiet_hours")


async def test_the_client_says_a_mistake_as_the_service_does(
    client: UserServiceClient, ada: User
) -> None:
    for said, field in (
        ({"channel": "sms"}, "channel"),
        ({"channel": "push", "priority": "loud"}, "priority"),
        ({"channel": "push", "category": "Not a name"}, "category"),
        ({"channel": "push", "at": datetime(2026, 1, 1)}, "at"),  # noqa: DTZ001
    ):
        asked: dict[str, Any] = said
        with pytest.raises(Invalid) as refused:
            await client.deliveries.resolve(ada.id, **asked)
        assert [detail.field for detail in refused.value.details] == [field]
        with pytest.raises(Invalid):
            client.deliveries.decide(ada, **asked)


async def test_one_id_is_one_decision(client: UserServiceClient, ada: User) -> None:
    one = await client.deliveries.resolve(UUID(ada.id), channel="email")
    ids: list[str | UUID] = [ada.id, UUID(NOBODY), ada.id]
    many = await client.deliveries.resolve(iter(ids), channel="email")
    assert [decision.user_id for decision in many] == [ada.id, NOBODY, ada.id]
    assert one == many[0] == many[2] == client.deliveries.decide(ada, channel="email")
    assert many[1].reason == Reason.USER_NOT_FOUND
    assert await client.deliveries.resolve([], channel="email") == ()


# With a catalogue


async def test_the_document_shows_what_holds(shop: httpx.AsyncClient) -> None:
    said = {"categories": {"news": {"push": False}}}
    shown = (await register(shop, preferences=said))["preferences"]
    assert shown["catalogued"] is True
    assert list(shown["categories"].items()) == [
        ("security", {"email": True, "push": True, "required": ["email"]}),
        ("news", {"email": False, "push": False}),
    ]


async def test_what_the_catalogue_does_not_allow_is_refused(shop: httpx.AsyncClient) -> None:
    path = f"{USERS}/{(await register(shop))['id']}/preferences"
    for change, field in (
        ({"sport": {"email": False}}, "categories.sport"),
        ({"security": {"email": False}}, "categories.security.email"),
    ):
        answer = await shop.patch(path, json={"categories": change})
        assert_refused(answer, 422, "validation_failed", field)
        body = {"name": "Ada", "email": new_email(), "password": PASSWORD}
        answer = await shop.post(USERS, json=body | {"preferences": {"categories": change}})
        assert_refused(answer, 422, "validation_failed", f"preferences.{field}")
    assert (await shop.patch(path, json={"categories": {"security": {"push": False}}})).is_success


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"category": "sport"}, "category"),
        ({"category": "sport", "priority": "critical"}, "category"),
        ({"category": "news", "priority": "critical"}, "priority"),
        ({"category": "security", "channel": "push", "priority": "critical"}, "priority"),
        ({"priority": "critical"}, "priority"),
    ],
)
async def test_what_a_sender_must_not_ask_for_is_refused(
    shop: httpx.AsyncClient,
    catalogued: httpx.AsyncBaseTransport,
    asked: dict[str, Any],
    field: str,
) -> None:
    user = await register(shop)
    said = {"channel": "email"} | asked
    for ids in ([user["id"]], [NOBODY], []):
        answer = await shop.post(RESOLVE, json=said | {"user_ids": ids})
        assert_refused(answer, 422, "validation_failed", field)
    async with UserServiceClient("http://test", transport=catalogued, timeout=PATIENCE) as client:
        with pytest.raises(Invalid) as refused:
            await client.deliveries.resolve(user["id"], **said)
    assert [detail.field for detail in refused.value.details] == [field]


async def test_an_opt_in_is_needed_where_the_catalogue_says_so(
    catalogued: httpx.AsyncBaseTransport,
) -> None:
    async with UserServiceClient("http://test", transport=catalogued, timeout=PATIENCE) as client:
        ada = await client.users.create(name="Ada", email=new_email(), password=PASSWORD)
        bob = await client.users.create(
            name="Bob",
            email=new_email(),
            password=PASSWORD,
            preferences=PreferencesUpdate(categories={"news": CategoryUpdate(email=True)}),
        )
        decisions = await client.deliveries.resolve(
            [ada.id, bob.id], channel="email", category="news"
        )
        assert [one.reason for one in decisions] == ["category_opted_out", "allowed"]
        await client.preferences.update(ada.id, email=False)
        security = await client.deliveries.resolve(
            ada.id, channel="email", category="security", priority="critical"
        )
        assert security.decision == Verdict.ALLOW
