"""Code as a user of the client writes it: checked by mypy --strict, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from typing import assert_type
from uuid import UUID

import httpx
from user_service_client import (
    UNSET,
    BatchOfUsers,
    CategoryUpdate,
    Channels,
    Consent,
    Decision,
    Device,
    DeviceDetails,
    EmailFeedback,
    FeedbackResult,
    FieldError,
    Health,
    Invalid,
    Preferences,
    PreferencesRevision,
    PreferencesUpdate,
    PushFeedback,
    RateLimited,
    User,
    UserServiceClient,
    Verdict,
    VersionMismatch,
)
from user_service_client.testing import FakeUserService, VirtualClock


async def fetch_key() -> str:
    return "usk_…"


async def consume(user_id: str, device_id: UUID, name: str | None) -> None:
    UserServiceClient("http://user-service:3001")
    UserServiceClient("http://h", api_key="usk", timeout=5, transport=httpx.AsyncHTTPTransport())
    UserServiceClient("http://h", api_key=lambda: "usk")
    async with UserServiceClient("http://h", api_key=fetch_key) as client:
        assert_type(client, UserServiceClient)
        user = assert_type(await client.users.get(user_id, timeout=1.5), User)
        assert_type(user.preferences.categories["marketing"], Channels)
        assert_type(user.devices, tuple[Device, ...])
        assert_type(await client.users.get_with_etag(UUID(user_id)), tuple[User, str])
        assert_type(await client.users.get_many([user_id, UUID(user_id)]), BatchOfUsers)
        assert_type(await client.users.lookup(phone="+48221234567"), tuple[User, ...])
        assert_type(client.users.list(page_size=100), AsyncIterator[User])
        created = await client.users.create(
            name="Ann", email="ann@example.com", preferences=PreferencesUpdate(push=False)
        )
        assert_type(created, User)
        await client.users.update(
            user_id,
            name=UNSET if name is None else name,
            phone=None,
            if_version='"e.f.3"',
            headers={"X-Min-Version": "3"},
        )
        await client.users.set_password(user_id, "new password", current_password="old password")
        await client.users.delete(user_id)
        preferences = await client.preferences.update(
            user_id,
            quiet_hours_start="22:00",
            quiet_hours_end="07:00",
            muted_until=datetime(2026, 1, 1, tzinfo=UTC),
            categories={"news": CategoryUpdate(email=False), "old": None},
            consent=Consent(source="settings_page"),
        )
        assert_type(preferences, Preferences)
        async for revision in client.preferences.history(user_id):
            assert_type(revision, PreferencesRevision)
        device = await client.devices.register(user_id, token="t", platform="ios")
        assert_type(device, DeviceDetails)
        assert_type(await client.devices.list(user_id), tuple[DeviceDetails, ...])
        await client.devices.update(user_id, device_id, active=False)
        await client.devices.remove(user_id, device_id, if_version=None)
        await client.users.lift_suppression(user_id, if_version=3, idempotency_key="job")
        assert_type(await client.health(), Health)


async def deliver(client: UserServiceClient, user_id: str, ids: Iterable[UUID]) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    decision = await client.deliveries.resolve(
        user_id, channel="push", category="news", app="shop", timeout=1, max_stale=60
    )
    assert_type(decision, Decision)
    assert_type(await client.deliveries.resolve(UUID(user_id), channel="email"), Decision)
    decisions = await client.deliveries.resolve(
        ids, channel="email", priority="critical", at=now, explain=True
    )
    assert_type(decisions, tuple[Decision, ...])
    match decision.decision:
        case Verdict.ALLOW:
            assert_type([device.token for device in decision.devices], list[str])
        case Verdict.DEFER:
            assert_type(decision.deferred_until, datetime | None)
        case _:
            assert_type(decision.reason, str)
    user = await client.users.get(user_id)
    assert_type(client.deliveries.decide(user, channel="push", priority="urgent"), Decision)
    pushed = client.feedback.from_fcm(404, b"{}", token="t", at=now)
    assert_type(pushed, PushFeedback | None)
    bounced = EmailFeedback(address=user.email, reason="hard_bounce", at=now)
    results = await client.feedback.report(
        [bounced, *([pushed] if pushed else [])], idempotency_key="job"
    )
    assert_type(results, tuple[FeedbackResult, ...])


def pretend(clock: VirtualClock) -> FakeUserService:
    fake = FakeUserService(
        clock=clock, categories={"security": {"email": "required", "push": "on"}}
    )
    fake.suppress("ann@example.com")
    assert_type(fake.lift_suppression(fake.user().id), User)
    fake.use_categories(None)
    assert_type(fake.feedback, list[PushFeedback | EmailFeedback])
    return fake


async def misuse(client: UserServiceClient, user_id: str) -> None:
    """What must not type-check: an unused ignore is an error, too."""
    await client.users.get(3)  # type: ignore[arg-type]
    await client.users.get(user_id, retry=1)  # type: ignore[call-arg]
    await client.users.get(user_id, if_version="x")  # type: ignore[call-arg]
    await client.users.update(user_id, name=None)  # type: ignore[arg-type]
    await client.preferences.update(user_id, pusch=False)  # type: ignore[call-arg]
    await client.deliveries.resolve(user_id, channel="sms")  # type: ignore[call-overload]
    await client.deliveries.resolve(3, channel="push")  # type: ignore[call-overload]
    await client.devices.register(user_id, token="t", platform="fax")  # type: ignore[arg-type]


def handle(error: Exception) -> None:
    match error:
        case Invalid():
            assert_type(error.details, tuple[FieldError, ...])
        case VersionMismatch():
            assert_type(error.etag, str | None)
        case RateLimited():
            assert_type(error.retry_after, float | None)
        case _:
            raise error
