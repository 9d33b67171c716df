"""The service dies below a worker: each row of the table of ages, and what comes when it is back.

On a virtual clock; the service takes no connections, and comes back.
"""

from __future__ import annotations

import asyncio

import pytest
from user_service_client import CacheOptions, User, UserServiceClient, UserServiceError, _cache
from user_service_client._cache import Use, Wish
from user_service_client._calls import CallOptions
from user_service_client.testing import FakeUserService

from .network import NOBODY, Network, client_of, ids_of

USERS = 5_000


async def read(
    client: UserServiceClient, user_id: str, use: Use, max_stale: float | None = None
) -> User:
    """Read a user for a use that has no method yet."""
    wish = Wish(use, client._calls.deadline(None), max_stale, CallOptions())
    return (await client._documents.read(user_id, wish)).user


async def passes(client: UserServiceClient, network: Network, user: User, use: Use) -> str:
    """Read a user, and say how that ended: from the copy, after asking, or not at all."""
    asked = network.requests.total()
    try:
        await read(client, user.id, use)
    except UserServiceError:
        return "raises"
    asks = network.requests.total() > asked
    await network.fake.clock.advance(0)
    behind = network.requests.total() > asked and not asks
    return "asks first" if asks else "asks behind" if behind else "copy"


# The table of ages, while the service is there


@pytest.mark.parametrize(
    ("use", "age", "expected"),
    [
        (Use.READ, 26.9, "copy"),
        (Use.READ, 30, "asks behind"),
        (Use.READ, 300, "asks behind"),
        (Use.READ, 300.1, "asks first"),
        (Use.DECISION, 26.9, "copy"),
        (Use.DECISION, 30, "asks first"),
        (Use.CRITICAL, 0, "asks first"),
    ],
)
async def test_ages_without_a_stream(
    network: Network, client: UserServiceClient, use: Use, age: float, expected: str
) -> None:
    user = await client.users.get(network.fake.user().id)
    await network.fake.clock.advance(age)
    assert await passes(client, network, user, use) == expected


@pytest.mark.parametrize(
    ("use", "expected"),
    [(Use.READ, "copy"), (Use.DECISION, "copy"), (Use.CRITICAL, "asks first")],
)
async def test_ages_with_a_live_and_complete_stream(
    network: Network, live: UserServiceClient, use: Use, expected: str
) -> None:
    user = await live.users.get(network.fake.user().id)
    await network.fake.clock.advance(3600)
    assert live.status.is_complete
    assert await passes(live, network, user, use) == expected


@pytest.mark.parametrize(
    ("use", "stalled", "expected"),
    [
        (Use.READ, 29, "copy"),
        (Use.READ, 31, "asks behind"),
        (Use.READ, 300, "asks behind"),
        (Use.READ, 302, "asks first"),
        (Use.DECISION, 29, "copy"),
        (Use.DECISION, 31, "asks first"),
        (Use.CRITICAL, 1, "asks first"),
    ],
)
async def test_ages_with_a_stream_that_has_stalled_while_its_heart_beats(
    network: Network, live: UserServiceClient, use: Use, stalled: float, expected: str
) -> None:
    user = await live.users.get(network.fake.user().id)
    await network.fake.clock.advance(600 - 2)  # up to a heartbeat: the stall begins with it
    await network.fake.clock.advance(2)
    network.fake.stall_feed()
    await network.fake.clock.advance(stalled)
    assert live.status.is_complete is (stalled < 30)
    assert await passes(live, network, user, use) == expected


# The table of ages, while the service is not there


@pytest.mark.parametrize(
    ("use", "age", "expected"),
    [
        (Use.READ, 20, "copy"),
        (Use.READ, 299, "asks behind"),
        (Use.READ, 301, "raises"),
        (Use.DECISION, 20, "copy"),
        (Use.DECISION, 299, "asks first"),
        (Use.DECISION, 301, "raises"),
        (Use.CRITICAL, 1, "raises"),
    ],
)
async def test_ages_without_the_service(
    network: Network, client: UserServiceClient, use: Use, age: float, expected: str
) -> None:
    user = await client.users.get(network.fake.user().id)
    network.fake.refuse_connections()
    await network.fake.clock.advance(age)
    assert await passes(client, network, user, use) == expected


@pytest.mark.parametrize(("use", "copy"), [(Use.READ, True), (Use.CRITICAL, False)])
async def test_ages_of_a_live_client_without_the_service_count_from_the_end_of_the_stream(
    network: Network, live: UserServiceClient, use: Use, copy: bool
) -> None:
    user = await live.users.get(network.fake.user().id)
    await network.fake.clock.advance(3600)
    network.fake.refuse_connections()
    await network.fake.clock.advance(280)
    ended = await passes(live, network, user, use)
    assert ended == ("asks behind" if copy else "raises")
    await network.fake.clock.advance(40)
    assert await passes(live, network, user, use) == "raises"


async def test_who_says_how_old_a_copy_may_be_is_heeded(
    network: Network, client: UserServiceClient
) -> None:
    user = await client.users.get(network.fake.user().id)
    network.fake.refuse_connections()
    await network.fake.clock.advance(100)
    with pytest.raises(UserServiceError):
        await client.users.get(user.id, max_stale=60)
    await network.fake.clock.advance(3600)
    assert await client.users.get(user.id, max_stale=7200) == user
    assert (await client.users.get_many([user.id], max_stale=7200)).users == (user,)


async def test_an_unknown_id_is_not_made_up_from_nothing(
    network: Network, client: UserServiceClient
) -> None:
    network.fake.refuse_connections()
    with pytest.raises(UserServiceError):
        await client.users.get(NOBODY)


# A worker that reads 5,000 users, before, during and after


def a_crowd(network: Network, count: int) -> list[User]:
    return [network.fake.user() for _ in range(count)]


@pytest.mark.parametrize("bound", ["REFRESHES_AT_ONCE", "REFRESHES_A_SECOND"])
async def test_a_large_batch_of_old_copies_is_revalidated_as_far_as_there_is_room(
    network: Network, client: UserServiceClient, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """What a service is spared counts in requests, and `get_many` makes several at once."""
    ids = ids_of(a_crowd(network, 3500))
    await client.users.get_many(ids)
    await network.fake.clock.advance(60)
    network.fake.requests.clear()
    monkeypatch.setattr(_cache, bound, 3)
    await client.users.get_many(ids)
    await network.fake.clock.advance(0)
    assert network.requests == {"users.get_many": 3}
    await network.fake.clock.advance(1)
    await client.users.get_many(ids)
    await network.fake.clock.advance(0)
    assert network.requests == {"users.get_many": 4}


@pytest.mark.parametrize("is_live", [False, True])
async def test_an_outage_below_a_worker_and_no_stampede_when_it_is_over(is_live: bool) -> None:
    network = Network(FakeUserService())
    clock = network.fake.clock
    users = a_crowd(network, USERS)
    ids = ids_of(users)
    async with client_of(
        network, live=is_live, cache=CacheOptions(max_documents=USERS * 2)
    ) as client:
        for start in range(0, USERS, 1000):
            await client.users.get_many(ids[start : start + 1000])
        network.fake.refuse_connections()
        network.fake.requests.clear()
        await clock.advance(200)
        for _ in range(2):
            assert [await client.users.get(user_id) for user_id in ids] == users
            await clock.advance(10)
        during = network.requests.total()
        assert during < 150, "the breaker is open, and lets a probe through now and then"
        changed = network.fake.update_preferences(ids[0], push=False)
        network.fake.accept_connections()
        network.fake.requests.clear()
        second = clock.monotonic()
        seen = set()
        while clock.monotonic() < second + 1:
            seen = {user.version for user in await asyncio.gather(*map(client.users.get, ids))}
            await clock.advance(0.25)
        assert seen <= {1, 2}
        first_second = network.requests.total()
        print(f"\nrequests in the first second: {first_second}, while it lasted: {during}")  # noqa: T201
        assert first_second <= 250
        assert network.most_at_once <= 32
        while await client.users.get(ids[0]) != changed:
            await clock.advance(1)
            assert clock.monotonic() < second + 30, "5,000 at 200 a second, in whatever order"
            await asyncio.gather(*map(client.users.get, ids))
        if is_live:
            await clock.advance(30)
            assert client.status.is_complete
