"""Keys while Postgres is away: for ten minutes who is known goes on, and ends when it is back."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from user_service_server.errors import DependencyUnavailable, Overloaded, Unauthenticated
from user_service_server.keys import ring as ring_module
from user_service_server.keys.ring import KeyRing
from user_service_server.metrics import Metrics
from user_service_server.settings import Settings
from user_service_server.storage.database import Database

from ..engines import Engines, settings_for
from ..keys import id_of, make_key
from .trouble import killed, until

HEARD_WITHIN = 30.0
BELIEVED_FOR = 600.0
"""Seconds, as the contract has them."""


class Clock:
    """Real time, and what was passed besides."""

    def __init__(self) -> None:
        self.passed = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.passed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ring_module, "monotonic", clock)
    return clock


@asynccontextmanager
async def opened_ring(settings: Settings) -> AsyncIterator[KeyRing]:
    database = Database(settings)
    ring = KeyRing(database, Metrics())
    try:
        yield ring
    finally:
        await ring.close()
        await database.close()


async def verdict(ring: KeyRing, key: str) -> str:
    try:
        return (await ring.recognise(key, lambda: "192.0.2.1")).name
    except Unauthenticated:
        return "refused"
    except (DependencyUnavailable, Overloaded):
        return "nobody can tell"


def revoke(settings: Settings, key: str) -> None:
    """Revoke a key as an operator does: with the command, which ends when it is committed."""
    environ = {n: os.environ[n] for n in ("PATH", "PYTHONPATH") if n in os.environ}
    environ |= {"DATABASE_URL": settings.database_url, "REDIS_URL": settings.redis_url}
    command = (sys.executable, "-m", "user_service_server", "keys", "revoke", id_of(key))
    subprocess.run(command, env={**environ, "AUTH": "off"}, check=True)


@pytest.mark.parametrize("away", [1.0, HEARD_WITHIN, BELIEVED_FOR - 30])
async def test_a_key_revoked_just_before_postgres_died_ends_with_its_return(
    own_engines: Engines, clock: Clock, away: float
) -> None:
    """Nobody here heard of it, so it goes on meanwhile; 30 s of Postgres are enough to hear."""
    settings = settings_for(own_engines.create_database("revoked"), own_engines.valkey.url)
    known, doomed, unknown = [
        await make_key(settings, name, "users:read") for name in ("known", "doomed", "unknown")
    ]
    async with opened_ring(settings) as ring:
        assert [await verdict(ring, key) for key in (known, doomed)] == ["known", "doomed"]
        await asyncio.to_thread(revoke, settings, doomed)
        async with killed(own_engines.postgres):
            for passed in (away / 2, away):
                clock.passed = passed
                said = [await verdict(ring, key) for key in (known, doomed, unknown)]
                assert said == ["known", "doomed", "nobody can tell"]

        async def is_heard() -> bool:
            clock.passed = max(clock.passed, away) + 1
            return await verdict(ring, doomed) == "refused"

        began = clock()
        await until(is_heard, 30)
        assert clock() - began <= HEARD_WITHIN + 5
        assert [await verdict(ring, key) for key in (known, unknown)] == ["known", "unknown"]


async def test_a_key_revoked_as_soon_as_postgres_is_back_ends_within_half_a_minute(
    own_engines: Engines, clock: Clock
) -> None:
    settings = settings_for(own_engines.create_database("later"), own_engines.valkey.url)
    doomed = await make_key(settings, "doomed", "users:read")
    async with opened_ring(settings) as ring:
        assert await verdict(ring, doomed) == "doomed"
        async with killed(own_engines.postgres):
            clock.passed = BELIEVED_FOR / 2
            assert await verdict(ring, doomed) == "doomed"
        await asyncio.to_thread(revoke, settings, doomed)
        clock.passed += HEARD_WITHIN
        await until(lambda: is_refused(ring, doomed), 5)


async def is_refused(ring: KeyRing, key: str) -> bool:
    return await verdict(ring, key) == "refused"


async def test_after_ten_minutes_without_postgres_nobody_is_known(
    own_engines: Engines, clock: Clock
) -> None:
    settings = settings_for(own_engines.create_database("long"), own_engines.valkey.url)
    key = await make_key(settings, "known", "users:read")
    async with opened_ring(settings) as ring:
        began = clock()
        assert await verdict(ring, key) == "known"
        async with killed(own_engines.postgres):
            clock.passed = BELIEVED_FOR - (clock() - began) - 5
            assert await verdict(ring, key) == "known"
            clock.passed = BELIEVED_FOR
            assert await verdict(ring, key) == "nobody can tell"

        async def is_known() -> bool:
            return await verdict(ring, key) == "known"

        await until(is_known, 10)
