"""Owns the caches beside the client's: async-lru, cashews and LaunchDarkly, all of them warm."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeAlias

from async_lru import alru_cache
from cashews import Cache
from ldclient import Context, LDClient
from ldclient.config import Config
from ldclient.integrations.test_data import TestData
from user_service_schemas import User

from benchmarks import documents

Get: TypeAlias = Callable[[str], Awaitable[User]]

_USER = documents.user(0)


async def _load(_user_id: str) -> User:
    return _USER


async def async_lru(ids: Iterable[str]) -> Get:
    """Return a function whose results async-lru keeps for 30 s, as the client does."""
    get: Get = alru_cache(maxsize=50_000, ttl=30)(_load)
    for user_id in ids:
        await get(user_id)
    return get


async def cashews(ids: Iterable[str]) -> Get:
    """Return what reads from cashews' memory.

    Not its decorator, which makes the key of each call, and takes ten times as long.
    """
    cache = Cache()
    cache.setup("mem://", size=100_000)
    for user_id in ids:
        await cache.set(user_id, _USER, expire="1h")
    get: Get = cache.get
    return get


def launchdarkly() -> Callable[[str], bool]:
    """Return a function that evaluates a flag of LaunchDarkly's store in memory."""
    flags = TestData.data_source()
    flags.update(flags.flag("flag").variation_for_all(True))
    client = LDClient(Config("sdk-key", update_processor_class=flags, send_events=False))
    context = Context.create("user")

    def variation(_user_id: str) -> bool:
        return bool(client.variation("flag", context, False))

    assert variation("")
    return variation
