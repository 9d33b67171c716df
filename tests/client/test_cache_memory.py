"""What 50,000 copies take, beside what msgspec's structs alone would."""

from __future__ import annotations

import gc
import tracemalloc

import httpx
import msgspec
from user_service_client import User, UserServiceClient

from .conftest import USER, envelope

BATCH = 1000


def body(number: int) -> bytes:
    """Return the JSON of a user with two devices, of whom nothing is shared with another."""
    user_id = f"01a205c7-a743-7a16-a135-{number:012x}"
    devices = [
        {
            "id": f"01a205c7-a743-7a16-b{kind:03}-{number:012x}",
            "token": f"{kind}-{number:08}-" + "x" * 140,
            "platform": "ios",
            "app": None,
            "active": True,
            "registered_at": "2026-01-01T00:00:00Z",
        }
        for kind in range(2)
    ]
    named = {"id": user_id, "name": f"User {number}", "email": f"user{number}@example.com"}
    return msgspec.json.encode(USER | named | {"devices": devices})


def handle(request: httpx.Request) -> httpx.Response:
    ids = msgspec.json.decode(request.content, type=dict[str, list[str]])["ids"]
    users = tuple(msgspec.Raw(body(int(user_id[-12:], 16))) for user_id in ids)
    headers = {"X-Document-Tag": "abc.def"}
    return httpx.Response(200, headers=headers, content=envelope({"users": users, "missing": ()}))


async def measure(count: int) -> tuple[float, float]:
    """Return the bytes that so many copies take in a client, and as structs, each."""
    decode = msgspec.json.Decoder(User).decode
    ids = [f"01a205c7-a743-7a16-a135-{number:012x}" for number in range(count)]
    transport = httpx.MockTransport(handle)
    async with UserServiceClient("http://users.test", transport=transport, timeout=600) as client:
        await client.users.get_many(ids[:BATCH])  # what is there once, however many there are
        client.cache.clear()
        gc.collect()
        tracemalloc.start()
        try:
            structs = [decode(body(number)) for number in range(count)]
            gc.collect()
            own, _ = tracemalloc.get_traced_memory()
            del structs
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            for start in range(0, count, BATCH):
                await client.users.get_many(ids[start : start + BATCH])
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert client.cache.stats.documents == count
    return (after - before) / count, own / count


async def test_a_copy_takes_at_most_half_as_much_again_as_its_struct() -> None:
    kept, own = await measure(5_000)
    assert kept <= 1.5 * own, f"{kept:.0f} bytes for {own:.0f}"
