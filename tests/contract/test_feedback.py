"""What providers said of tokens and addresses, by the fake and by the server alike."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from user_service_client import (
    EmailFeedback,
    FeedbackItem,
    Invalid,
    NotFound,
    PushFeedback,
    User,
    UserServiceClient,
    VersionMismatch,
)

from .conftest import PATIENCE
from .people import (
    FEEDBACK,
    NOBODY,
    PASSWORD,
    RESOLVE,
    USERS,
    assert_refused,
    data_of,
    new_email,
    new_token,
    register,
    version_of,
)

FUTURE = datetime(2100, 1, 1, tzinfo=UTC)
PAST = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
async def ada(client: UserServiceClient) -> User:
    return await client.users.create(name="Ada", email=new_email(), password=PASSWORD)


@pytest.fixture
async def token(client: UserServiceClient, ada: User) -> str:
    """A token of Ada's."""
    token = new_token()
    await client.devices.register(ada.id, token=token, platform="ios")
    return token


async def report(client: UserServiceClient, *items: FeedbackItem) -> list[str]:
    return [one.result for one in await client.feedback.report(items)]


async def document(raw: httpx.AsyncClient, user: User) -> dict[str, Any]:
    """Read a document as the service has it, and not the client."""
    shown: dict[str, Any] = data_of(await raw.get(f"{USERS}/{user.id}"))
    return shown


async def assert_told(client: UserServiceClient, user: User, version: int, kind: str) -> None:
    """The change feed tells of this change of a user, soon."""
    after: str | None = None
    async with asyncio.timeout(PATIENCE):
        while True:
            page = await client.changes.list(after=after, limit=1000)
            if (user.id, version, kind) in {
                (one.user_id, one.version, one.kind) for one in page.items
            }:
                return
            if not page.items:
                await asyncio.sleep(0.02)
            after = page.next


def of_token(token: str, reason: Any = "unregistered", at: datetime = FUTURE) -> PushFeedback:
    return PushFeedback(token=token, reason=reason, at=at)


def of_address(address: str, reason: Any = "hard_bounce", at: datetime = FUTURE) -> EmailFeedback:
    return EmailFeedback(address=address, reason=reason, at=at)


@pytest.mark.parametrize("reason", ["unregistered", "expired"])
async def test_a_dead_token_is_switched_off(
    raw: httpx.AsyncClient, client: UserServiceClient, ada: User, token: str, reason: str
) -> None:
    assert await report(client, of_token(token, reason)) == ["applied"]
    shown = await document(raw, ada)
    assert (shown["devices"], shown["version"]) == ([], 3)
    (device,) = await client.devices.list(ada.id)
    assert (device.active, device.inactive_reason) == (False, reason)
    await assert_told(client, ada, 3, "device.updated")
    # Twice is once.
    assert await report(client, of_token(token, reason)) == ["ignored"]
    assert await document(raw, ada) == shown
    # The app is installed again.
    await client.devices.register(ada.id, token=token, platform="ios")
    assert (await document(raw, ada))["version"] == 4


async def test_what_was_seen_since_stays(
    raw: httpx.AsyncClient, client: UserServiceClient, ada: User, token: str
) -> None:
    (device,) = await client.devices.list(ada.id)
    before = device.last_seen_at - timedelta(seconds=1)
    assert await report(client, of_token(token, at=before)) == ["ignored"]
    shown = await document(raw, ada)
    assert (len(shown["devices"]), shown["version"]) == (1, 2)
    # The app was started once more: no version, and yet it was seen.
    await client.devices.register(ada.id, token=token, platform="ios")
    assert await report(client, of_token(token, at=before)) == ["ignored"]
    assert await document(raw, ada) == shown


async def test_what_blames_neither_token_nor_address_changes_nothing(
    raw: httpx.AsyncClient, client: UserServiceClient, ada: User, token: str
) -> None:
    shown = await document(raw, ada)
    items: list[FeedbackItem] = [
        *(of_token(token, reason) for reason in ("mismatched", "rejected")),
        of_address(ada.email, "soft_bounce"),
    ]
    assert await report(client, *items) == ["ignored"] * 3
    assert await document(raw, ada) == shown


async def test_what_nobody_has_is_unknown(client: UserServiceClient) -> None:
    address = new_email()
    items = of_token(new_token()), of_address(address, "complaint")
    assert await report(client, *items) == ["unknown", "unknown"]


async def test_a_complaint_is_an_opt_out_of_email(
    raw: httpx.AsyncClient, client: UserServiceClient, ada: User
) -> None:
    assert await report(client, of_address(ada.email.upper(), "complaint")) == ["applied"]
    shown = await document(raw, ada)
    assert (shown["preferences"]["email"], shown["version"]) == (False, 2)
    assert shown["email_deliverable"] is True
    revision = await anext(client.preferences.history(ada.id))
    assert (revision.version, revision.source, revision.policy_version) == (2, "feedback", None)
    assert [(one.field, one.before, one.after) for one in revision.changes] == [
        ("email", True, False)
    ]
    await assert_told(client, ada, 2, "preferences.updated")
    assert await report(client, of_address(ada.email, "complaint")) == ["ignored"]
    assert (await document(raw, ada))["version"] == 2
    critical = await client.deliveries.resolve(ada.id, channel="email", priority="critical")
    assert critical.email == ada.email
    # Who opted in again since does not hear of the old complaint again.
    await client.preferences.update(ada.id, email=True)
    assert await report(client, of_address(ada.email, "complaint", PAST)) == ["ignored"]
    assert await report(client, of_address(ada.email, "complaint")) == ["applied"]


async def test_a_suppressed_address_stays_so_over_changes_to_and_fro(
    raw: httpx.AsyncClient, client: UserServiceClient, ada: User
) -> None:
    assert await report(client, of_address(ada.email)) == ["applied"]
    shown = await document(raw, ada)
    assert (shown["email_deliverable"], shown["version"]) == (False, 2)
    assert shown["preferences"]["email"] is True
    await assert_told(client, ada, 2, "address.suppressed")
    assert await report(client, of_address(ada.email)) == ["ignored"]
    for priority in ("normal", "urgent", "critical"):
        asked = {"channel": "email", "user_ids": [ada.id], "priority": priority}
        (decision,) = data_of(await raw.post(RESOLVE, json=asked))
        assert decision["reason"] == "email_undeliverable"
    other = new_email()
    assert (await client.users.update(ada.id, email=other)).email_deliverable is True
    back = await client.users.update(ada.id, email=ada.email.title())
    assert (back.email_deliverable, back.version) == (False, 4)
    # Whoever gets it next cannot be reached there either.
    await client.users.update(ada.id, email=other)
    assert (await register(raw, email=ada.email))["email_deliverable"] is False


async def test_an_address_is_suppressed_before_anybody_has_it(
    raw: httpx.AsyncClient, client: UserServiceClient
) -> None:
    address = new_email()
    assert await report(client, of_address(address), of_address(address)) == ["applied", "ignored"]
    assert (await register(raw, email=address))["email_deliverable"] is False


async def test_a_suppression_can_be_lifted(
    raw: httpx.AsyncClient, client: UserServiceClient, ada: User
) -> None:
    await report(client, of_address(ada.email))
    with pytest.raises(VersionMismatch):
        await client.users.lift_suppression(ada.id, if_version=1)
    await client.users.lift_suppression(ada.id, if_version=2)
    user = await client.users.get(ada.id)
    assert (user.email_deliverable, user.version) == (True, 3), "it reads what it has written"
    await assert_told(client, ada, 3, "address.restored")
    await client.users.lift_suppression(ada.id)
    assert (await document(raw, ada))["version"] == 3
    # What bounced before is over; what bounces since is not.
    assert await report(client, of_address(ada.email, at=PAST)) == ["ignored"]
    assert await report(client, of_address(ada.email)) == ["applied"]
    with pytest.raises(NotFound):
        await client.users.lift_suppression(NOBODY)
    answer = await raw.delete(f"{USERS}/{ada.id}/suppression/")
    assert (data_of(answer), version_of(answer)) == (None, 5)
    assert_refused(await raw.delete(f"{USERS}/x/suppression"), 404, "user_not_found", "user_id")


async def test_reports_of_one_user_raise_one_version(
    raw: httpx.AsyncClient, client: UserServiceClient, ada: User, token: str
) -> None:
    items: list[FeedbackItem] = [
        of_token(token),
        of_address(ada.email, "complaint"),
        of_token(new_token()),
        of_address(ada.email),
        of_token(token, "expired"),
    ]
    assert await report(client, *items) == ["applied", "applied", "unknown", "applied", "ignored"]
    shown = await document(raw, ada)
    assert (shown["version"], shown["devices"]) == (3, [])
    assert (shown["email_deliverable"], shown["preferences"]["email"]) == (False, False)
    await assert_told(client, ada, 3, "address.suppressed")
    (device,) = await client.devices.list(ada.id)
    assert device.inactive_reason == "unregistered", "the first report counts"
    assert (await anext(client.preferences.history(ada.id))).version == 3


async def test_a_thousand_reports_at_once_and_no_more(
    raw: httpx.AsyncClient, client: UserServiceClient, token: str
) -> None:
    items = [of_token(new_token()) for _ in range(999)]
    results = await report(client, *items[:500], of_token(token), *items[500:])
    assert results == ["unknown"] * 500 + ["applied"] + ["unknown"] * 499
    one = {"channel": "push", "token": "t", "reason": "expired", "at": "2026-01-01T00:00:00Z"}
    answer = await raw.post(FEEDBACK, json={"items": [one] * 1001})
    assert_refused(answer, 422, "validation_failed", "items")
    assert data_of(await raw.post(FEEDBACK, json={"items": []})) == []


async def test_a_long_token_fits(client: UserServiceClient) -> None:
    tokens = [f"{new_token()}-".ljust(4096, "x") for _ in range(1000)]
    assert set(await report(client, *map(of_token, tokens))) == {"unknown"}


async def test_a_repeated_report_is_answered_as_the_first(
    client: UserServiceClient, token: str
) -> None:
    key = new_email()
    first = await client.feedback.report([of_token(token)], idempotency_key=key)
    again = await client.feedback.report([of_token(token)], idempotency_key=key)
    assert [one.result for one in (*first, *again)] == ["applied", "applied"]


@pytest.mark.parametrize(
    ("item", "bad"),
    [
        ({"reason": "gone"}, ["items[0].reason"]),
        ({"token": ""}, ["items[0].token"]),
        ({"token": "t" * 4097}, ["items[0].token"]),
        ({"at": "2026-01-01T00:00:00"}, ["items[0].at"]),
        ({"address": "ada@example.com"}, ["items[0].address"]),
        ({"channel": "fax"}, ["items[0].channel"]),
    ],
)
async def test_every_bad_field_is_named(
    raw: httpx.AsyncClient, item: dict[str, Any], bad: list[str]
) -> None:
    good = {"channel": "push", "token": "t", "reason": "expired", "at": "2026-01-01T00:00:00Z"}
    answer = await raw.post(FEEDBACK, json={"items": [good | item, good]})
    assert_refused(answer, 422, "validation_failed", *bad)


async def test_one_bad_report_stops_all(
    raw: httpx.AsyncClient, client: UserServiceClient, ada: User, token: str
) -> None:
    shown = await document(raw, ada)
    with pytest.raises(Invalid) as refused:
        await client.feedback.report([of_token(token), of_address("ada@-"), of_address("x@-.-")])
    fields = [detail.field for detail in refused.value.details]
    assert fields == ["items[1].address", "items[2].address"]
    assert await document(raw, ada) == shown
