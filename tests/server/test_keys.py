"""The keys that a process knows: for how long, without Postgres, and how often it asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from litestar import Litestar
from user_service_schemas import Scope
from user_service_server.app import create_app
from user_service_server.errors import DependencyUnavailable, RateLimited, Unauthenticated
from user_service_server.keys import repository
from user_service_server.keys import ring as ring_module
from user_service_server.keys.repository import StoredKey
from user_service_server.keys.ring import (
    FAILURES,
    FAILURES_WITHIN,
    KNOWN_FOR,
    KNOWN_WITHOUT_POSTGRES_FOR,
    MAX_UNKNOWN,
    RENEWED_AFTER,
    UNKNOWN_FOR,
    WATCHED_EVERY,
    KeyRing,
)
from user_service_server.metrics import Metrics
from user_service_server.settings import Settings
from user_service_server.storage.database import Database, connected

from ..engines import settings_for
from ..keys import EVERYTHING, REQUIRED, change_key, id_of, make_key, showing
from ..system.subscribers import stream_scope
from .test_users import assert_failed


class Clock:
    """The ring's clock: real time, and what was passed besides."""

    def __init__(self) -> None:
        self.passed = 0.0

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() + self.passed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ring_module, "monotonic", clock)
    return clock


class Lookups:
    """The lookups in Postgres: how many, and whether they are held up or fail."""

    def __init__(self) -> None:
        self.count = 0
        self.go = asyncio.Event()
        self.go.set()
        self.failure: Exception | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        self.go.clear()
        try:
            yield
        finally:
            self.go.set()


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Lookups:
    lookups = Lookups()
    find = repository.find_key

    async def find_key(connection: object, key_id: str) -> StoredKey | None:
        lookups.count += 1
        await lookups.go.wait()
        if lookups.failure:
            raise lookups.failure
        return await find(connection, key_id)  # type: ignore[arg-type]

    monkeypatch.setattr(repository, "find_key", find_key)
    return lookups


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    return settings_for(database_url, redis_url, **REQUIRED)


@pytest.fixture
async def ring(settings: Settings) -> AsyncIterator[KeyRing]:
    database = Database(settings)
    ring = KeyRing(database, Metrics())
    yield ring
    await ring.close()
    await database.close()


@pytest.fixture
async def key(settings: Settings) -> str:
    return await make_key(settings, "sender", "users:read")


def here() -> str:
    return "192.0.2.1"


async def settle() -> None:
    await asyncio.sleep(0.1)


async def test_of_many_at_once_one_looks_a_key_up(
    ring: KeyRing, key: str, lookups: Lookups
) -> None:
    callers = await asyncio.gather(*(ring.recognise(key, here) for _ in range(500)))
    assert {(caller.name, caller.scopes) for caller in callers} == {
        ("sender", frozenset({Scope.USERS_READ}))
    }
    await ring.recognise(key, here)
    assert lookups.count == 1


async def test_a_wrong_secret_beside_the_right_one_neither_gets_in_nor_keeps_out(
    ring: KeyRing, key: str, lookups: Lookups
) -> None:
    wrong = f"usk_{id_of(key)}_{'0' * 64}"
    with lookups.held():
        asked = [asyncio.create_task(ring.recognise(one, here)) for one in (wrong, key, wrong, key)]
        await settle()
    told = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(one).__name__ for one in told] == ["Unauthenticated", "Caller"] * 2
    assert lookups.count == 2
    assert (await ring.recognise(key, here)).name == "sender"
    with pytest.raises(Unauthenticated):
        await ring.recognise(wrong, here)


async def test_who_gives_up_ends_the_lookup_for_nobody(
    ring: KeyRing, key: str, lookups: Lookups
) -> None:
    with lookups.held():
        first, second = (asyncio.create_task(ring.recognise(key, here)) for _ in range(2))
        await settle()
        first.cancel()
        await asyncio.wait({first})
    assert (await second).name == "sender"
    assert lookups.count == 1
    assert not ring._lookups


async def test_a_lookup_that_fails_when_nobody_waits_any_more_is_no_fuss(
    ring: KeyRing, key: str, lookups: Lookups
) -> None:
    said: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    try:
        lookups.failure = DependencyUnavailable()
        with lookups.held():
            alone = asyncio.create_task(ring.recognise(key, here))
            await settle()
            alone.cancel()
            await asyncio.wait({alone})
        await settle()
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
    assert said == []


async def test_a_revoked_key_ends_within_half_a_minute_and_is_renewed_beside_its_requests(
    ring: KeyRing, key: str, settings: Settings, lookups: Lookups, clock: Clock
) -> None:
    await ring.recognise(key, here)
    await change_key(settings, key, "revoked_at = now()")
    clock.passed = RENEWED_AFTER - 1
    await ring.recognise(key, here)
    assert lookups.count == 1
    clock.passed = RENEWED_AFTER
    await ring.recognise(key, here)  # which does not wait for the lookup that it begins
    await settle()
    assert lookups.count == 2
    with pytest.raises(Unauthenticated):
        await ring.recognise(key, here)


async def test_an_idle_revoked_key_is_looked_up_first(
    ring: KeyRing, key: str, settings: Settings, clock: Clock
) -> None:
    await ring.recognise(key, here)
    await change_key(settings, key, "revoked_at = now()")
    clock.passed = KNOWN_FOR
    with pytest.raises(Unauthenticated):
        await ring.recognise(key, here)


async def test_an_expired_key_ends_at_once_and_is_not_asked_for_again_and_again(
    ring: KeyRing, key: str, settings: Settings, lookups: Lookups
) -> None:
    await change_key(settings, key, "expires_at = now() + interval '1.5 seconds'")
    caller = await ring.recognise(key, here)
    assert await ring.is_valid(caller)
    await asyncio.sleep(1.6)
    assert not await ring.is_valid(caller)
    for _ in range(10):
        with pytest.raises(Unauthenticated):
            await ring.recognise(key, here)
    assert lookups.count == 1


async def test_after_a_rotation_both_keys_work_for_the_grace(
    ring: KeyRing, key: str, settings: Settings
) -> None:
    async with connected(settings) as connection:
        old = await repository.read_to_rotate(connection, id_of(key))
        assert old is not None
        new = await repository.create_key(connection, old.name, old.scopes, None)
        await connection.commit()
    await change_key(settings, key, "revoked_at = now() + interval '1 hour'")
    for one in (key, new):
        assert (await ring.recognise(one, here)).name == "sender"
    await change_key(settings, key, "revoked_at = now()")
    caller = await ring.recognise(new, here)
    assert await ring.is_valid(caller)


async def test_without_postgres_known_keys_are_good_for_ten_minutes_and_others_for_nothing(
    ring: KeyRing, key: str, settings: Settings, lookups: Lookups, clock: Clock
) -> None:
    caller = await ring.recognise(key, here)
    unknown = await make_key(settings, "unknown", "users:read")
    for failure in (DependencyUnavailable(), None):
        lookups.failure = failure
        if failure is None:
            lookups.go.clear()  # it neither answers nor fails
        for passed in (RENEWED_AFTER, KNOWN_FOR, KNOWN_WITHOUT_POSTGRES_FOR - 5):
            clock.passed = passed
            assert await ring.recognise(key, here) == caller
            assert await ring.is_valid(caller)
        if failure:
            with pytest.raises(DependencyUnavailable):
                await ring.recognise(unknown, here)
        clock.passed = KNOWN_WITHOUT_POSTGRES_FOR
        with pytest.raises(DependencyUnavailable):
            await ring.recognise(key, here)
        assert not await ring.is_valid(caller)
        clock.passed = 0
    await change_key(settings, key, "revoked_at = now()")
    clock.passed = KNOWN_FOR
    lookups.go.set()
    await settle()
    with pytest.raises(Unauthenticated):
        await ring.recognise(key, here)


async def test_what_stays_open_is_looked_at_again(
    ring: KeyRing, key: str, settings: Settings, lookups: Lookups, clock: Clock
) -> None:
    caller = await ring.recognise(key, here)
    await change_key(settings, key, "revoked_at = now()")
    assert await ring.is_valid(caller)
    clock.passed = WATCHED_EVERY
    assert await asyncio.gather(*(ring.is_valid(caller) for _ in range(100))) == [False] * 100
    assert lookups.count == 2
    assert await ring.is_valid(ring.anybody)


async def test_an_address_may_guess_so_often_also_at_once(
    ring: KeyRing, key: str, lookups: Lookups, clock: Clock
) -> None:
    guesses = [f"usk_{number:012}_{'0' * 64}" for number in range(FAILURES * 3)]
    told = await asyncio.gather(
        *(ring.recognise(guess, here) for guess in guesses), return_exceptions=True
    )
    assert [type(one) for one in told].count(Unauthenticated) == FAILURES == lookups.count
    assert [type(one) for one in told].count(RateLimited) == FAILURES * 2
    with pytest.raises(RateLimited) as refused:
        await ring.recognise(key, here)
    assert 1 <= int(dict(refused.value.headers)["Retry-After"]) <= FAILURES_WITHIN
    # Others are heard, and so is it, later, and once it is known also meanwhile.
    assert (await ring.recognise(key, lambda: "192.0.2.2")).name == "sender"
    assert (await ring.recognise(key, here)).name == "sender"
    clock.passed = FAILURES_WITHIN
    with pytest.raises(Unauthenticated):
        await ring.recognise(guesses[-1], here)


async def test_one_who_has_a_whole_network_is_one_guesser(ring: KeyRing, lookups: Lookups) -> None:
    told = await asyncio.gather(
        *(
            ring.recognise(f"usk_{n:012}_{'0' * 64}", lambda n=n: f"2001:db8::{n:x}")  # type: ignore[misc]
            for n in range(FAILURES + 5)
        ),
        return_exceptions=True,
    )
    assert [type(one) for one in told].count(RateLimited) == 5
    assert lookups.count == FAILURES


async def test_unknown_keys_are_asked_for_once_and_remembered_in_bounds(
    ring: KeyRing, lookups: Lookups, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    guess = f"usk_{'0' * 12}_{'0' * 64}"
    for _ in range(10):
        with pytest.raises(Unauthenticated):
            await ring.recognise(guess, here)
    assert lookups.count == 1
    clock.passed = UNKNOWN_FOR
    with pytest.raises(Unauthenticated):
        await ring.recognise(guess, here)
    assert lookups.count == 2
    monkeypatch.setattr(ring_module, "MAX_UNKNOWN", 50)
    monkeypatch.setattr(ring_module, "MAX_ADDRESSES", 50)
    for number in range(200):
        with pytest.raises(Unauthenticated):
            await ring.recognise(f"usk_{number:012}_{'1' * 64}", lambda n=number: f"10.0.0.{n}")  # type: ignore[misc]
    assert len(ring._unknown) <= 50 < MAX_UNKNOWN
    assert len(ring._wrong) <= 51


async def test_the_last_use_is_kept_without_a_write_per_request(
    settings: Settings, key: str, lookups: Lookups
) -> None:
    database = Database(settings)
    ring = KeyRing(database, Metrics())
    ring.start()
    for _ in range(100):
        await ring.recognise(key, here)
    await ring.close()
    await database.close()
    assert lookups.count == 1
    async with connected(settings) as connection:
        used = {row.id: row.last_used_at for row in await repository.list_keys(connection)}
    assert used[id_of(key)] is not None


async def test_behind_proxies_of_ours_the_address_is_what_they_say(
    database_url: str, redis_url: str
) -> None:
    app = create_app(settings_for(database_url, redis_url, **REQUIRED, PROXY_HOPS="1"))
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # Litestar's ASGI types are narrower
    async with app.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://t") as http:

        async def guess(number: int, address: str) -> httpx.Response:
            headers = showing(f"usk_{number:012}_{'2' * 64}")
            # What stands in front the guesser wrote, to be another each time.
            headers["X-Forwarded-For"] = f"10.9.8.{number % 250}, {address}"
            return await http.get("/api/v1/users", headers=headers)

        for number in range(FAILURES):
            assert_failed(await guess(number, "192.0.2.7"), 401, "unauthenticated")
        refused = await guess(FAILURES, "192.0.2.7")
        assert_failed(refused, 429, "rate_limited")
        assert int(refused.headers["Retry-After"]) >= 1
        assert_failed(await guess(FAILURES, "192.0.2.8"), 401, "unauthenticated")


async def test_a_stream_of_a_revoked_key_ends(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from user_service_server.changes import stream as stream_module  # noqa: PLC0415

    monkeypatch.setattr(stream_module, "WATCHED_EVERY", 0.2)
    monkeypatch.setattr(ring_module, "WATCHED_EVERY", 0.2)
    app: Litestar = create_app(settings)
    key = await make_key(settings, "listener", *EVERYTHING)
    async with app.lifespan():
        ended = asyncio.Event()
        received: list[bytes] = []

        async def receive() -> dict[str, object]:
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            received.append(message.get("body", b""))

        scope = stream_scope((b"authorization", f"Bearer {key}".encode()))
        stream = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.7)
        assert not stream.done()
        assert any(b"ready" in chunk for chunk in received)
        await change_key(settings, key, "revoked_at = now()")
        await asyncio.wait_for(stream, 2)
