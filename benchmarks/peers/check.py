"""Owns the proof that the peer is the same directory: it answers as the service does.

    python -m benchmarks.peers.check URL

It asks the service with AUTH=off no less than the peer. Each body must be, byte for byte, what the
schema package writes of it.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from typing import Any, NamedTuple, TypeVar

import httpx
import msgspec
from redis.asyncio import Redis
from user_service_schemas import DeviceDetails, Envelope, FoundUsers, Page, Preferences, User

from benchmarks import documents

T = TypeVar("T")

_PASSWORD = "StrongPass123!"


async def check_answers(url: str) -> None:
    """Ask a service everything that the benchmarks ask it; raises `AssertionError`."""
    async with httpx.AsyncClient(base_url=f"{url}/api/v1", timeout=30) as http:
        users = _Users(http)
        await _check_registration(users)
        await _check_preferences(users)
        await _check_devices(users)
        await _check_listing(users)
        await _check_refusals(users)


async def check_cache(url: str, redis_url: str) -> None:
    """Show that the peer's hit is read from Redis alone, and a miss from PostgreSQL.

    Raises:
        AssertionError: it is not so.
    """
    async with (
        httpx.AsyncClient(base_url=f"{url}/api/v1", timeout=30) as http,
        Redis.from_url(redis_url) as redis,
    ):
        users = _Users(http)
        user = await users.register()
        key = f"user:{user.id}"
        assert await redis.get(key) is None
        missed = await http.get(f"/users/{user.id}")
        kept = await redis.get(key)
        assert kept == missed.headers["etag"].encode() + b"\n" + missed.content
        assert 0 < await redis.ttl(key) <= 300

        # What only Redis has.
        await redis.set(key, b'"hit"\nhit')
        hit = await http.get(f"/users/{user.id}")
        assert (hit.headers["etag"], hit.content) == ('"hit"', b"hit")
        await users.update(user, email=False)
        assert await redis.get(key) is None
        assert (await users.get(user)).preferences.email is False


async def check_loaded(url: str, number: int) -> None:
    """Show that the peer has a user of `documents` as it was loaded; raises `AssertionError`."""
    async with httpx.AsyncClient(base_url=f"{url}/api/v1", timeout=30) as http:
        expected = documents.user(number)
        assert await _Users(http).get(expected) == expected


class _Found(NamedTuple):
    status: int
    etag: str | None
    message: str


class _Users:
    """Asks, and holds each answer to its type."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def ask(
        self, type_: type[Envelope[T]], method: str, path: str, body: Any = None
    ) -> tuple[T, _Found]:
        response = await self._http.request(method, path, json=body)
        envelope = msgspec.json.decode(response.content, type=type_)
        assert envelope.data is not None, response.text
        assert msgspec.json.encode(envelope) == response.content
        found = _Found(response.status_code, response.headers.get("etag"), envelope.message)
        return envelope.data, found

    async def refused(self, status: int, code: str, method: str, path: str, body: Any) -> None:
        response = await self._http.request(method, path, json=body)
        envelope = msgspec.json.decode(response.content, type=Envelope[None])
        assert envelope.error is not None
        assert (response.status_code, envelope.error.code) == (status, code), response.text

    async def register(self) -> User:
        mark = secrets.token_hex(8)
        body = {"name": "John Doe", "email": f"{mark}@example.com", "password": _PASSWORD}
        user, found = await self.ask(Envelope[User], "POST", "/users/", body)
        assert (found.status, found.message, user.version) == (201, "User registered", 1)
        assert found.etag is not None
        return user

    async def get(self, user: User) -> User:
        shown, found = await self.ask(Envelope[User], "GET", f"/users/{user.id}")
        assert (found.status, found.message) == (200, "User retrieved")
        assert found.etag is not None
        held = await self._http.get(f"/users/{user.id}", headers={"If-None-Match": found.etag})
        assert (held.status_code, held.content, held.headers["etag"]) == (304, b"", found.etag)
        return shown

    async def update(self, user: User, **fields: object) -> tuple[Preferences, str | None]:
        path = f"/users/{user.id}/preferences"
        preferences, found = await self.ask(Envelope[Preferences], "PATCH", path, fields)
        assert (found.status, found.message) == (200, "Preferences updated")
        return preferences, found.etag

    async def add_device(
        self, user: User, token: str, status: int
    ) -> tuple[DeviceDetails, str | None]:
        body = {"token": token, "platform": "ios", "app": "shop"}
        device, found = await self.ask(
            Envelope[DeviceDetails], "POST", f"/users/{user.id}/devices", body
        )
        message = "Device registered" if status == 201 else "Device updated"
        assert (found.status, found.message) == (status, message)
        assert (device.token, device.platform, device.app) == (token, "ios", "shop")
        return device, found.etag


async def _check_registration(users: _Users) -> None:
    user = await users.register()
    assert user.preferences.email
    assert user.preferences.push
    assert user.devices == ()
    # From PostgreSQL, and then from Redis.
    assert [await users.get(user) for _ in range(2)] == [user, user]
    body = {"name": "John", "email": user.email.upper(), "password": _PASSWORD}
    await users.refused(409, "email_taken", "POST", "/users/", body)
    found, _ = await users.ask(
        Envelope[FoundUsers], "POST", "/users/lookup", {"email": user.email.upper()}
    )
    assert found.users == (user,)


async def _check_preferences(users: _Users) -> None:
    user = await users.get(await users.register())
    window = {"quiet_hours_start": "22:00", "quiet_hours_end": "07:00"}
    _, first = await users.update(user, **window, categories={"marketing": {"email": False}})
    after, second = await users.update(user, push=False, categories={"marketing": {"push": False}})
    # What is omitted keeps its value.
    assert (after.email, after.push, after.quiet_hours_start) == (True, False, "22:00")
    assert not after.categories["marketing"].email
    assert not after.categories["marketing"].push
    assert first != second
    assert await users.update(user, push=False) == (after, second)
    shown = await users.get(user)
    assert (shown.preferences, shown.version) == (after, 3)
    body = {"quiet_hours_start": None}
    path = f"/users/{user.id}/preferences"
    await users.refused(422, "validation_failed", "PATCH", path, body)


async def _check_devices(users: _Users) -> None:
    first, second = await users.register(), await users.register()
    token = secrets.token_hex(80)
    device, etag = await users.add_device(first, token, 201)
    shown = await users.get(first)
    assert ([one.id for one in shown.devices], shown.version) == ([device.id], 2)
    again, same = await users.add_device(first, token, 200)
    assert (again.id, same) == (device.id, etag)
    assert again.last_seen_at > device.last_seen_at

    # The last login wins.
    moved, _ = await users.add_device(second, token, 201)
    assert ((await users.get(first)).devices, (await users.get(first)).version) == ((), 3)
    assert [one.id for one in (await users.get(second)).devices] == [moved.id]

    others = [(await users.add_device(second, secrets.token_hex(80), 201))[0] for _ in range(20)]
    active = (await users.get(second)).devices
    assert [one.id for one in active] == [one.id for one in reversed(others)]


async def _check_listing(users: _Users) -> None:
    await users.register()
    await users.register()
    page, _ = await users.ask(Envelope[Page[User]], "GET", "/users?limit=1")
    rest, _ = await users.ask(
        Envelope[Page[User]], "GET", f"/users?limit=1&cursor={page.next_cursor}"
    )
    both, found = await users.ask(Envelope[Page[User]], "GET", "/users?limit=2")
    assert (both.items, found.message) == (page.items + rest.items, "Users listed")
    assert both.items[0].id < both.items[1].id


async def _check_refusals(users: _Users) -> None:
    nobody = documents.user_id(0)[:-1] + "f"
    await users.refused(404, "user_not_found", "GET", f"/users/{nobody}", None)
    await users.refused(404, "user_not_found", "GET", "/users/1", None)
    await users.refused(404, "route_not_found", "GET", "/nothing", None)
    await users.refused(422, "validation_failed", "POST", "/users/", {"name": ""})


if __name__ == "__main__":
    asyncio.run(check_answers(sys.argv[1]))
