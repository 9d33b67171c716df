"""A live client on real servers: what one server writes, and what its stream may go through."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest
from user_service_client import (
    StreamState,
    User,
    UserServiceClient,
    _coverage,
    _stream,
)
from user_service_server.settings import Settings
from user_service_server.storage.state import renew_epoch

from ..server.test_changes import prune_feed
from ..servers import Server, serving
from .feed_trial import quantile
from .proxy import Proxy, a_proxy
from .subscribers import connected
from .trouble import until

SOON = 10.0
LAG_SHORT = 15


@asynccontextmanager
async def live_on(url: str) -> AsyncIterator[UserServiceClient]:
    """Open a live client whose copies are covered by the stream from the first on."""
    async with UserServiceClient(url, live=True, timeout=10, attempt_timeout=5) as client:
        await until(lambda: client.status.is_complete, SOON)
        yield client


async def a_user(client: UserServiceClient) -> User:
    return await client.users.create(
        name="Ada", email=f"{uuid4()}@example.com", password="Correct-Horse-9"
    )


def has_forgotten(client: UserServiceClient, user: User) -> bool:
    return client.users.peek(user.id) is None


async def measure_lags(writes: str, reads: str, changes: int) -> list[float]:
    """Return the seconds from a write at one server to its being read at another, ascending."""
    lags = []
    async with UserServiceClient(writes, timeout=10, attempt_timeout=5) as writer:
        user = await a_user(writer)
        async with live_on(reads) as reader:
            for number in range(changes):
                await reader.users.get(user.id)
                push = bool(number % 2)
                await writer.preferences.update(user.id, push=push)
                began = time.monotonic()
                async with asyncio.timeout(SOON):
                    while True:
                        if (await reader.users.get(user.id)).preferences.push is push:
                            break
                        await asyncio.sleep(0.002)
                lags.append(time.monotonic() - began)
    return sorted(lags)


@pytest.fixture(autouse=True)
def _without_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read at once is covered, too: no test has to wait for it."""
    monkeypatch.setattr(_coverage, "LAG", 0.0)


async def test_a_change_at_one_server_is_seen_by_a_live_client_of_another(
    server: Server, database_url: str, redis_url: str
) -> None:
    with serving(database_url, redis_url, REDIS_TIMEOUT_MS="2000") as other:
        lags = await measure_lags(server.url, other.url, LAG_SHORT)
    assert quantile(lags, 0.5) < 1, "the feed looks every 50 ms"


async def test_a_cut_stream_is_live_again_and_has_missed_nothing(server: Server) -> None:
    async with a_proxy(server.port) as proxy, live_on(proxy.url) as client:
        user = await a_user(client)
        async with UserServiceClient(server.url) as writer:
            proxy.cut()
            await until(lambda: client.status.stream is StreamState.INTERRUPTED, SOON)
            assert not client.status.is_complete
            await writer.preferences.update(user.id, push=False)
        began = time.monotonic()
        await until(lambda: client.status.is_complete, SOON)
        assert time.monotonic() - began < 3, "it comes back after a second"
        assert has_forgotten(client, user)
        assert (await client.users.get(user.id)).preferences.push is False


async def test_a_server_that_restarts_is_followed_again(
    server: Server, database_url: str, redis_url: str
) -> None:
    with serving(database_url, redis_url, REDIS_TIMEOUT_MS="2000") as restarting:
        async with live_on(restarting.url) as client:
            user = await a_user(client)
            await asyncio.to_thread(restarting.kill)
            async with UserServiceClient(server.url) as writer:
                await writer.preferences.update(user.id, push=False)
            await until(lambda: client.status.stream is StreamState.INTERRUPTED, SOON)
            assert await client.users.get(user.id) == user, "seconds old, and nobody is there"
            await asyncio.to_thread(restarting.start)
            await until(lambda: client.status.is_complete, 40)
            assert has_forgotten(client, user)
            assert (await client.users.get(user.id)).preferences.push is False


async def test_a_cursor_that_is_too_old_has_all_copies_revalidated(
    server: Server, settings: Settings, database_url: str
) -> None:
    async with a_proxy(server.port) as proxy, live_on(proxy.url) as client:
        changed, other = await a_user(client), await a_user(client)
        await proxy.refuse()
        await until(lambda: client.status.stream is StreamState.INTERRUPTED, SOON)
        async with UserServiceClient(server.url) as writer:
            await writer.preferences.update(changed.id, push=False)
            await _everything_is_numbered(database_url)
            async with connected(database_url) as sql:
                await sql.execute("UPDATE changes SET at = at - interval '8 days'")
            await prune_feed(settings)
        await proxy.listen()
        await until(lambda: client.status.is_complete, 40)
        before = client.cache.stats.confirmed
        assert (await client.users.get(changed.id)).preferences.push is False
        assert await client.users.get(other.id) == other
        assert client.cache.stats.confirmed == before + 1, "by a 304"


async def _everything_is_numbered(database_url: str) -> None:
    async with connected(database_url) as sql:

        async def holds() -> bool:
            waiting = await sql.fetchval("SELECT count(*) FROM changes WHERE position IS NULL")
            return bool(waiting == 0)

        await until(holds, SOON)


async def test_a_renewed_epoch_has_all_copies_read_again(
    server: Server, settings: Settings
) -> None:
    async with live_on(server.url) as client:
        user = await a_user(client)
        before = client.users.peek(user.id)
        assert before is not None
        await renew_epoch(settings)
        await until(lambda: not before.is_fresh, SOON)
        assert await client.users.get(user.id) == user
        await until(lambda: client.status.is_complete, SOON)
        await client.users.get(user.id)
        after = client.users.peek(user.id)
        assert after is not None
        assert after.epoch != before.epoch
        assert after.is_fresh


async def test_a_half_open_connection_is_noticed_by_its_silence(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_proxy(server.port) as proxy, live_on(proxy.url) as client:
        user = await a_user(client)
        await _has_fallen_silent(client, proxy, monkeypatch)
        async with UserServiceClient(server.url) as writer:
            await writer.preferences.update(user.id, push=False)
        await until(lambda: client.status.stream is StreamState.INTERRUPTED, SOON)
        proxy.speak()
        await until(lambda: client.status.is_complete, SOON)
        assert (await client.users.get(user.id)).preferences.push is False


async def _has_fallen_silent(
    client: UserServiceClient, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reconnect with a shorter patience than 45 s, and hear nothing more."""
    monkeypatch.setattr(_stream, "SILENCE", 1.0)
    proxy.cut()
    await until(lambda: client.status.stream is StreamState.INTERRUPTED, SOON)
    await until(lambda: client.status.is_complete, SOON)
    proxy.fall_silent()
