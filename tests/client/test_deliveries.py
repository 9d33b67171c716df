"""Decisions of the client: how old a copy they are made on, and what is asked of the service."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import msgspec
import pytest
from user_service_client import (
    Decision,
    DecodeError,
    Invalid,
    NotSent,
    PushFeedback,
    RateLimited,
    ServerError,
    UnknownRules,
    User,
    UserServiceClient,
    UserServiceError,
    Verdict,
)
from user_service_client.testing import FakeUserService
from user_service_schemas import Catalogue, Priority, decide

from .conftest import envelope
from .network import NOBODY, Network, client_of, ids_of

FRESH, STALE = 30, 300
"""Seconds of client.md's table."""


@pytest.fixture
def ada(fake: FakeUserService) -> User:
    return fake.user(devices=[("a token", "ios")])


async def may_push(
    client: UserServiceClient, user: User, priority: Priority = "normal", **others: Any
) -> str:
    """Return the reason of a decision on a push."""
    decision: Decision = await client.deliveries.resolve(
        user.id, channel="push", priority=priority, **others
    )
    return decision.reason


# Not live: 30 s, then it is revalidated first


@pytest.mark.parametrize("priority", ["normal", "urgent"])
async def test_a_fresh_copy_is_decided_on_without_a_call(
    fake: FakeUserService, network: Network, client: UserServiceClient, ada: User, priority: Any
) -> None:
    assert await client.users.get(ada.id) == ada
    await fake.clock.advance(FRESH * 0.9 - 0.1)  # of the jitter, the least
    fake.update_preferences(ada.id, push=False)
    assert await may_push(client, ada, priority) == "allowed"
    assert network.requests == {"users.get": 1}


async def test_an_old_copy_is_revalidated_first(
    fake: FakeUserService, network: Network, client: UserServiceClient, ada: User
) -> None:
    """A read would have had the old one, and a late opt-out would be a complaint."""
    await client.users.get(ada.id)
    await fake.clock.advance(FRESH)
    assert await may_push(client, ada) == "allowed"
    assert network.requests == {"users.get": 2}
    assert network.sent("If-None-Match")[1] is not None
    assert fake.requests[-1].status == 304, "which decodes nothing"
    assert await may_push(client, ada) == "allowed"
    assert network.requests == {"users.get": 2}, "the copy is fresh again"
    await fake.clock.advance(FRESH)
    fake.update_preferences(ada.id, push=False)
    assert await may_push(client, ada) == "channel_opted_out"
    assert fake.requests[-1].status == 200
    assert client.cache.stats.stale == 0


async def test_out_of_reach_a_copy_of_up_to_five_minutes_decides(
    fake: FakeUserService, client: UserServiceClient, ada: User
) -> None:
    await client.users.get(ada.id)
    fake.refuse_connections()
    for age in (FRESH, STALE):
        await fake.clock.advance(age - fake.clock.monotonic())
        # What waits between attempts moves the clock, too: this long it can be asked for.
        assert await may_push(client, ada, retries=0) == "allowed"
    await fake.clock.advance(1)
    with pytest.raises(NotSent):
        await may_push(client, ada, retries=0)
    assert await may_push(client, ada, retries=0, max_stale=3600) == "allowed"
    fake.accept_connections()
    fake.fail(status=503, times=None, route="users.get")
    with pytest.raises(ServerError):
        await may_push(client, ada)
    fake.clear_faults()
    assert await may_push(client, ada) == "allowed"


async def test_what_nobody_has_read_cannot_be_decided_out_of_reach(
    fake: FakeUserService, client: UserServiceClient, ada: User
) -> None:
    fake.refuse_connections()
    for recipients in (ada.id, [ada.id]):
        with pytest.raises(NotSent):
            await client.deliveries.resolve(recipients, channel="push")


async def test_one_without_a_copy_spoils_a_batch_out_of_reach(
    fake: FakeUserService, client: UserServiceClient, ada: User
) -> None:
    bob = fake.user()
    await client.users.get(ada.id)
    fake.refuse_connections()
    with pytest.raises(NotSent):
        await client.deliveries.resolve([ada.id, bob.id], channel="push")


# Live: until a change is heard of


async def test_a_live_copy_is_decided_on_until_a_change_is_heard_of(
    fake: FakeUserService, network: Network, live: UserServiceClient, ada: User
) -> None:
    await live.users.get(ada.id)
    await fake.clock.advance(24 * 3600)
    assert await may_push(live, ada) == "allowed"
    assert network.requests == {"users.get": 1}
    fake.update_preferences(ada.id, push=False)
    await fake.clock.advance(0)
    assert await may_push(live, ada) == "channel_opted_out"
    assert network.requests == {"users.get": 2}


async def test_a_copy_is_not_live_when_the_stream_lags_behind(
    fake: FakeUserService, network: Network, live: UserServiceClient, ada: User
) -> None:
    await live.users.get(ada.id)
    fake.stall_feed()
    await fake.clock.advance(2 * FRESH)
    fake.update_preferences(ada.id, push=False)
    assert await may_push(live, ada) == "channel_opted_out"
    assert network.requests == {"users.get": 2}


async def test_an_interrupted_stream_means_thirty_seconds_again(
    fake: FakeUserService, network: Network, live: UserServiceClient, ada: User
) -> None:
    await live.users.get(ada.id)
    fake.refuse_connections()
    await fake.clock.advance(0)
    assert await may_push(live, ada) == "allowed"
    assert network.requests == {"users.get": 1}
    await fake.clock.advance(STALE + FRESH)
    with pytest.raises(UserServiceError):
        await may_push(live, ada, retries=0)


async def test_a_worker_that_reports_a_token_hears_that_it_is_gone(
    fake: FakeUserService, live: UserServiceClient, ada: User
) -> None:
    """As examples/push_worker.py does it: resolve, send, report what the gateway said."""
    decision = await live.deliveries.resolve(ada.id, channel="push")
    (device,) = decision.devices
    fcm = {"@type": "type.googleapis.com/google.firebase.fcm.v1.FcmError"}
    gone = {"error": {"details": [fcm | {"errorCode": "UNREGISTERED"}]}}
    item = live.feedback.from_fcm(404, gone, token=device.token, at=fake.clock.now())
    assert item == PushFeedback(token="a token", reason="unregistered", at=fake.clock.now())
    assert item is not None
    assert [one.result for one in await live.feedback.report([item])] == ["applied"]
    assert fake.feedback == [item]
    await fake.clock.advance(0)
    decision = await live.deliveries.resolve(ada.id, channel="push")
    assert (decision.decision, decision.reason) == (Verdict.SUPPRESS, "no_active_device")
    assert [one.result for one in await live.feedback.report([item])] == ["ignored"]


# Critical: always revalidated, and never old


@pytest.mark.parametrize("is_live", [False, True])
async def test_critical_revalidates_whatever_there_is(
    fake: FakeUserService, network: Network, ada: User, is_live: bool
) -> None:
    async with client_of(network, live=is_live) as client:
        await client.users.get(ada.id)
        for number in (2, 3):
            assert await may_push(client, ada, "critical") == "allowed"
            assert network.requests == {"users.get": number}
            assert fake.requests[-1].status == 304
        fake.remove_device(ada.id, ada.devices[0].id)
        assert await may_push(client, ada, "critical") == "no_active_device"


@pytest.mark.parametrize("is_live", [False, True])
async def test_critical_raises_out_of_reach(
    fake: FakeUserService, network: Network, ada: User, is_live: bool
) -> None:
    async with client_of(network, live=is_live) as client:
        await client.users.get(ada.id)
        fake.fail(status=503, times=None, route="users.get")
        with pytest.raises(ServerError):
            await may_push(client, ada, "critical", max_stale=3600)
        assert await may_push(client, ada) == "allowed"


async def test_an_unknown_id_is_not_asked_for_again_unless_it_is_critical(
    fake: FakeUserService,
    network: Network,
    client: UserServiceClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mail to confirm a registration is sent at once, and maybe asked about too early."""
    monkeypatch.setattr(fake._directory, "new_id", lambda: NOBODY)
    for _ in range(2):
        decision = await client.deliveries.resolve(NOBODY, channel="email")
        assert (decision.reason, decision.user_id) == ("user_not_found", NOBODY)
    assert network.requests == {"users.get": 1}
    user = fake.user()
    critical = await client.deliveries.resolve(NOBODY, channel="email", priority="critical")
    assert (critical.email, critical.version) == (user.email, 1)
    assert (await client.deliveries.resolve(NOBODY, channel="email")).reason == "allowed"


# Many


async def test_what_is_lacking_is_asked_for_in_one_call(
    fake: FakeUserService, network: Network, client: UserServiceClient
) -> None:
    users = [fake.user() for _ in range(1000)]
    await client.users.get_many(ids_of(users[:300]))
    await fake.clock.advance(FRESH)  # these have to be revalidated
    await client.users.get_many(ids_of(users[300:600]))
    ids = [*ids_of(users), NOBODY, users[0].id, NOBODY]
    decisions = await client.deliveries.resolve(ids, channel="email")
    assert [one.user_id for one in decisions] == ids
    assert [one.reason for one in decisions[1000:]] == [
        *("user_not_found", "allowed", "user_not_found"),
    ]
    assert {one.email for one in decisions[:1000]} == {user.email for user in users}
    assert network.requests == {"users.get_many": 3}
    body = fake.requests[-1].body
    assert body == {"ids": [*ids_of(users[:300]), *ids_of(users[600:]), NOBODY]}
    await client.deliveries.resolve(ids, channel="push")
    assert network.requests == {"users.get_many": 3}


async def test_more_than_a_thousand_are_asked_for_in_thousands(
    fake: FakeUserService, network: Network, client: UserServiceClient
) -> None:
    ids = ids_of(fake.user() for _ in range(2500))
    decisions = await client.deliveries.resolve(ids, channel="email")
    assert [one.user_id for one in decisions] == ids
    assert network.requests == {"users.get_many": 3}


# What only the service can decide


class Foreign(Network):
    """A service whose documents say something that this client does not know."""

    def __init__(self, fake: FakeUserService, old: bytes, new: bytes) -> None:
        super().__init__(fake)
        self._replaced = old, new

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await super().handle_async_request(request)
        if "/users" not in request.url.path:
            return answer
        headers = {name: said for name, said in answer.headers.items() if name != "content-length"}
        body = (await answer.aread()).replace(*self._replaced)
        return httpx.Response(answer.status_code, headers=headers, content=body)


@pytest.fixture(params=["rules", "zone"])
async def foreign(fake: FakeUserService, ada: User, request: pytest.FixtureRequest) -> Foreign:
    """A service with other rules, or with a zone that the zone database here does not have."""
    fake.update_preferences(
        ada.id, quiet_hours_start="11:00", quiet_hours_end="13:00", timezone="Europe/London"
    )
    if request.param == "rules":
        return Foreign(fake, b'"rules":1', b'"rules":2')
    return Foreign(fake, b'"Europe/London"', b'"Europe/Lyonesse"')


async def test_what_cannot_be_decided_here_is_asked_of_the_service(
    fake: FakeUserService, foreign: Foreign, ada: User
) -> None:
    bob = fake.user()
    async with client_of(foreign) as client:
        decision = await client.deliveries.resolve(
            ada.id, channel="push", category="news", app=None, explain=True
        )
        assert foreign.requests == {"users.get": 1, "deliveries.resolve": 1}
        document = fake.document(ada.id)
        assert decision == decide(document, "push", fake.clock.now(), explain=True, category="news")
        assert decision.deferred_until == datetime(2026, 1, 1, 13, tzinfo=UTC)
        at = datetime(2026, 1, 1, 14, tzinfo=UTC)
        decisions = await client.deliveries.resolve(
            [bob.id, ada.id, NOBODY, ada.id], channel="push", at=at, priority="urgent"
        )
        assert [(one.user_id, one.reason) for one in decisions] == [
            (bob.id, "no_active_device"),
            (ada.id, "allowed"),
            (NOBODY, "user_not_found"),
            (ada.id, "allowed"),
        ]
        body = fake.requests[-1].body
        assert isinstance(body, dict)
        assert body["user_ids"].count(ada.id) == 1
        assert NOBODY not in body["user_ids"]
        assert (body["at"], body["priority"]) == ("2026-01-01T14:00:00Z", "urgent")


async def test_what_cannot_be_decided_here_is_not_decided_out_of_reach(
    fake: FakeUserService, foreign: Foreign, ada: User
) -> None:
    async with client_of(foreign) as client:
        fake.fail(status=503, times=None, route="deliveries.resolve")
        with pytest.raises(ServerError):
            await may_push(client, ada)


class Lagging(Foreign):
    """A service of other rules, of which one server decides on what was before.

    Attributes:
        past: Documents of before.
        times: How many decisions that server makes.
    """

    def __init__(self, fake: FakeUserService) -> None:
        super().__init__(fake, b'"rules":1', b'"rules":2')
        self.past: dict[str, User | None] = {}
        self.times = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await super().handle_async_request(request)
        if "/deliveries" not in request.url.path or not self.times:
            return answer
        self.times -= 1
        ids = msgspec.json.decode(request.content)["user_ids"]
        decisions = [
            decide(self.past[user_id], "push", self.fake.clock.now(), user_id=user_id)
            for user_id in reversed(ids)
            if user_id in self.past
        ]
        return httpx.Response(200, content=envelope(decisions))


@pytest.fixture
def lagging(fake: FakeUserService, ada: User) -> Lagging:
    """A server that has not heard yet that Ada wants no pushes any more."""
    made = Lagging(fake)
    made.past[ada.id] = ada
    fake.update_preferences(ada.id, push=False)
    return made


async def test_what_is_decided_on_an_older_version_is_asked_again(
    fake: FakeUserService, lagging: Lagging, ada: User
) -> None:
    """Here the newer version is held; only who was decided on too early is asked for again."""
    bob = fake.user()
    lagging.past[bob.id] = bob
    lagging.times = 2
    async with client_of(lagging) as client:
        began = fake.clock.monotonic()
        decisions = await client.deliveries.resolve([ada.id, bob.id], channel="push")
        assert [one.reason for one in decisions] == ["channel_opted_out", "no_active_device"]
        assert [one.user_id for one in decisions] == [ada.id, bob.id]
        assert lagging.requests == {"users.get_many": 1, "deliveries.resolve": 3}
        body = fake.requests[-1].body
        assert isinstance(body, dict)
        assert body["user_ids"] == [ada.id]
        assert fake.clock.monotonic() - began == pytest.approx(0.15)


async def test_what_is_heard_of_while_the_service_decides_is_asked_again(
    fake: FakeUserService, ada: User
) -> None:
    network = Lagging(fake)
    async with client_of(network, live=True) as client:
        held = network.hold("deliveries.resolve")
        asking = asyncio.create_task(may_push(client, ada))
        await held.arrived()
        fake.update_preferences(ada.id, push=False)
        await fake.clock.advance(0)
        held.release()
        assert await asking == "channel_opted_out"


async def test_a_service_that_lags_for_long_decides_nothing(lagging: Lagging, ada: User) -> None:
    lagging.times = 3
    async with client_of(lagging) as client:
        with pytest.raises(DecodeError, match="outdated"):
            await may_push(client, ada)
        assert lagging.requests == {"users.get": 1, "deliveries.resolve": 3}
        assert await may_push(client, ada) == "channel_opted_out"
        assert lagging.requests["users.get"] == 2, "the copy may be of an epoch that has ended"


async def test_who_is_gone_meanwhile_is_decided_on(
    fake: FakeUserService, lagging: Lagging, ada: User
) -> None:
    async with client_of(lagging) as client:
        await client.users.get(ada.id)
        fake.delete_user(ada.id)
        assert await may_push(client, ada) == "user_not_found"


async def test_whom_the_service_leaves_out_nothing_is_decided_of(
    lagging: Lagging, ada: User
) -> None:
    lagging.past.clear()
    lagging.times = 3
    async with client_of(lagging) as client:
        with pytest.raises(DecodeError):
            await may_push(client, ada)


async def test_versions_of_another_epoch_are_no_floor(fake: FakeUserService, ada: User) -> None:
    """After a restore of the service's database, versions are lower than before."""
    network = Lagging(fake)
    network.past[ada.id] = msgspec.structs.replace(ada, version=ada.version - 1)
    network.times = 1
    async with client_of(network, live=True) as client:
        held = network.hold("deliveries.resolve")
        asking = asyncio.create_task(may_push(client, ada))
        await held.arrived()
        fake.renew_epoch()
        await fake.clock.advance(1)
        held.release()
        assert await asking == "allowed"
        assert network.requests["deliveries.resolve"] == 1


async def test_a_call_has_one_deadline_for_reading_and_asking(
    fake: FakeUserService, ada: User
) -> None:
    async with client_of(Foreign(fake, b'"rules":1', b'"rules":2')) as client:
        fake.delay(3, route="users.get")
        fake.delay(3, route="deliveries.resolve")
        began = fake.clock.monotonic()
        with pytest.raises(UserServiceError):
            await may_push(client, ada, timeout=4)
        assert fake.clock.monotonic() - began <= 4.1


async def test_a_document_of_other_rules_is_not_decided_by_decide(
    client: UserServiceClient, ada: User
) -> None:
    with pytest.raises(UnknownRules):
        client.deliveries.decide(msgspec.structs.replace(ada, rules=2), channel="push")


# Without a call


async def test_decide_is_local_and_says_the_same(
    fake: FakeUserService, network: Network, client: UserServiceClient, ada: User
) -> None:
    until = fake.clock.now() + timedelta(hours=1)
    muted = fake.update_preferences(ada.id, muted_until=until)
    for asked in ({}, {"priority": "urgent"}, {"explain": True}, {"app": "shop"}, {"at": until}):
        said: dict[str, Any] = asked
        here = client.deliveries.decide(muted, channel="push", **said)
        assert network.requests == {}
        assert here == await client.deliveries.resolve(ada.id, channel="push", **said)
        fake.requests.clear()
        client.cache.clear()


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"channel": "sms"}, "channel"),
        ({"priority": "loud"}, "priority"),
        ({"category": "Not a name"}, "category"),
        ({"category": "sport"}, "category"),
        ({"category": "news", "priority": "critical"}, "priority"),
        ({"priority": "critical"}, "priority"),
        ({"app": " "}, "app"),
        ({"at": datetime(2026, 1, 1)}, "at"),  # noqa: DTZ001
    ],
)
async def test_a_senders_mistake_is_invalid(asked: dict[str, Any], field: str) -> None:
    catalogue = Catalogue.parse('{"news": {"email": "on", "push": "on"}}')
    fake = FakeUserService(categories=catalogue)
    ada = fake.user(devices=[("token", "ios")])
    said = {"channel": "push"} | asked
    async with client_of(Network(fake)) as client:
        for resolve in (
            client.deliveries.resolve(ada.id, **said),
            client.deliveries.resolve([NOBODY, ada.id], **said),
        ):
            with pytest.raises(Invalid) as refused:
                await resolve
            assert refused.value.code == "validation_failed"
            assert [detail.field for detail in refused.value.details] == [field]
        with pytest.raises(Invalid) as refused:
            client.deliveries.decide(ada, **said)
        assert [detail.field for detail in refused.value.details] == [field]
    assert [one.operation for one in fake.requests].count("deliveries.resolve") == 0


# Feedback


async def test_2500_reports_are_3_requests_with_keys_of_their_own(
    fake: FakeUserService, network: Network, client: UserServiceClient, ada: User
) -> None:
    now = fake.clock.now()
    items = [PushFeedback(token=f"t{n}", reason="unregistered", at=now) for n in range(2500)]
    items[1500] = PushFeedback(token="a token", reason="expired", at=now)
    for _ in range(2):  # a task that is repeated is told the same
        results = await client.feedback.report(iter(items), idempotency_key="task-1")
        assert [one.result for one in results] == [
            "applied" if number == 1500 else "unknown" for number in range(2500)
        ]
    assert network.requests == {"feedback.report": 6}
    keys = ["task-1", "task-1.1", "task-1.2"]
    assert network.sent("Idempotency-Key") == keys * 2
    assert fake.feedback == items, "once"
    assert fake.document(ada.id).version == 3


@pytest.mark.parametrize("length", [252, 253, 254, 255])
async def test_keys_of_further_requests_are_no_longer_than_a_key_may_be(
    fake: FakeUserService, network: Network, client: UserServiceClient, length: int
) -> None:
    item = PushFeedback(token="t", reason="unregistered", at=fake.clock.now())
    key, other = "k" * length, "k" * (length - 1) + "l"
    for used in (key, key, other):
        await client.feedback.report([item] * 2500, idempotency_key=used)
    sent = network.sent("Idempotency-Key")
    assert sent[0] == key
    assert all(len(one or "") <= 255 for one in sent)
    assert sent[:3] == sent[3:6], "a repeat has the same"
    assert len(set(sent)) == 6, "each request has its own"
    assert len(fake.feedback) == 5000


async def test_reports_without_a_key_are_writes_of_their_own(
    fake: FakeUserService, network: Network, client: UserServiceClient
) -> None:
    item = PushFeedback(token="t", reason="unregistered", at=fake.clock.now())
    fake.drop(route="feedback.report", times=1)
    await client.feedback.report([item] * 1500)
    first, again, second = network.sent("Idempotency-Key")
    assert first == again != second
    assert len(fake.feedback) == 1500, "what was sent twice is taken once"


async def test_no_reports_are_no_request(network: Network, client: UserServiceClient) -> None:
    assert await client.feedback.report([]) == ()
    assert network.requests == {}


async def test_a_brake_is_a_limit(fake: FakeUserService, client: UserServiceClient) -> None:
    item = PushFeedback(token="t", reason="unregistered", at=fake.clock.now())
    fake.fail(status=429, retry_after=1800, route="feedback.report")
    with pytest.raises(RateLimited) as refused:
        await client.feedback.report([item])
    assert refused.value.retry_after == 1800
    assert fake.feedback == []
