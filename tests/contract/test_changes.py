"""The change feed, page by page and as a stream, by the fake and by the server alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from user_service_client import BadRequest, UserServiceClient
from user_service_schemas import Changes

from ..system.subscribers import Event, follow
from ..system.trouble import until
from .people import PASSWORD, USERS, assert_refused, data_of, new_token, register

CHANGES = "/api/v1/changes"
SOON = 20.0


async def page(http: httpx.AsyncClient, after: str | None, limit: int = 1000) -> Any:
    query = {"limit": str(limit)} | ({} if after is None else {"after": after})
    return data_of(await http.get(CHANGES, params=query))


async def behind(http: httpx.AsyncClient, after: str, count: int) -> list[dict[str, Any]]:
    """Return so many changes behind a cursor: the server numbers them a moment later."""
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(SOON):
        while len(found) < count:
            read = await page(http, after)
            found += read["items"]
            after = read["next"]
            if not read["items"]:
                await asyncio.sleep(0.02)
    return found


async def end(http: httpx.AsyncClient) -> str:
    """Return the cursor behind a change that was just made: all others are before it."""
    user = (await register(http))["id"]
    after = None
    async with asyncio.timeout(SOON):
        while True:
            read = await page(http, after)
            after = read["next"]
            if user in {one["user_id"] for one in read["items"]}:
                return str(after)
            await asyncio.sleep(0 if read["items"] else 0.02)


async def change_everything(http: httpx.AsyncClient) -> tuple[str, str]:
    """Do whatever is a change; returns who was changed, in the order of their ids."""
    ada, bob = [str((await register(http))["id"]) for _ in range(2)]
    token = {"token": new_token(), "platform": "ios"}
    await http.patch(f"{USERS}/{ada}", json={"name": "Bob"})
    await http.put(f"{USERS}/{ada}/preferences", json={"push": False})
    device = data_of(await http.post(f"{USERS}/{ada}/devices", json=token))["id"]
    await http.post(f"{USERS}/{ada}/devices", json=token)
    await http.patch(f"{USERS}/{ada}/devices/{device}", json={"active": False})
    await http.put(f"{USERS}/{ada}/password", json={"password": "Another-Pass-1"})
    device = data_of(await http.post(f"{USERS}/{bob}/devices", json=token))["id"]
    await http.delete(f"{USERS}/{bob}/devices/{device}")
    await http.put(f"{USERS}/{ada}/preferences", json={"push": False})
    await http.delete(f"{USERS}/{ada}")
    return ada, bob


ADAS = [
    (1, "user.created"),
    (2, "user.updated"),
    (3, "preferences.updated"),
    (4, "device.registered"),
    (5, "device.updated"),
    (5, "password.updated"),
    (6, "device.moved"),
    (7, "user.deleted"),
]
BOBS = [(1, "user.created"), (2, "device.moved"), (3, "device.removed")]


async def test_each_change_is_in_the_feed_once_and_in_order(socket: httpx.AsyncClient) -> None:
    start = await end(socket)
    ada, bob = await change_everything(socket)
    found = await behind(socket, start, len(ADAS) + len(BOBS))
    kinds = {
        user: [(one["version"], one["kind"]) for one in found if one["user_id"] == user]
        for user in (ada, bob)
    }
    assert kinds == {ada: ADAS, bob: BOBS}
    epoch, first = start.split(".")
    assert [one["position"] for one in found] == [
        f"{epoch}.{int(first) + number}" for number in range(1, len(found) + 1)
    ]
    assert {one["actor"] for one in found} == {None}
    assert {tuple(one) for one in found} == {
        ("position", "user_id", "version", "kind", "at", "actor")
    }


async def test_pages_go_on_where_the_last_one_ended(socket: httpx.AsyncClient) -> None:
    start = await end(socket)
    await change_everything(socket)
    whole = await behind(socket, start, len(ADAS) + len(BOBS))
    read = await page(socket, start, limit=3)
    assert read["items"] == whole[:3]
    assert read["next"] == whole[2]["position"]
    assert (await page(socket, read["next"], limit=3))["items"] == whole[3:6]
    last = whole[-1]["position"]
    assert await page(socket, last) == {"items": [], "next": last}
    from_the_oldest = await page(socket, None)
    assert from_the_oldest["items"][-1] == whole[-1]


@pytest.mark.parametrize("cursor", ["", "x", "00000000.1", "é.1"])
async def test_a_foreign_cursor_is_refused(socket: httpx.AsyncClient, cursor: str) -> None:
    assert_refused(await socket.get(CHANGES, params={"after": cursor}), 400, "invalid_cursor")


@pytest.mark.parametrize("position", ["00", "0{}", "\u0660", "-0", "+{}", "{}.0", " {}", "{}\n"])
async def test_a_place_has_one_cursor(socket: httpx.AsyncClient, position: str) -> None:
    epoch, _, last = (await end(socket)).partition(".")
    answer = await socket.get(CHANGES, params={"after": f"{epoch}.{position.format(last)}"})
    assert_refused(answer, 400, "invalid_cursor")


async def test_a_cursor_that_is_ahead_is_refused(socket: httpx.AsyncClient) -> None:
    epoch = (await end(socket)).partition(".")[0]
    answer = await socket.get(CHANGES, params={"after": f"{epoch}.999999"})
    assert_refused(answer, 400, "invalid_cursor")
    answer = await socket.get(CHANGES, params={"limit": "1001"})
    assert_refused(answer, 422, "validation_failed", "limit")


async def test_the_client_reads_pages(
    socket: httpx.AsyncClient, streamed: UserServiceClient
) -> None:
    start = await end(socket)
    user = (await register(socket))["id"]
    await behind(socket, start, 1)
    changes = await streamed.changes.list(after=start, limit=1)
    assert [(one.user_id, one.version, one.kind) for one in changes.items] == [
        (user, 1, "user.created")
    ]
    assert await streamed.changes.list(after=changes.next) == Changes(items=(), next=changes.next)
    with pytest.raises(BadRequest) as refused:
        await streamed.changes.list(after="nonsense")
    assert refused.value.code == "invalid_cursor"


async def test_a_live_client_hears_of_changes(
    socket: httpx.AsyncClient, streamed: UserServiceClient
) -> None:
    user = (await register(socket))["id"]

    async def is_live() -> bool:
        return streamed.status.is_complete

    await until(is_live, SOON)
    assert (await streamed.users.get(user)).version == 1
    await socket.patch(f"{USERS}/{user}", json={"name": "Bob"})

    async def has_heard() -> bool:
        return (await streamed.users.get(user)).version == 2

    await until(has_heard, SOON)


async def following(events: AsyncGenerator[Event, None], name: str, user: str = "") -> Event:
    """Return the next event of this name, and of this user."""
    async with asyncio.timeout(SOON):
        async for event in events:
            if event.name == name and (not user or event.data["user_id"] == user):
                return event
    raise AssertionError("the stream ended")


def position_of(cursor: str | None) -> int:
    assert cursor is not None
    return int(cursor.partition(".")[2])


async def test_a_stream_begins_now_and_tells_each_change(socket: httpx.AsyncClient) -> None:
    before = await end(socket)
    user = (await register(socket))["id"]
    # Registered is not yet told: the change waits for its position.
    (registered,) = await behind(socket, before, 1)
    start = registered["position"]
    async with aclosing(follow(socket)) as events:
        ready = await following(events, "ready")
        # A process may read a moment later what Postgres has.
        assert 0 < position_of(ready.id) <= position_of(start)
        heartbeat = await following(events, "heartbeat")
        assert heartbeat.id is None
        assert list(heartbeat.data) == list(ready.data) == ["through", "now"]
        await socket.patch(f"{USERS}/{user}", json={"name": "Bob"})
        change = await following(events, "change", user)
    assert change.id == change.data["position"]
    assert (change.data["user_id"], change.data["version"]) == (user, 2)
    assert [change.data] == await behind(socket, start, 1)


async def test_a_stream_goes_on_behind_the_last_event(socket: httpx.AsyncClient) -> None:
    start = await end(socket)
    await change_everything(socket)
    missed = await behind(socket, start, len(ADAS) + len(BOBS))
    async with aclosing(follow(socket, missed[2]["position"])) as events:
        told = [(await following(events, "change")).data for _ in missed[3:]]
        assert told == missed[3:]
        await following(events, "heartbeat")
        anew = (await register(socket))["id"]
        assert (await following(events, "change")).data["user_id"] == anew


@pytest.mark.parametrize("ahead", [False, True])
async def test_a_stream_of_another_epoch_is_reset(socket: httpx.AsyncClient, ahead: bool) -> None:
    start = await end(socket)
    epoch = start.partition(".")[0]
    async with aclosing(follow(socket, f"{epoch}.999999" if ahead else "00000000.1")) as events:
        async with asyncio.timeout(SOON):
            first = await anext(events)
        assert (first.name, first.data) == ("reset", {"reason": "epoch"})
        assert 0 < position_of(first.id) <= position_of(start)
        user = (await register(socket, password=PASSWORD))["id"]
        assert (await following(events, "change", user)).data["version"] == 1


async def test_the_stream_says_what_it_is(socket: httpx.AsyncClient) -> None:
    async with socket.stream("GET", f"{CHANGES}/stream") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-accel-buffering"] == "no"
        async for chunk in answer.aiter_raw():
            assert chunk.startswith(b"retry: 1000\n\nid: ")
            break
    refused = await socket.get(f"{CHANGES}/stream", headers={"Last-Event-ID": "nonsense"})
    assert_refused(refused, 400, "invalid_cursor")
