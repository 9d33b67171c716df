"""The client's own copies: which read makes a request, and what ends a copy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from user_service_client import (
    CacheOptions,
    DeadlineExceeded,
    Invalid,
    NotFound,
    NotSent,
    ServerError,
    User,
    UserServiceClient,
    UserServiceError,
    VersionMismatch,
    deadline_scope,
)
from user_service_client._cache import Use, Wish
from user_service_client._calls import CallOptions
from user_service_client.testing import FakeUserService

from .network import NOBODY, Network, client_of, ids_of


async def critical(client: UserServiceClient, user_id: str) -> User:
    """Read a user as a delivery that must not fail does."""
    wish = Wish(Use.CRITICAL, client._calls.deadline(None), None, CallOptions())
    return (await client._documents.read(user_id, wish)).user


# One flight for many readers


async def test_ten_thousand_reads_of_ten_cold_ids_are_ten_requests(
    network: Network, client: UserServiceClient
) -> None:
    users = [network.fake.user() for _ in range(10)]
    reads = [client.users.get(users[number % 10].id) for number in range(10_000)]
    assert await asyncio.gather(*reads) == users * 1000
    assert network.requests == {"users.get": 10}
    assert client.cache.stats.misses == 10_000


async def test_followers_get_the_document_when_the_leader_is_cancelled(
    network: Network, client: UserServiceClient
) -> None:
    user, held = network.fake.user(), network.hold("users.get")
    leader = asyncio.create_task(client.users.get(user.id))
    await held.arrived()
    followers = [asyncio.create_task(client.users.get(user.id)) for _ in range(5)]
    await asyncio.sleep(0)
    leader.cancel()
    await asyncio.wait([leader])
    held.release()
    assert await asyncio.gather(*followers) == [user] * 5
    assert leader.cancelled()
    assert network.requests == {"users.get": 1}


async def test_what_comes_for_a_cancelled_reader_is_kept(
    network: Network, client: UserServiceClient
) -> None:
    user, held = network.fake.user(), network.hold("users.get")
    reader = asyncio.create_task(client.users.get(user.id))
    await held.arrived()
    reader.cancel()
    await asyncio.wait([reader])
    held.release()
    await network.fake.clock.advance(0)
    assert await client.users.get(user.id) == user
    assert network.requests == {"users.get": 1}


async def test_a_follower_with_a_shorter_deadline_gives_up_alone(
    network: Network, client: UserServiceClient
) -> None:
    user, held = network.fake.user(), network.hold("users.get")
    leader = asyncio.create_task(client.users.get(user.id))
    await held.arrived()
    with pytest.raises(DeadlineExceeded):
        await client.users.get(user.id, timeout=0.01)
    held.release()
    assert await leader == user
    assert network.requests == {"users.get": 1}


async def test_a_follower_with_a_longer_deadline_makes_the_flight_last(network: Network) -> None:
    """On the real clock: the flight was to end after 0.5 s, and then is tried again."""
    user, held = network.fake.user(), network.hold("users.get")
    async with UserServiceClient("http://users.test", transport=network) as client:
        leader = asyncio.create_task(client.users.get(user.id, timeout=0.5))
        await held.arrived()
        follower = asyncio.create_task(client.users.get(user.id, timeout=30))
        # The leader's time is up when the flight is tried again: either may be first.
        await asyncio.gather(leader, return_exceptions=True)
        assert await follower == user


async def test_what_followers_try_again_lasts_as_long_as_the_most_patient_of_them() -> None:
    """On the real clock: one by one, each with its own deadline, they would ask 20 times."""
    asked = 0

    async def never(_request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async with UserServiceClient("http://h", transport=httpx.MockTransport(never)) as client:
        seconds = [0.1 + 0.02 * number for number in range(20)]
        reads = [client.users.get(NOBODY, timeout=timeout) for timeout in seconds]
        ended = await asyncio.gather(*reads, return_exceptions=True)
    assert {type(error) for error in ended} == {DeadlineExceeded}
    assert asked == 2


async def test_who_joins_a_batch_is_not_refused_for_what_others_have_asked(
    network: Network, client: UserServiceClient
) -> None:
    user, held = network.fake.user(), network.hold("users.get_many")
    batch = asyncio.create_task(client.users.get_many([user.id, "no id"]))
    await held.arrived()
    one = asyncio.create_task(client.users.get(user.id))
    same = asyncio.create_task(client.users.get_many(["no id", user.id]))
    await asyncio.sleep(0)
    held.release()
    assert await one == user
    for refused in (batch, same):
        with pytest.raises(Invalid):
            await refused
    assert network.requests == {"users.get_many": 1, "users.get": 1}


async def test_a_failure_is_shared_and_not_kept(
    network: Network, client: UserServiceClient
) -> None:
    user = network.fake.user()
    network.fake.fail(status=503, times=3, route="users.get")
    ended = await asyncio.gather(
        *(client.users.get(user.id) for _ in range(100)), return_exceptions=True
    )
    assert {type(error) for error in ended} == {ServerError}
    assert network.requests == {"users.get": 3}, "one flight, and its two retries"
    assert await client.users.get(user.id) == user


async def test_reads_with_options_of_their_own_are_not_shared(
    network: Network, client: UserServiceClient
) -> None:
    user = network.fake.user()
    await asyncio.gather(*(client.users.get(user.id, headers={"X-Mine": "1"}) for _ in range(3)))
    assert network.requests == {"users.get": 3}


async def test_a_critical_read_does_not_join_one_from_before(
    network: Network, client: UserServiceClient
) -> None:
    user, held = network.fake.user(), network.hold("users.get")
    leader = asyncio.create_task(client.users.get(user.id))
    await held.arrived()
    changed = network.fake.update_preferences(user.id, push=False)
    assert await critical(client, user.id) == changed
    held.release()
    await leader


async def test_who_waits_when_the_client_is_closed_is_told_so(network: Network) -> None:
    user, held = network.fake.user(), network.hold("users.get", 2)
    async with client_of(network) as client:
        readers = [
            asyncio.create_task(client.users.get(user.id)),
            asyncio.create_task(client.users.get(user.id, retries=0)),
        ]
        await held.arrived()
    ended = await asyncio.gather(*readers, return_exceptions=True)
    assert all(isinstance(error, UserServiceError) for error in ended), ended
    left = {task.get_name() for task in asyncio.all_tasks()}
    assert "user-service-fetch" not in left


# What ends a copy that is on its way

Invalidation = Callable[[FakeUserService, UserServiceClient, User], None]
INVALIDATIONS: dict[str, Invalidation] = {
    "invalidate": lambda _fake, client, user: client.cache.invalidate(user.id),
    "clear": lambda _fake, client, _user: client.cache.clear(),
}


@pytest.mark.parametrize("how", sorted(INVALIDATIONS))
@pytest.mark.parametrize(
    "read",
    ["get", "get_own", "get_many", "get_with_etag", "get_after_critical"],
)
async def test_a_fill_that_an_invalidation_has_overtaken_is_not_kept(
    network: Network, client: UserServiceClient, how: str, read: str
) -> None:
    fake, user = network.fake, network.fake.user()
    held = network.hold("users.get_many" if read == "get_many" else "users.get")
    reader: asyncio.Task[object]
    if read == "get_own":
        reader = asyncio.create_task(client.users.get(user.id, retries=0))
    elif read == "get_many":
        reader = asyncio.create_task(client.users.get_many([user.id]))
    elif read == "get_with_etag":
        reader = asyncio.create_task(client.users.get_with_etag(user.id))
    else:
        reader = asyncio.create_task(client.users.get(user.id))
    await held.arrived()
    readers = [reader]
    other = network.hold("users.get")
    if read == "get_after_critical":
        # It takes the place of the first, and is overtaken, too.
        readers.append(asyncio.create_task(critical(client, user.id)))
        await other.arrived()
    changed = fake.update_preferences(user.id, push=False)
    INVALIDATIONS[how](fake, client, user)
    held.release()
    other.release()
    await asyncio.gather(*readers)
    assert client.users.peek(user.id) is None
    assert await client.users.get(user.id) == changed


@pytest.mark.parametrize("read", ["get", "get_many"])
async def test_that_nobody_has_an_id_is_not_remembered_when_an_invalidation_has_overtaken_it(
    network: Network, client: UserServiceClient, read: str
) -> None:
    user = network.fake.user()
    network.fake.delete_user(user.id)
    held = network.hold(f"users.{read}")
    reader: asyncio.Task[object] = (
        asyncio.create_task(client.users.get(user.id))
        if read == "get"
        else asyncio.create_task(client.users.get_many([user.id]))
    )
    await held.arrived()
    client.cache.invalidate(user.id)
    held.release()
    await asyncio.wait([reader])
    reader.exception()
    asked = network.requests.total()
    with pytest.raises(NotFound):
        await client.users.get(user.id)
    assert network.requests.total() == asked + 1


async def test_a_revalidation_that_two_invalidations_have_overtaken_ends_well(
    network: Network, client: UserServiceClient
) -> None:
    user = network.fake.user()
    await client.users.get(user.id)
    await network.fake.clock.advance(301)
    held = network.hold("users.get")
    reader = asyncio.create_task(client.users.get(user.id))
    await held.arrived()
    client.cache.invalidate(user.id)
    assert await client.users.get(user.id) == user, "kept again, before the 304 arrives"
    held.release()
    assert await reader == user


async def test_an_invalidation_ends_one_copy_of_a_batch_and_not_the_others(
    network: Network, client: UserServiceClient
) -> None:
    users = [network.fake.user() for _ in range(3)]
    held = network.hold("users.get_many")
    reader = asyncio.create_task(client.users.get_many(ids_of(users)))
    await held.arrived()
    client.cache.invalidate(users[1].id)
    held.release()
    await reader
    kept = [client.users.peek(user.id) is not None for user in users]
    assert kept == [True, False, True]


async def test_ten_thousand_invalidations_later_a_fill_is_still_overtaken(
    network: Network, client: UserServiceClient
) -> None:
    user, held = network.fake.user(), network.hold("users.get")
    reader = asyncio.create_task(client.users.get(user.id))
    await held.arrived()
    client.cache.invalidate(user.id)
    for number in range(10_001):
        client.cache.invalidate(f"other-{number}")
    held.release()
    await reader
    assert client.users.peek(user.id) is None


async def test_a_fill_that_a_write_has_overtaken_is_not_kept(
    network: Network, client: UserServiceClient
) -> None:
    user, held = network.fake.user(), network.hold("users.get")
    reader = asyncio.create_task(client.users.get(user.id))
    await held.arrived()
    await client.preferences.update(user.id, push=False)
    held.release()
    assert (await reader).preferences.push is False, "it asks again, and not below that version"
    assert network.sent("X-Min-Version") == [None, None, "2"]


async def test_a_fill_that_an_event_has_overtaken_is_not_kept(
    network: Network, live: UserServiceClient
) -> None:
    user, held = network.fake.user(), network.hold("users.get")
    reader = asyncio.create_task(live.users.get(user.id))
    await held.arrived()
    changed = network.fake.update_preferences(user.id, push=False)
    await network.fake.clock.advance(0)
    held.release()
    assert await reader == changed
    assert await live.users.get(user.id) == changed
    assert live.cache.stats.overtaken == 1


@pytest.mark.parametrize("read", ["get", "get_many"])
async def test_a_fill_of_the_epoch_before_is_not_kept(
    network: Network, client: UserServiceClient, read: str
) -> None:
    user, other = network.fake.user(), network.fake.user()
    await client.users.get(other.id)
    held = network.hold(f"users.{read}")
    reader: asyncio.Task[object] = (
        asyncio.create_task(client.users.get(user.id))
        if read == "get"
        else asyncio.create_task(client.users.get_many([user.id]))
    )
    await held.arrived()
    network.fake.renew_epoch()
    await client.users.get_with_etag(other.id)
    held.release()
    await reader
    entry = client.users.peek(user.id)
    assert entry is not None, "it was asked for again"
    assert entry.epoch == client._documents.epoch


async def test_who_joins_a_batch_gets_nothing_older_than_what_was_heard_of(
    network: Network, live: UserServiceClient
) -> None:
    """A batch of which one user is asked for again has long had the answer about the others."""
    first, second = network.fake.user(), network.fake.user()
    batch, again = network.hold("users.get_many"), network.hold("users.get")
    reader = asyncio.create_task(live.users.get_many([first.id, second.id]))
    await batch.arrived()
    network.fake.update_preferences(second.id, push=False)
    await network.fake.clock.advance(0)
    batch.release()
    await again.arrived()
    changed = network.fake.update_preferences(first.id, push=False)
    await network.fake.clock.advance(0)
    late = asyncio.create_task(live.users.get(first.id))
    await network.fake.clock.advance(0)
    again.release()
    assert await late == changed
    await reader


async def test_nothing_goes_on_when_one_of_a_batch_that_is_asked_for_again_fails(
    network: Network, live: UserServiceClient
) -> None:
    """Nobody would wait for it, and nobody would end it."""
    first, second = network.fake.user(), network.fake.user()
    batch, before = network.hold("users.get_many"), asyncio.all_tasks()
    reader = asyncio.create_task(live.users.get_many([first.id, second.id], retries=0))
    await batch.arrived()
    for user in (first, second):
        network.fake.update_preferences(user.id, push=False)
    await network.fake.clock.advance(0)
    again = network.hold("users.get")
    network.fake.fail(status=503, times=1, route="users.get")
    batch.release()
    await again.arrived()
    assert not reader.done()
    again.release()
    with pytest.raises(ServerError):
        await reader
    assert asyncio.all_tasks() == before


async def test_a_reader_whose_client_is_closed_before_anything_was_asked_is_told_so(
    network: Network,
) -> None:
    """A task that is cancelled before its first step never comes to what it does at its end."""
    user = network.fake.user()
    async with client_of(network) as client:
        reader = asyncio.create_task(client.users.get(user.id))
        await asyncio.sleep(0)  # the request has a task, which has not begun
        assert network.requests == {}
    with pytest.raises(NotSent):
        await reader
    assert network.requests == {}


async def test_who_comes_in_the_turn_in_which_a_flight_ends_gets_nothing_older_than_heard_of(
    network: Network, client: UserServiceClient
) -> None:
    """The flight has ended, and was not tidied up: a version is heard of, and somebody reads."""
    user, held = network.fake.user(), network.hold("users.get")
    reader = asyncio.create_task(client.users.get(user.id))
    await held.arrived()
    (flight,) = (task for task in asyncio.all_tasks() if task.get_name() == "user-service-fetch")
    changed = network.fake.update_preferences(user.id, push=False)
    held.release()
    while not flight.done():  # noqa: ASYNC110 - the very turn in which it ends
        await asyncio.sleep(0)
    client._documents.heard_of(user.id, changed.version, network.fake._directory.epoch)
    assert await client.users.get(user.id) == changed
    await reader


async def test_a_user_who_changes_with_every_request_can_be_read(
    network: Network, live: UserServiceClient
) -> None:
    user = network.fake.user()
    held = [network.hold("users.get") for _ in range(4)]
    reader = asyncio.create_task(live.users.get(user.id))
    for number, one in enumerate(held[:3]):
        await one.arrived()
        network.fake.update_preferences(user.id, push=bool(number % 2))
        await network.fake.clock.advance(0)
        one.release()
    assert (await reader).version == 3, "what it was when it was asked the last time"
    held[3].release()
    assert live.users.peek(user.id) is None


# Floors: what was heard of


async def test_a_server_that_lags_does_not_bring_back_what_an_event_has_ended(
    network: Network, live: UserServiceClient
) -> None:
    user = await live.users.get(network.fake.user().id)
    network.lag(user)
    changed = network.fake.update_preferences(user.id, push=False)
    await network.fake.clock.advance(0)
    assert live.users.peek(user.id) is None
    assert await live.users.get(user.id) == changed
    assert network.sent("X-Min-Version")[-1] == "2"


async def test_a_server_that_lags_is_told_the_version_of_who_was_not_cached_either(
    network: Network, live: UserServiceClient
) -> None:
    user = network.fake.user()
    network.lag(user)
    changed = network.fake.update_preferences(user.id, push=False)
    await network.fake.clock.advance(0)
    assert await live.users.get(user.id) == changed
    assert (await live.users.get_many([user.id])).users == (changed,)


async def test_a_batch_of_a_server_that_lags_is_asked_again_for_who_has_changed(
    network: Network, live: UserServiceClient
) -> None:
    users = [network.fake.user() for _ in range(3)]
    network.lag(*users)
    changed = network.fake.update_preferences(users[1].id, push=False)
    await network.fake.clock.advance(0)
    read = await live.users.get_many(ids_of(users))
    assert read.users == (users[0], changed, users[2])
    assert network.requests == {"users.get_many": 1, "users.get": 1}


async def test_a_server_that_lags_does_not_answer_for_a_write_of_this_client(
    network: Network, client: UserServiceClient
) -> None:
    user = network.fake.user()
    network.lag(user)
    await client.preferences.update(user.id, push=False)
    assert (await client.users.get(user.id)).preferences.push is False
    await client.devices.register(user.id, token="t", platform="ios")
    read, _ = await client.users.get_with_etag(user.id)
    assert len(read.devices) == 1, "nor past the cache"
    await client.preferences.get(user.id)
    await client.devices.list(user.id)
    assert network.sent("X-Min-Version")[-3:] == ["3"] * 3


async def test_an_older_answer_does_not_replace_a_newer_copy(
    network: Network, client: UserServiceClient
) -> None:
    user = network.fake.user()
    network.lag(user)
    held = network.hold("users.get")
    reader = asyncio.create_task(client.users.get(user.id))
    await held.arrived()
    network.catch_up()
    changed = network.fake.update_preferences(user.id, push=False)
    assert await client.users.get(user.id, retries=0) == changed
    held.release()
    assert await reader == changed
    entry = client.users.peek(user.id)
    assert entry is not None
    assert entry.user == changed


async def test_a_server_that_has_not_heard_of_a_new_epoch_is_believed_and_not_kept(
    network: Network, client: UserServiceClient
) -> None:
    user, other = network.fake.user(), network.fake.user()
    await client.users.get(user.id)
    network.lag(user)
    network.fake.renew_epoch()
    await client.users.get(other.id)
    assert await client.users.get(user.id) == user, "200, and no 304 that nobody would believe"
    network.catch_up()
    await client.users.get(user.id)
    entry = client.users.peek(user.id)
    assert entry is not None
    assert entry.epoch == client._documents.epoch


# Batches


async def test_a_batch_asks_once_for_all_that_is_lacking(
    network: Network, client: UserServiceClient
) -> None:
    fake = network.fake
    old, fresh, flying, cold, gone = (fake.user() for _ in range(5))
    fake.delete_user(gone.id)
    await client.users.get(old.id)
    await fake.clock.advance(31)
    await client.users.get(fresh.id)
    with pytest.raises(NotFound):
        await client.users.get(gone.id)
    held = network.hold("users.get")
    reader = asyncio.create_task(client.users.get(flying.id))
    await held.arrived()
    fake.requests.clear()
    batch = asyncio.create_task(
        client.users.get_many(
            [cold.id, gone.id, NOBODY, flying.id, old.id, cold.id, fresh.id, NOBODY.upper()]
        )
    )
    await fake.clock.advance(0)
    held.release()
    read = await batch
    assert read.users == (cold, flying, old, fresh)
    assert read.missing == (gone.id, NOBODY)
    await reader
    bodies = [asked.body for asked in fake.requests]
    assert sorted(map(str, bodies)) == sorted(
        map(str, [{"ids": [cold.id, NOBODY]}, {"ids": [old.id]}])
    ), "and the old one is revalidated in the background"


async def test_a_batch_of_fresh_copies_asks_for_nothing(
    network: Network, client: UserServiceClient
) -> None:
    users = tuple(network.fake.user() for _ in range(3))
    await client.users.get_many(ids_of(users))
    assert (await client.users.get_many(reversed(ids_of(users)))).users == users[::-1]
    assert network.requests == {"users.get_many": 1}


async def test_more_than_a_thousand_are_several_batches_four_at_a_time(
    network: Network, client: UserServiceClient
) -> None:
    ids = [f"01a205c7-a743-7a16-a135-{number:012x}" for number in range(5001)]
    user = network.fake.user()
    read = await client.users.get_many([*ids, user.id])
    assert (read.users, len(read.missing)) == ((user,), 5001)
    assert network.requests == {"users.get_many": 6}
    assert network.most_at_once == 4


async def test_documents_of_a_batch_are_revalidated_by_their_tags(
    network: Network, client: UserServiceClient
) -> None:
    user = network.fake.user()
    await client.users.get_many([user.id])
    await network.fake.clock.advance(301)
    assert await client.users.get(user.id) == user
    assert [asked.status for asked in network.fake.requests] == [200, 304]
    assert client.cache.stats.confirmed == 1


async def test_who_is_deleted_while_cached_is_missing(
    network: Network, live: UserServiceClient
) -> None:
    users = [network.fake.user() for _ in range(2)]
    await live.users.get_many(ids_of(users))
    network.fake.delete_user(users[0].id)
    await network.fake.clock.advance(0)
    read = await live.users.get_many(ids_of(users))
    assert (read.users, read.missing) == ((users[1],), (users[0].id,))


async def test_a_batch_after_many_deletions_asks_again_for_few_at_a_time(
    network: Network, live: UserServiceClient
) -> None:
    users = [network.fake.user() for _ in range(200)]
    for user in users:
        network.fake.delete_user(user.id)
    await network.fake.clock.advance(0)
    read = await live.users.get_many(ids_of(users))
    assert len(read.missing) == 200
    assert network.most_at_once <= 16


# Confirming


async def test_a_304_keeps_the_very_object(network: Network, client: UserServiceClient) -> None:
    user = await client.users.get(network.fake.user().id)
    await network.fake.clock.advance(301)
    again = await client.users.get(user.id)
    assert again is user, "nothing was decoded"
    entry = client.users.peek(user.id)
    assert entry is not None
    assert entry.age == 0


# Ids that nobody has


async def test_an_unknown_id_is_remembered_for_five_seconds(
    network: Network, client: UserServiceClient
) -> None:
    for _ in range(2):
        with pytest.raises(NotFound):
            await client.users.get(NOBODY)
    assert network.requests == {"users.get": 1}
    await network.fake.clock.advance(5)
    with pytest.raises(NotFound):
        await client.users.get(NOBODY)
    assert network.requests == {"users.get": 2}


async def test_an_unknown_id_is_forgotten_when_its_user_is_created(
    network: Network, live: UserServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network.fake._directory, "new_id", lambda: NOBODY)
    with pytest.raises(NotFound):
        await live.users.get(NOBODY)
    user = network.fake.user()
    await network.fake.clock.advance(0)
    assert await live.users.get(NOBODY) == user


async def test_who_is_created_while_nobody_is_found_is_found(
    network: Network, live: UserServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network.fake._directory, "new_id", lambda: NOBODY)
    held = network.hold("users.get")
    reader = asyncio.create_task(live.users.get(NOBODY))
    await held.arrived()
    user = network.fake.user()
    await network.fake.clock.advance(0)
    held.release()
    assert await reader == user


async def test_without_a_cache_an_unknown_id_is_not_remembered(network: Network) -> None:
    async with client_of(network, cache=None) as client:
        for _ in range(2):
            with pytest.raises(NotFound):
                await client.users.get(NOBODY)
    assert network.requests == {"users.get": 2}


# Writes


async def test_what_is_written_is_read_back(network: Network, client: UserServiceClient) -> None:
    created = await client.users.create(name="Ada", email="a@example.com", password="Correct-9-x")
    assert await client.users.get(created.id) == created
    renamed = await client.users.update(created.id, name="Grace")
    assert await client.users.get(created.id) == renamed
    assert network.requests == {"users.create": 1, "users.update": 1}, "their answers are kept"
    await client.preferences.update(created.id, push=False)
    assert (await client.users.get(created.id)).preferences.push is False
    device = await client.devices.register(created.id, token="t", platform="ios")
    assert (await client.users.get(created.id)).devices[0].id == device.id
    await client.devices.remove(created.id, device.id)
    assert (await client.users.get(created.id)).devices == ()


async def test_who_is_deleted_by_this_client_is_not_found(
    network: Network, client: UserServiceClient
) -> None:
    user = await client.users.get(network.fake.user().id)
    held = network.hold("users.get")
    reader = asyncio.create_task(client.users.get(user.id, headers={"X-Mine": "1"}))
    network.lag(user)
    await client.users.delete(user.id)
    held.release()
    await asyncio.wait([reader])
    reader.exception()
    with pytest.raises(NotFound):
        await client.users.get(user.id)
    await network.fake.clock.advance(6)
    with pytest.raises(NotFound):
        await client.users.get(user.id)


async def test_a_412_ends_a_stale_copy(network: Network, client: UserServiceClient) -> None:
    user = await client.users.get(network.fake.user().id)
    changed = network.fake.update_preferences(user.id, push=False)
    assert await client.users.get(user.id) == user
    with pytest.raises(VersionMismatch):
        await client.users.update(user.id, name="Too late", if_version=user.version)
    assert await client.users.get(user.id) == changed


async def test_a_412_that_does_not_tell_the_version_ends_the_copy_too(
    network: Network, client: UserServiceClient
) -> None:
    user = await client.users.get(network.fake.user().id)
    network.fake.fail(status=412, route="users.update")
    with pytest.raises(VersionMismatch):
        await client.users.update(user.id, name="Too late", if_version=user.version)
    assert client.users.peek(user.id) is None


@pytest.mark.parametrize("after_processing", [True, False])
async def test_a_write_of_which_nobody_knows_ends_the_copy(
    network: Network, client: UserServiceClient, after_processing: bool
) -> None:
    user = await client.users.get(network.fake.user().id)
    network.fake.drop(times=3, route="preferences.update", after_processing=after_processing)
    with pytest.raises(UserServiceError):
        await client.preferences.update(user.id, push=False)
    assert client.users.peek(user.id) is None
    assert (await client.users.get(user.id)).preferences.push is not after_processing


async def test_a_write_that_is_cancelled_ends_the_copy(
    network: Network, client: UserServiceClient
) -> None:
    user = await client.users.get(network.fake.user().id)
    held = network.hold("preferences.update")
    writer = asyncio.create_task(client.preferences.update(user.id, push=False))
    await held.arrived()
    writer.cancel()
    await asyncio.wait([writer])
    assert (await client.users.get(user.id)).preferences.push is False


async def test_the_answer_of_a_write_that_an_invalidation_has_overtaken_is_not_kept(
    network: Network, client: UserServiceClient
) -> None:
    user, held = network.fake.user(), network.hold("users.update")
    writer = asyncio.create_task(client.users.update(user.id, name="Ada"))
    await held.arrived()
    changed = network.fake.update_preferences(user.id, push=False)
    client.cache.invalidate(user.id)
    held.release()
    await writer
    assert await client.users.get(user.id) == changed


# The background


async def test_a_revalidation_in_the_background_has_a_deadline_of_its_own(
    network: Network, client: UserServiceClient
) -> None:
    user = await client.users.get(network.fake.user().id)
    await network.fake.clock.advance(31)
    held = network.hold("users.get")
    with deadline_scope(0.01):
        await client.users.get(user.id)
    await held.arrived()
    await asyncio.sleep(0.02)  # real: the scope is over
    held.release()
    await network.fake.clock.advance(0)
    entry = client.users.peek(user.id)
    assert entry is not None
    assert entry.age == 0
    assert network.requests == {"users.get": 2}


async def test_no_task_and_no_timer_stays_for_a_copy(
    network: Network, client: UserServiceClient
) -> None:
    # Each fresh, each at another time: none of them is waited for.
    loop = asyncio.get_running_loop()
    timers: list[object] = getattr(loop, "_scheduled")  # noqa: B009 - it has no type
    await client.users.get(network.fake.user().id)
    await network.fake.clock.advance(0)
    tasks, pending = len(asyncio.all_tasks()), len([t for t in timers if not _cancelled(t)])
    for _ in range(50):
        await client.users.get_many([network.fake.user().id for _ in range(10)])
    await network.fake.clock.advance(0)
    assert client.cache.stats.documents == 501
    assert len(asyncio.all_tasks()) == tasks
    assert len([timer for timer in timers if not _cancelled(timer)]) == pending
    assert network.fake.clock._timers == []


def _cancelled(timer: object) -> bool:
    assert isinstance(timer, asyncio.TimerHandle)
    return timer.cancelled()


async def test_a_bounded_cache_holds_no_more(network: Network) -> None:
    users = [network.fake.user() for _ in range(30)]
    async with client_of(network, cache=CacheOptions(max_documents=10)) as client:
        await client.users.get_many(ids_of(users))
        assert client.cache.stats.documents == 10
        assert client.cache.stats.evicted == 20


async def test_a_write_that_is_answered_from_the_record_is_not_taken_for_news(
    network: Network, client: UserServiceClient
) -> None:
    """A task that is delivered again repeats its key, and somebody may have opted out since."""
    user = network.fake.user()
    await client.users.update(user.id, name="Written", idempotency_key="task-1")
    opted_out = network.fake.update_preferences(user.id, push=False)
    client.cache.clear()
    await client.users.update(user.id, name="Written", idempotency_key="task-1")
    assert await client.users.get(user.id) == opted_out


async def test_an_epoch_that_was_taken_for_past_is_believed_when_it_goes_on(
    network: Network, client: UserServiceClient
) -> None:
    user = network.fake.user()
    await client.users.get(user.id)
    client._documents._is_current_epoch("0ld")
    assert await client.users.get(user.id) == user
    await network.fake.clock.advance(61)
    await client.users.get(user.id)
    assert client.users.peek(user.id) is not None
    assert client._documents.epoch == network.fake._directory.feed.epoch


async def test_what_is_remembered_of_an_unknown_id_says_that_nobody_was_asked(
    network: Network, client: UserServiceClient
) -> None:
    for attempts in (1, 0, 0):  # the first has asked
        with pytest.raises(NotFound) as unknown:
            await client.users.get(NOBODY)
        assert (unknown.value.attempts, unknown.value.code) == (attempts, "user_not_found")
        assert bool(unknown.value.request_id) == bool(attempts)
    await network.fake.clock.advance(6)
    with pytest.raises(NotFound) as unknown:
        await client.users.get(NOBODY)
    assert unknown.value.attempts == 1
    assert network.requests == {"users.get": 2}


@pytest.mark.parametrize("name", ["max_documents", "max_bytes", "fresh_for", "max_stale"])
@pytest.mark.parametrize("number", [-1, float("nan")])
def test_a_number_below_0_is_no_option(name: str, number: Any) -> None:
    with pytest.raises(ValueError, match="CacheOptions"):
        CacheOptions(**{name: number})
    CacheOptions(**{name: 0})
