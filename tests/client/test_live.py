"""Live updates on the fake and its clock: states, recovery, and what is believed meanwhile."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import AsyncGenerator
from datetime import timedelta
from types import AsyncGeneratorType

import pytest
from user_service_client import Hooks, StreamEvent, StreamState, UserServiceClient, _stream
from user_service_schemas import Heartbeat

from .network import Network, client_of


def stream_of(client: UserServiceClient) -> StreamState:
    return client.status.stream


def is_complete(client: UserServiceClient) -> bool:
    return client.status.is_complete


async def test_a_change_ends_a_copy_and_the_next_read_waits(
    network: Network, live: UserServiceClient
) -> None:
    user = await live.users.get(network.fake.user().id)
    assert await live.users.get(user.id) == user
    changed = network.fake.update_preferences(user.id, push=False)
    await network.fake.clock.advance(0)
    assert await live.users.get(user.id) == changed
    assert network.requests == {"users.get": 2}


async def test_states_of_a_stream_that_is_cut(network: Network) -> None:
    events: list[StreamEvent] = []
    async with client_of(network, live=True, hooks=Hooks(stream=events.append)) as client:
        network.fake.break_streams()
        await network.fake.clock.advance(0)
        assert stream_of(client) is StreamState.INTERRUPTED
        assert client.status.since == network.fake.clock.now()
        assert not is_complete(client)
        await network.fake.clock.advance(1)
        assert stream_of(client) is StreamState.LIVE
        assert is_complete(client)
    assert stream_of(client) is StreamState.OFF
    assert not is_complete(client)
    assert [event.state for event in events] == [
        StreamState.INITIALIZING,
        StreamState.LIVE,
        StreamState.INTERRUPTED,
        StreamState.LIVE,
        StreamState.OFF,
    ]


async def test_a_cut_stream_goes_on_from_where_it_was(
    network: Network, live: UserServiceClient
) -> None:
    user = await live.users.get(network.fake.user().id)
    network.fake.break_streams()
    await network.fake.clock.advance(0)
    changed = network.fake.update_preferences(user.id, push=False)
    await network.fake.clock.advance(1)
    assert await live.users.get(user.id) == changed
    assert await live.users.get(user.id) == changed


async def test_a_stream_that_is_cut_for_a_moment_has_nothing_asked_for(
    network: Network, live: UserServiceClient
) -> None:
    """What was complete a second ago is fresh: a restart of a server is no reason to ask others."""
    users = [network.fake.user() for _ in range(100)]
    await live.users.get_many([user.id for user in users])
    await network.fake.clock.advance(3600)
    network.fake.requests.clear()
    network.fake.break_streams()
    await network.fake.clock.advance(0)
    for user in users:
        assert await live.users.get(user.id) == user
    await network.fake.clock.advance(1)
    for user in users:
        assert await live.users.get(user.id) == user
    assert network.requests == {}


async def test_a_stream_that_stays_cut_lets_copies_age(
    network: Network, live: UserServiceClient
) -> None:
    user = await live.users.get(network.fake.user().id)
    await network.fake.clock.advance(3600)
    network.fake.fail(times=None, route="changes.stream")
    network.fake.break_streams()
    changed = network.fake.update_preferences(user.id, push=False)
    await network.fake.clock.advance(31)
    await live.users.get(user.id)
    await network.fake.clock.advance(0)
    assert await live.users.get(user.id) == changed


@pytest.mark.parametrize("how", ["prune", "epoch"])
async def test_a_reset_marks_all_copies(
    network: Network, live: UserServiceClient, how: str
) -> None:
    users = [await live.users.get(network.fake.user().id) for _ in range(3)]
    await network.fake.clock.advance(60)
    if how == "prune":
        network.fake.break_streams()
        await network.fake.clock.advance(0)
        changed = network.fake.update_preferences(users[0].id, push=False)
        network.fake.prune_feed()
    else:
        changed = users[0]
        network.fake.renew_epoch()
    network.fake.requests.clear()
    await network.fake.clock.advance(1)
    assert stream_of(live) is StreamState.LIVE
    assert await live.users.get(users[0].id) == changed
    assert [await live.users.get(user.id) for user in users[1:]] == users[1:]
    statuses = [asked.status for asked in network.fake.requests if asked.operation == "users.get"]
    assert statuses == ([200, 304, 304] if how == "prune" else [200] * 3)
    assert live.cache.stats.documents == 3


async def test_a_new_epoch_is_heard_of_by_the_stream(
    network: Network, live: UserServiceClient
) -> None:
    user = await live.users.get(network.fake.user().id)
    network.lag(user)
    network.fake.renew_epoch()
    await network.fake.clock.advance(1)
    assert await live.users.get(user.id) == user
    await network.fake.clock.advance(1)
    await live.users.get(user.id)
    entry = live.users.peek(user.id)
    assert entry is None or not entry.is_fresh, "of a server that has not heard of it yet"


async def test_who_reads_after_a_new_epoch_does_not_join_a_read_from_before(
    network: Network, live: UserServiceClient
) -> None:
    user, other = network.fake.user(), network.fake.user()
    await live.users.get(other.id)
    held = network.hold("users.get")
    reader = asyncio.create_task(live.users.get(user.id))
    await held.arrived()
    network.fake.renew_epoch()
    changed = network.fake.update_preferences(user.id, push=False)
    await network.fake.clock.advance(1)
    late = asyncio.create_task(live.users.get(user.id))
    await network.fake.clock.advance(0)
    held.release()
    assert await late == changed
    await reader


async def test_a_new_epoch_does_not_bring_back_what_was_overtaken_before_it(
    network: Network, live: UserServiceClient
) -> None:
    """It makes floors mean nothing; the answer that is below one is on its way all the same."""
    user, other = network.fake.user(), network.fake.user()
    await live.users.get(other.id)
    held = network.hold("users.get")
    reader = asyncio.create_task(live.users.get(user.id))
    await held.arrived()
    changed = network.fake.update_preferences(user.id, push=False)
    await network.fake.clock.advance(0)
    late = asyncio.create_task(live.users.get(user.id))
    await network.fake.clock.advance(0)
    network.fake.renew_epoch()
    await live.users.get_with_etag(other.id)
    held.release()
    assert await late == changed
    await reader


async def test_what_a_server_that_lags_says_when_the_stream_begins_is_not_covered_by_it(
    network: Network,
) -> None:
    """The stream tells of changes from its beginning on; what was read then may be from before."""
    user = network.fake.user()
    network.lag(user)
    changed = network.fake.update_preferences(user.id, push=False)
    made = UserServiceClient(
        "http://users.test", transport=network, clock=network.fake.clock, live=True
    )
    async with made as client:
        await network.fake.clock.advance(0)
        assert is_complete(client)
        assert await client.users.get(user.id) == user
        network.catch_up()
        await network.fake.clock.advance(31)
        assert is_complete(client)
        await client.users.get(user.id)
        await network.fake.clock.advance(0)
        assert await client.users.get(user.id) == changed


async def test_what_a_late_heartbeat_says_is_as_old_as_the_heartbeat(
    network: Network, live: UserServiceClient
) -> None:
    """The event loop stood still, and heartbeats lay in the socket: the last is of 12:00:30."""
    clock, feed = network.fake.clock, network.fake._directory.feed
    await clock.sleep(40)
    feed._streams.clear()  # half-open: no further one comes
    await clock.advance(0)
    assert clock.monotonic() == 42
    assert is_complete(live)
    await clock.advance(30 + 30 - 42 - 0.1)
    assert is_complete(live)
    await clock.advance(0.2)
    assert stream_of(live) is StreamState.LIVE
    assert not is_complete(live)


async def test_a_server_whose_clock_is_behind_anothers_is_not_late(
    network: Network, live: UserServiceClient
) -> None:
    """How late heartbeats are is measured within a connection: the next leads to another server."""
    feed = network.fake._directory.feed

    def an_hour_behind() -> Heartbeat:
        now = network.fake.clock.now() - timedelta(hours=1)
        return Heartbeat(through=now, now=now)

    feed._completeness = an_hour_behind  # type: ignore[method-assign]
    network.fake.break_streams()
    await network.fake.clock.advance(60)
    assert is_complete(live)


async def test_silence_is_taken_for_the_end(network: Network, live: UserServiceClient) -> None:
    """A connection over which nothing comes, not even heartbeats: `SILENCE` is 45 s."""
    user = await live.users.get(network.fake.user().id)
    streams = network.fake._directory.feed._streams
    streams.clear()  # half-open: nobody sends, and nobody ends it
    changed = network.fake.update_preferences(user.id, push=False)
    await network.fake.clock.advance(44)
    assert stream_of(live) is StreamState.LIVE
    assert not is_complete(live)
    await network.fake.clock.advance(2.5)
    assert stream_of(live) is StreamState.LIVE
    assert is_complete(live)
    assert await live.users.get(user.id) == changed


async def test_a_change_that_cannot_be_read_marks_all_copies_and_is_passed_over(
    network: Network, live: UserServiceClient
) -> None:
    """Of a newer service: asking for the same again would tell no more, and never be live again."""
    user = await live.users.get(network.fake.user().id)
    await network.fake.clock.advance(3)
    feed = network.fake._directory.feed
    (stream,) = feed._streams
    stream.put(f"id: {feed._end}\nevent: change\ndata: {{}}\n\n".encode())
    await network.fake.clock.advance(0)
    assert stream_of(live) is StreamState.LIVE
    network.fake.requests.clear()
    assert await live.users.get(user.id) == user
    assert [request.operation for request in network.fake.requests] == ["users.get"]


async def test_what_reads_a_stream_is_closed_with_it(network: Network) -> None:
    """Left to be collected, a connection would stay open for as long as an error is looked at."""
    left: list[str] = []

    def collected(generator: AsyncGenerator[object]) -> None:
        assert isinstance(generator, AsyncGeneratorType)
        code = generator.ag_code
        if code.co_filename == _stream.__file__:  # httpx has some of its own
            left.append(code.co_name)

    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(finalizer=collected)
    try:
        async with client_of(network, live=True):
            (stream,) = network.fake._directory.feed._streams
            stream.put(b"event: heartbeat\ndata: {}\n\n")
            await network.fake.clock.advance(0)
            assert network.fake.open_streams == 0
            await network.fake.clock.advance(1)
            assert network.fake.open_streams == 1
        gc.collect()
    finally:
        sys.set_asyncgen_hooks(*hooks)
    assert left == []


async def test_reconnects_are_further_and_further_apart(
    network: Network, live: UserServiceClient
) -> None:
    network.fake.refuse_connections()
    network.fake.requests.clear()
    await network.fake.clock.advance(600)
    attempts = len(network.fake.requests)
    assert 600 / 30 <= attempts <= 10 + 600 / 15
    network.fake.accept_connections()
    await network.fake.clock.advance(30)
    assert is_complete(live)


async def test_a_stream_that_is_refused_is_told_of(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    network.fake.fail(times=None, status=403, route="changes.stream")
    made = UserServiceClient(
        "http://users.test", transport=network, clock=network.fake.clock, live=True
    )
    with caplog.at_level(logging.WARNING):
        async with made as client:
            await network.fake.clock.advance(120)
            assert stream_of(client) is StreamState.INITIALIZING
    (record,) = [record for record in caplog.records if "refused" in record.getMessage()]
    assert "403" in record.getMessage()
