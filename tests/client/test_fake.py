"""The fake service: what a test can do to it, and that it tells when it was not done."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, NoReturn
from uuid import uuid4

import httpx
import pytest
from user_service_client import (
    CategoryUpdate,
    Channels,
    Conflict,
    EmailFeedback,
    ErrorCode,
    MaybeProcessed,
    NotFound,
    NotSent,
    PreferencesUpdate,
    PushFeedback,
    RateLimited,
    ServerError,
    User,
    UserServiceClient,
)
from user_service_client.hooks import StreamState
from user_service_client.testing import Categories, FakeUserService, Route, VirtualClock
from user_service_client.testing._fake import PASSWORD
from user_service_schemas import Catalogue, RegisterDevice

from ..system.subscribers import Event, EventParser

STREAM = "/api/v1/changes/stream"
FCM_ERROR = "type.googleapis.com/google.firebase.fcm.v1.FcmError"


@pytest.fixture
async def client(fake: FakeUserService) -> AsyncIterator[UserServiceClient]:
    async with UserServiceClient("http://users.test", transport=fake) as made:
        yield made


@pytest.fixture
async def raw(fake: FakeUserService) -> AsyncIterator[httpx.AsyncClient]:
    """One request a call: no retries stand between a fault and its test."""
    async with httpx.AsyncClient(transport=fake, base_url="http://users.test") as made:
        yield made


def path_of(user: User) -> str:
    return f"/api/v1/users/{user.id}"


# Users


async def test_a_user_needs_nothing_said(fake: FakeUserService, client: UserServiceClient) -> None:
    first, second = fake.user(), fake.user()
    assert (first.name, first.version, first.devices) == ("User 1", 1, ())
    assert first.email != second.email
    assert first.id < second.id
    assert await client.users.get(first.id) == first


async def test_a_user_as_the_test_wants_it(
    fake: FakeUserService, client: UserServiceClient
) -> None:
    ada = fake.user(
        name="Ada",
        email="ada@example.com",
        push=False,
        preferences=PreferencesUpdate(categories={"news": CategoryUpdate(email=False)}),
        devices=[("t1", "ios"), RegisterDevice(token="t2", platform="web", app="mail")],
        email_deliverable=False,
    )
    assert (ada.preferences.push, ada.preferences.categories["news"].email) == (False, False)
    assert [device.token for device in ada.devices] == ["t2", "t1"]
    assert ada.email_deliverable is False
    assert ada.version == 3, "as many as it took to get there"
    assert await client.users.get(ada.id) == ada == fake.document(ada.id)


async def test_edits_raise_versions(fake: FakeUserService, client: UserServiceClient) -> None:
    ada, bob = fake.user(), fake.user()
    assert fake.update_user(ada.id, name="Ada", phone="+48221234567").version == 2
    assert fake.update_preferences(ada.id, push=False).preferences.push is False
    device = fake.register_device(ada.id, "token", "android")
    fake.update_device(ada.id, device.id, active=False)
    moved = fake.register_device(bob.id, "token", "android")
    fake.remove_device(bob.id, moved.id)
    assert [fake.document(user.id).version for user in (ada, bob)] == [6, 3]
    fake.delete_user(ada.id)
    with pytest.raises(NotFound):
        await client.users.get(ada.id)


def test_edits_that_the_service_would_refuse_are_the_tests_mistake(fake: FakeUserService) -> None:
    ada = fake.user(email="ada@example.com")
    with pytest.raises(ValueError, match="email: Another user has this email"):
        fake.user(email="ADA@example.com")
    with pytest.raises(ValueError, match="name: Expected"):
        fake.update_user(ada.id, name="")
    with pytest.raises(ValueError, match="quiet_hours_end: Quiet hours need both ends"):
        fake.update_preferences(ada.id, quiet_hours_start="22:00")
    with pytest.raises(LookupError, match="No user has this id"):
        fake.update_user(str(uuid4()), name="Nobody")
    assert fake.document(ada.id) == ada


async def test_passwords_are_nowhere_to_be_found(
    fake: FakeUserService, client: UserServiceClient
) -> None:
    user = await client.users.create(name="Ada", email="ada@example.com", password="Se-cret-99")
    await client.users.set_password(user.id, "Se-cret-98", current_password="Se-cret-99")
    assert "Se-cret" not in f"{fake.requests}{[asked.body for asked in fake.requests]}"
    assert "ada@example.com" not in repr(fake.requests)


async def test_requests_are_kept(fake: FakeUserService, raw: httpx.AsyncClient) -> None:
    ada = fake.user()
    await raw.get(f"{path_of(ada)}/", headers={"X-Min-Version": "1"})
    await raw.patch(f"{path_of(ada)}/preferences?x=y", json={"push": False})
    await raw.get("/nothing")
    assert [(asked.operation, asked.status) for asked in fake.requests] == [
        ("users.get", 200),
        ("preferences.update", 200),
        (None, 404),
    ]
    assert fake.requests[0].headers["x-min-version"] == "1"
    assert (fake.requests[1].method, fake.requests[1].path) == (
        "PATCH",
        f"{path_of(ada)}/preferences",
    )
    assert fake.requests[1].body == {"push": False}
    assert fake.requests[1].params["x"] == "y"


async def test_a_batch_says_of_which_epoch_and_format_it_is(
    fake: FakeUserService, raw: httpx.AsyncClient
) -> None:
    ada = fake.user()
    batch = await raw.post("/api/v1/users/batch", json={"ids": [ada.id]})
    etag = (await raw.get(path_of(ada))).headers["etag"]
    assert etag == f'"{batch.headers["x-document-tag"]}.1"'


async def test_passwords_may_be_left_out_where_the_service_says_so() -> None:
    async with UserServiceClient(
        "http://users.test", transport=FakeUserService(password_required=False)
    ) as client:
        assert (await client.users.create(name="Ada", email="ada@example.com")).version == 1


async def test_recorded_answers_are_kept_for_a_day(
    fake: FakeUserService, raw: httpx.AsyncClient
) -> None:
    path, key = path_of(fake.user()), {"Idempotency-Key": "k"}
    for hours, replayed in ((0, None), (23, "true"), (2, None)):
        await fake.clock.advance(hours * 3600)
        answer = await raw.patch(path, json={"name": "Ada"}, headers=key)
        assert answer.headers.get("idempotency-replayed") == replayed


async def test_inactive_devices_are_kept_for_30_days(fake: FakeUserService) -> None:
    ada = fake.user(devices=[("old", "ios")])
    fake.update_device(ada.id, ada.devices[0].id, active=False)
    await fake.clock.advance(timedelta(days=30, seconds=1).total_seconds())
    fake.register_device(ada.id, "new")
    with pytest.raises(LookupError, match="no device"):
        fake.update_device(ada.id, ada.devices[0].id, active=True)


# Deliveries and feedback


async def push(client: UserServiceClient, user_id: str, at: datetime) -> None:
    """Send, as a worker does whose gateway does not know any token."""
    decision = await client.deliveries.resolve(user_id, channel="push")
    gone = {"error": {"details": [{"@type": FCM_ERROR, "errorCode": "UNREGISTERED"}]}}
    for device in decision.devices:
        item = client.feedback.from_fcm(404, gone, token=device.token, at=at)
        assert item is not None
        await client.feedback.report([item])


@pytest.mark.parametrize("late", [timedelta(0), timedelta(days=365)])
async def test_a_dead_token_is_reported(late: timedelta) -> None:
    """As docs/client.md shows it; a worker may as well go by the time of the machine."""
    fake = FakeUserService(categories={"security": {"email": "required", "push": "on"}})
    ada = fake.user(devices=[("fcm_token", "android")])
    async with UserServiceClient("http://users", transport=fake, clock=fake.clock) as client:
        await push(client, ada.id, fake.clock.now() + late)
    assert [item.token for item in fake.feedback if isinstance(item, PushFeedback)] == ["fcm_token"]
    assert fake.document(ada.id).devices == ()


def test_an_address_is_suppressed_whoever_has_it(fake: FakeUserService) -> None:
    fake.suppress("Ada@Example.com")
    ada = fake.user(email="ada@example.com")
    assert ada.email_deliverable is False
    assert fake.update_user(ada.id, email="other@example.com").email_deliverable is True
    assert fake.update_user(ada.id, email="ada@example.com").email_deliverable is False
    lifted = fake.lift_suppression(ada.id)
    assert (lifted.email_deliverable, lifted.version) == (True, 4)
    assert fake.lift_suppression(ada.id) == lifted
    fake.suppress("ada@example.com")
    assert fake.document(ada.id).email_deliverable is False, "also in the same instant"
    with pytest.raises(ValueError, match=r"items\[0\].address"):
        fake.suppress("nonsense")
    with pytest.raises(LookupError):
        fake.lift_suppression(str(uuid4()))


async def test_feedback_of_another_sender_is_heard_of(fake: FakeUserService) -> None:
    ada = fake.user(devices=[("old", "ios"), ("new", "ios")])
    async with UserServiceClient(
        "http://users.test", transport=fake, clock=fake.clock, live=True
    ) as client:
        await fake.clock.advance(2)
        assert len((await client.deliveries.resolve(ada.id, channel="push")).devices) == 2
        now = fake.clock.now()
        results = fake.report(
            PushFeedback(token="old", reason="expired", at=now),
            PushFeedback(token="new", reason="expired", at=now - timedelta(hours=1)),
            EmailFeedback(address=ada.email, reason="complaint", at=now),
        )
        assert [one.result for one in results] == ["applied", "ignored", "applied"]
        await fake.clock.advance(0)
        decision = await client.deliveries.resolve(ada.id, channel="push")
        assert [device.token for device in decision.devices] == ["new"]
        assert (await client.deliveries.resolve(ada.id, channel="email")).version == 4
    assert fake.feedback == [], "what the fake was told is not what was reported to it"


async def test_decisions_are_of_the_time_of_the_fakes_clock(
    fake: FakeUserService, raw: httpx.AsyncClient
) -> None:
    ada = fake.user(
        preferences=PreferencesUpdate(quiet_hours_start="11:00", quiet_hours_end="13:00")
    )
    asked = {"channel": "email", "user_ids": [ada.id]}
    for hours, decided in ((0, "defer"), (1, "allow"), (22, "defer")):
        await fake.clock.advance(hours * 3600)
        (decision,) = (await raw.post("/api/v1/deliveries/resolve", json=asked)).json()["data"]
        assert decision["decision"] == decided


CATALOGUE = {"news": {"email": "off", "push": "on"}}


@pytest.mark.parametrize(
    "said", [CATALOGUE, json.dumps(CATALOGUE), Catalogue.parse(json.dumps(CATALOGUE))]
)
def test_a_catalogue_as_the_setting_says_it(said: Categories) -> None:
    fake = FakeUserService(categories=said)
    ada = fake.user()
    assert ada.preferences.categories == {"news": Channels(email=False, push=True)}
    with pytest.raises(ValueError, match="sport: This category is not known"):
        fake.update_preferences(ada.id, categories={"sport": CategoryUpdate(email=True)})


def test_a_catalogue_that_is_none_is_the_tests_mistake() -> None:
    with pytest.raises(ValueError, match=r"news\.push: Expected one of on, off, required"):
        FakeUserService(categories='{"news": {"email": "on"}}')


async def test_another_catalogue_makes_other_documents(
    fake: FakeUserService, raw: httpx.AsyncClient
) -> None:
    ada = fake.user(preferences=PreferencesUpdate(categories={"news": CategoryUpdate(email=False)}))
    before = (await raw.get(path_of(ada))).headers["etag"]
    fake.use_categories({"news": {"email": "required", "push": "off"}})
    answer = await raw.get(path_of(ada), headers={"If-None-Match": before})
    assert answer.status_code == 200
    shown = answer.json()["data"]["preferences"]["categories"]
    assert shown == {"news": {"email": True, "push": False, "required": ["email"]}}
    fake.use_categories(None)
    assert fake.document(ada.id) == ada, "what was said is kept"


async def test_bad_bodies_are_judged_by_the_fakes_settings() -> None:
    fake = FakeUserService(password_required=False)
    async with httpx.AsyncClient(transport=fake, base_url="http://users.test") as raw:
        answer = await raw.post("/api/v1/users", json={"name": 1, "email": "ada@example.com"})
    assert [one["field"] for one in answer.json()["error"]["details"]] == ["name"]


# Faults


async def test_a_failure_happens_as_often_as_scripted(
    fake: FakeUserService, raw: httpx.AsyncClient
) -> None:
    ada = fake.user()
    fake.fail(status=503, times=2, retry_after=0.5, route="users.get")
    assert (await raw.get(f"{path_of(ada)}/preferences")).is_success
    for _ in range(2):
        answer = await raw.get(path_of(ada))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "dependency_unavailable"
    assert (await raw.get(path_of(ada))).is_success
    assert fake.unused_faults() == []


async def test_a_failure_has_the_errors_class(
    fake: FakeUserService, raw: httpx.AsyncClient, client: UserServiceClient
) -> None:
    ada = fake.user()
    fake.fail(code=ErrorCode.EMAIL_TAKEN, route="users.update")
    with pytest.raises(Conflict) as taken:
        await client.users.update(ada.id, name="Bob")
    assert taken.value.code == ErrorCode.EMAIL_TAKEN
    for status, code in ((429, "rate_limited"), (500, "internal_error"), (401, "unauthenticated")):
        fake.fail(status=status)
        answer = await raw.get(path_of(ada))
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    fake.fail(status=502)
    answer = await raw.get(path_of(ada))
    assert (answer.status_code, answer.headers["content-type"]) == (502, "text/html")
    fake.fail(status=429, retry_after=datetime(2026, 1, 1, 13, tzinfo=UTC))
    answer = await raw.get(path_of(ada))
    assert answer.headers["retry-after"] == "Thu, 01 Jan 2026 13:00:00 GMT"


async def test_the_client_meets_the_faults(
    fake: FakeUserService, client: UserServiceClient
) -> None:
    ada = fake.user()
    fake.fail(status=429, times=None, route="devices.list", retry_after=60)
    with pytest.raises(RateLimited):
        await client.devices.list(ada.id)
    fake.fail(status=500, times=None, route="preferences.get")
    with pytest.raises(ServerError):
        await client.preferences.get(ada.id)
    fake.clear_faults()
    assert await client.preferences.get(ada.id) == ada.preferences


@pytest.mark.parametrize("after_processing", [True, False])
async def test_a_dropped_write_has_happened_or_not(
    fake: FakeUserService, raw: httpx.AsyncClient, after_processing: bool
) -> None:
    ada = fake.user()
    fake.drop(after_processing=after_processing)
    with pytest.raises(httpx.ReadError):
        await raw.patch(path_of(ada), json={"name": "Bob"})
    assert fake.document(ada.id).name == ("Bob" if after_processing else ada.name)
    assert fake.requests[-1].status is None
    fake.fail(status=504, after_processing=after_processing)
    assert (await raw.patch(path_of(ada), json={"name": "Eve"})).status_code == 504
    assert (fake.document(ada.id).name == "Eve") is after_processing


async def test_the_client_does_not_know_whether_a_dropped_write_happened(
    fake: FakeUserService, client: UserServiceClient
) -> None:
    ada = fake.user()
    fake.drop(times=None, route="users.update")
    with pytest.raises(MaybeProcessed):
        await client.users.update(ada.id, name="Bob")


@pytest.mark.parametrize(
    ("route", "hits"),
    [
        pytest.param(None, True, id="all"),
        pytest.param("users.get", True, id="operation"),
        pytest.param("users.update", False, id="another"),
        pytest.param(lambda method, path: (method, path[:8]) == ("GET", "/api/v1/"), True, id="is"),
        pytest.param(lambda method, _: method == "POST", False, id="is not"),
    ],
)
async def test_faults_are_for_a_route(
    fake: FakeUserService, raw: httpx.AsyncClient, route: Route, hits: bool
) -> None:
    fake.fail(route=route)
    assert (await raw.get(path_of(fake.user()))).is_success is not hits
    assert bool(fake.unused_faults()) is not hits


async def test_only_a_fault_that_names_the_stream_hits_it(
    fake: FakeUserService, raw: httpx.AsyncClient
) -> None:
    fake.fail()
    async with raw.stream("GET", STREAM) as answer:
        assert answer.status_code == 200
    fake.fail(status=500, route="changes.stream")
    assert (await raw.get(STREAM)).status_code == 500


def test_a_route_that_is_not_there_is_a_mistake(fake: FakeUserService) -> None:
    with pytest.raises(ValueError, match=r"route is none of .*users\.get"):
        fake.fail(route="user.get")
    with pytest.raises(ValueError, match="times"):
        fake.drop(times=0)


async def test_delays_move_the_clock_and_nothing_else(
    fake: FakeUserService, raw: httpx.AsyncClient
) -> None:
    ada = fake.user()
    fake.delay(0.5)
    before = fake.clock.monotonic()
    assert (await raw.get(path_of(ada), timeout=0.8)).is_success
    assert fake.clock.monotonic() - before == pytest.approx(0.5)
    fake.delay(30)
    with pytest.raises(httpx.ReadTimeout):
        await raw.patch(path_of(ada), json={"name": "Late"}, timeout=0.8)
    assert fake.clock.monotonic() - before == pytest.approx(1.3)
    assert fake.document(ada.id).name == "Late", "it was processed all the same"
    fake.delay(30)
    assert (await raw.get(path_of(ada), timeout=None)).is_success


async def test_a_dead_service_refuses_and_comes_back_with_its_users(
    fake: FakeUserService, client: UserServiceClient
) -> None:
    ada = fake.user()
    fake.refuse_connections()
    with pytest.raises(NotSent):
        await client.users.get(ada.id)
    fake.accept_connections()
    assert await client.users.get(ada.id) == ada


def test_what_did_not_happen_is_described(fake: FakeUserService) -> None:
    fake.fail(status=503, times=2, route="users.get")
    fake.drop(times=None)
    fake.delay(0.5)
    assert fake.unused_faults() == [
        "fail(status=503, times=2, route='users.get') happened 0 times",
        "drop(after_processing=True, times=None) happened 0 times",
        "delay(seconds=0.5, times=1) happened 0 times",
    ]
    fake.clear_faults()
    assert fake.unused_faults() == []


# The stream


class Reader:
    """Follows the stream in the background, and takes whatever comes."""

    def __init__(self, raw: httpx.AsyncClient, last_event_id: str = "") -> None:
        self.events: list[Event] = []
        self.task = asyncio.create_task(self._follow(raw, last_event_id))

    async def _follow(self, raw: httpx.AsyncClient, last_event_id: str) -> None:
        parser = EventParser()
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        async with raw.stream("GET", STREAM, headers=headers) as answer:
            async for chunk in answer.aiter_raw():
                self.events += parser.feed(chunk)

    def names(self) -> list[str]:
        """Return what came since the last time."""
        names = [event.name for event in self.events]
        self.events.clear()
        return names


async def test_edits_reach_the_streams(fake: FakeUserService, raw: httpx.AsyncClient) -> None:
    ada = fake.user()
    readers = [Reader(raw), Reader(raw)]
    await fake.clock.advance(0)
    assert fake.open_streams == 2
    assert [reader.names() for reader in readers] == [["ready", "heartbeat"]] * 2
    fake.update_preferences(ada.id, push=False)
    fake.update_preferences(ada.id, push=False)
    await fake.clock.advance(0)
    for reader in readers:
        assert [(event.name, event.data["version"]) for event in reader.events] == [("change", 2)]
        reader.task.cancel()
    await asyncio.wait([reader.task for reader in readers])
    assert fake.open_streams == 0


async def test_heartbeats_come_every_15_seconds_of_the_clock(
    fake: FakeUserService, raw: httpx.AsyncClient
) -> None:
    reader = Reader(raw)
    await fake.clock.advance(44)
    assert reader.names() == ["ready", "heartbeat", "heartbeat", "heartbeat"]
    fake.break_streams(gracefully=True)
    await reader.task
    assert reader.names() == []
    # As many for who comes later, and none for nobody.
    await fake.clock.advance(3600)
    reader = Reader(raw)
    await fake.clock.advance(16)
    assert reader.names() == ["ready", "heartbeat", "heartbeat"]
    fake.break_streams()
    with pytest.raises(httpx.ReadError):
        await reader.task


async def test_a_stalled_feed_beats_and_says_so(
    fake: FakeUserService, raw: httpx.AsyncClient
) -> None:
    ada, reader = fake.user(), Reader(raw)
    await fake.clock.advance(0)
    fake.stall_feed()
    fake.update_user(ada.id, name="Bob")
    await fake.clock.advance(45)
    last = reader.events[-1]
    lag = datetime.fromisoformat(last.data["now"]) - datetime.fromisoformat(last.data["through"])
    assert (last.name, lag) == ("heartbeat", timedelta(seconds=45))
    assert "change" not in reader.names()
    fake.resume_feed()
    await fake.clock.advance(15)
    assert reader.events[-1].data["now"] == reader.events[-1].data["through"]
    assert reader.names() == ["change", "heartbeat"]
    reader.task.cancel()


async def test_a_broken_stream_goes_on_from_its_last_event(
    fake: FakeUserService, raw: httpx.AsyncClient
) -> None:
    ada, reader = fake.user(), Reader(raw)
    await fake.clock.advance(0)
    last = reader.events[0].id
    assert last
    fake.refuse_connections()
    fake.update_user(ada.id, name="Bob")
    with pytest.raises(httpx.ReadError):
        await reader.task
    with pytest.raises(httpx.ConnectError):
        await raw.get(STREAM)
    fake.accept_connections()
    reader = Reader(raw, last)
    await fake.clock.advance(0)
    assert reader.names() == ["change", "heartbeat"]
    reader.task.cancel()


@pytest.mark.parametrize("reason", ["epoch", "age"])
async def test_a_stream_that_cannot_go_on_is_reset(
    fake: FakeUserService, raw: httpx.AsyncClient, reason: str
) -> None:
    ada, reader = fake.user(), Reader(raw)
    await fake.clock.advance(0)
    last = reader.events[0].id
    assert last
    etag = (await raw.get(path_of(ada))).headers["etag"]
    fake.update_user(ada.id, name="Bob")
    if reason == "epoch":
        fake.renew_epoch()
        await reader.task
        assert (await raw.get(path_of(ada))).headers["etag"].split(".")[0] != etag.split(".")[0]
        assert (await raw.get(path_of(ada), headers={"If-None-Match": etag})).status_code == 200
    else:
        fake.prune_feed()
        fake.break_streams(gracefully=True)
        await reader.task
    reader = Reader(raw, last)
    await fake.clock.advance(0)
    assert reader.events[0].data == {"reason": reason}
    assert reader.names() == ["reset", "heartbeat"]
    fake.update_user(ada.id, name="Eve")
    await fake.clock.advance(0)
    assert reader.names() == ["change"]
    reader.task.cancel()
    refused = await raw.get("/api/v1/changes", params={"after": last})
    assert refused.json()["error"]["code"] == "invalid_cursor"


# The clock


async def test_a_call_that_waits_moves_the_clock(fake: FakeUserService) -> None:
    clock = VirtualClock(datetime(2026, 5, 1, tzinfo=UTC))
    await clock.sleep(90)
    assert clock.monotonic() == 90
    assert clock.now() == datetime(2026, 5, 1, 0, 1, 30, tzinfo=UTC)
    assert FakeUserService(clock=clock).user().created_at > clock.now() > fake.clock.now()


async def test_what_waits_in_the_background_waits_for_the_test() -> None:
    clock, woken = VirtualClock(), list[tuple[str, float]]()

    async def wait(name: str, seconds: float) -> None:
        await clock.pause(seconds)
        woken.append((name, clock.monotonic()))

    waiting = [asyncio.create_task(wait(str(s), s)) for s in (3.0, 1.0, 2.0)]
    waiting.append(asyncio.create_task(wait("cancelled", 1.5)))
    await clock.advance(0)
    waiting[-1].cancel()
    await clock.advance(2.5)
    assert woken == [("1.0", 1.0), ("2.0", 2.0)]
    assert clock.monotonic() == 2.5
    await clock.sleep(10)  # a call that waits wakes them, too
    await asyncio.wait(waiting)
    assert woken[2][0] == "3.0"


async def test_a_wait_ends_with_its_clock_or_its_result() -> None:
    clock = VirtualClock()
    never = asyncio.Event()

    async def give_up() -> str:
        try:
            await clock.wait_for(never.wait(), 45)
        except TimeoutError:
            return f"gave up after {clock.monotonic():g}"
        return "came"

    task = asyncio.create_task(give_up())
    await clock.advance(44)
    assert not task.done()
    await clock.advance(2)
    assert await task == "gave up after 45"

    task = asyncio.create_task(give_up())
    await clock.advance(1)
    never.set()
    assert await task == "came"
    await clock.advance(100)  # its timer harms nobody

    async def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await clock.wait_for(fail(), 1)
    never.clear()
    task = asyncio.create_task(give_up())
    await clock.advance(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# A client that lives by the clock


@pytest.fixture
async def live(fake: FakeUserService) -> AsyncIterator[UserServiceClient]:
    """A client that follows the stream, connected."""
    async with UserServiceClient(
        "http://users.test", transport=fake, clock=fake.clock, live=True
    ) as made:
        # What is read in its first 2 s, a client does not yet take for covered by the stream.
        await fake.clock.advance(3)
        assert made.status.is_complete
        yield made


async def test_retries_wait_for_nothing_real(
    fake: FakeUserService, live: UserServiceClient
) -> None:
    ada = fake.user()
    fake.fail(status=503, times=2, retry_after=0.5, route="users.get")
    began, real = fake.clock.monotonic(), time.monotonic()
    assert await live.users.get(ada.id, timeout=10) == ada
    assert [asked.status for asked in fake.requests if asked.operation == "users.get"] == [
        503,
        503,
        200,
    ]
    assert fake.clock.monotonic() - began >= 2, "Retry-After is whole seconds, twice"
    assert time.monotonic() - real < 2, "and not as long as the clock says"
    assert fake.unused_faults() == []


async def test_a_repeated_write_happens_once(
    fake: FakeUserService, live: UserServiceClient
) -> None:
    ada = fake.user()
    fake.drop(route="users.update")
    assert (await live.users.update(ada.id, name="Bob")).version == 2
    fake.delay(3, route="preferences.update")
    await live.preferences.update(ada.id, push=False)
    assert fake.document(ada.id).version == 3
    writes = [asked for asked in fake.requests if asked.method == "PATCH"]
    assert [asked.status for asked in writes] == [None, 200, None, 200]
    assert writes[0].headers["idempotency-key"] == writes[1].headers["idempotency-key"]


async def test_an_edit_reaches_the_clients_copies(
    fake: FakeUserService, live: UserServiceClient
) -> None:
    ada = fake.user()
    assert await live.users.get(ada.id) == ada
    await fake.clock.advance(600)
    assert await live.users.get(ada.id) == ada
    assert len(fake.requests) == 2, "the stream, and one read: the copy is known to be right"
    changed = fake.update_preferences(ada.id, push=False)
    await fake.clock.advance(0)
    assert await live.users.get(ada.id) == changed


async def test_a_client_comes_back_to_a_broken_stream(
    fake: FakeUserService, live: UserServiceClient
) -> None:
    ada = fake.user()
    assert await live.users.get(ada.id) == ada
    fake.break_streams()
    changed = fake.update_user(ada.id, name="Bob")
    await fake.clock.advance(0)
    assert (live.status.stream, fake.open_streams) == (StreamState.INTERRUPTED, 0)
    await fake.clock.advance(2)
    assert (live.status.stream, fake.open_streams) == (StreamState.LIVE, 1)
    assert await live.users.get(ada.id) == changed, "what it missed was told"
    fake.stall_feed()
    await fake.clock.advance(60)
    assert not live.status.is_complete
    fake.resume_feed()
    await fake.clock.advance(16)
    assert live.status.is_complete


# The plugin

CONFIG = """
[pytest]
strict = true
filterwarnings = error
anyio_mode = auto
"""
TESTS = """
import pytest
from user_service_client import UserServiceClient

@pytest.fixture
def anyio_backend():
    return "asyncio"

def test_sync(fake_user_service):
    assert fake_user_service.user().version == 1

async def test_async(fake_user_service):
    ada = fake_user_service.user()
    fake_user_service.fail(status=401, route="users.get")
    async with UserServiceClient("http://users", transport=fake_user_service) as client:
        try:
            await client.users.get(ada.id)
        except Exception as error:
            assert error.status == 401
        assert await client.users.get(ada.id) == ada

def test_unused(fake_user_service):
    fake_user_service.fail(status=503, times=2, route="users.get")
"""
UNTOUCHED = """
import sys

def test_without():
    assert not {"httpx", "msgspec", "user_service_client"} & set(sys.modules)
"""


def run_pytest(directory: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests elsewhere, with no plugins but the client's and the one for async tests."""
    (directory / "pytest.ini").write_text(CONFIG)
    (directory / "test_it.py").write_text(tests)
    plugins = ["-p", "anyio.pytest_plugin", "-p", "user_service_client_pytest"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", *plugins],
        cwd=directory,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_fixture_fails_a_test_that_left_a_fault_unused(tmp_path: Path) -> None:
    ran = run_pytest(tmp_path, TESTS)
    assert "fail(status=503, times=2, route='users.get') happened 0 times" in ran.stdout, ran
    assert "ERROR test_it.py::test_unused" in ran.stdout
    assert "3 passed, 1 error" in ran.stdout


def test_the_plugin_costs_nothing_where_it_is_not_used(tmp_path: Path) -> None:
    ran = run_pytest(tmp_path, UNTOUCHED)
    assert ran.returncode == 0, ran.stdout


def test_the_plugin_is_declared() -> None:
    project = Path(__file__).parents[2] / "packages/user_service_client/pyproject.toml"
    points = tomllib.loads(project.read_text())["project"]["entry-points"]
    assert points["pytest11"] == {"user_service_client_pytest": "user_service_client_pytest"}


# Many users, and what the service stands on


class _Accounts(dict[str, object]):
    """Accounts through which nobody may look for one."""

    def __iter__(self) -> NoReturn:
        raise AssertionError("all users were looked through")

    values = items = keys = __iter__


async def test_no_user_is_looked_for_among_all(
    fake: FakeUserService, client: UserServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a test that loads 50,000 users waits for minutes."""
    monkeypatch.setattr(fake._directory, "_accounts", _Accounts())
    ada = fake.user(email="Ada@example.com", external_id="a", devices=[("token", "ios")])
    bob = fake.user(phone="+48221234567")
    assert await client.users.lookup(email="ada@example.com") == (ada,)
    assert await client.users.lookup(external_id="a") == (ada,)
    assert await client.users.lookup(phone="+48221234567") == (bob,)
    with pytest.raises(Conflict):
        await client.users.create(name="A", email="ada@EXAMPLE.com", password=PASSWORD)
    assert (await client.credentials.verify("ada@example.com", PASSWORD)) == ada.id
    fake.register_device(bob.id, "token")
    assert fake.document(ada.id).devices == ()
    item = PushFeedback(token="token", reason="unregistered", at=fake.clock.now())
    assert fake.report(item)[0].result == "applied"
    fake.suppress("ada@example.com")
    assert not fake.document(ada.id).email_deliverable


async def test_what_a_user_had_can_be_somebody_elses(fake: FakeUserService) -> None:
    ada = fake.user(email="ada@example.com", external_id="a", devices=[("token", "ios")])
    fake.update_user(ada.id, email="ann@example.com", external_id=None)
    bob = fake.user(email="ada@example.com", external_id="a")
    fake.update_user(ada.id, email="ann@example.com")
    fake.delete_user(bob.id)
    fake.delete_user(ada.id)
    eve = fake.user(email="ada@example.com", external_id="a", devices=[("token", "ios")])
    assert [device.token for device in eve.devices] == ["token"]
    item = PushFeedback(token="token", reason="unregistered", at=fake.clock.now())
    fake.delete_user(eve.id)
    assert fake.report(item)[0].result == "unknown"


@pytest.mark.parametrize(
    ("lost", "status"),
    [
        (("redis",), "degraded"),
        (("postgres",), "unhealthy"),
        (("postgres", "redis"), "unhealthy"),
    ],
)
async def test_health_says_what_was_lost(
    fake: FakeUserService,
    client: UserServiceClient,
    lost: Sequence[Literal["postgres", "redis"]],
    status: str,
) -> None:
    fake.lose(*lost)
    health = await client.health()
    assert health.status == status
    assert fake.requests[-1].status == (503 if status == "unhealthy" else 200)
    down = {name for name, one in health.dependencies.items() if one.status == "down"}
    assert down == set(lost)
    fake.lose()
    assert (await client.health()).status == "healthy"
