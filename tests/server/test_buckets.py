"""The buckets of the cache: who is in which, which a server may hold, and their rows."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from uuid import UUID

import asyncpg
import pytest
from user_service_server.settings import Settings
from user_service_server.storage.buckets import ALL_BUCKETS, BUCKETS, bucket_of, hash_tag, slot_of
from user_service_server.storage.link import _buckets_of
from user_service_server.storage.migrations import downgrade, upgrade
from uuid_utils import uuid7

SLOTS = 16384


def test_people_are_spread_over_all_buckets() -> None:
    assert {bucket_of(str(uuid7())) for _ in range(40 * BUCKETS)} == set(ALL_BUCKETS)


def test_an_id_is_in_one_bucket_however_it_is_written() -> None:
    user_id = "01a20db8-eec9-7392-a787-a8d86db3dafb"
    assert bucket_of(user_id) == bucket_of(user_id.upper()) == UUID(user_id).int % BUCKETS


def test_servers_of_a_cluster_share_the_buckets() -> None:
    thirds = [slot_of(bucket) * 3 // SLOTS for bucket in ALL_BUCKETS]
    assert all(thirds.count(third) > BUCKETS // 4 for third in range(3))
    assert len(set(map(hash_tag, ALL_BUCKETS))) == BUCKETS


def nodes(flags: str, slots: str) -> bytes:
    """CLUSTER NODES of a server, as Valkey 9 says it."""
    return (
        "aa 127.0.0.1:7001@17001 master - 0 1764000000000 1 connected 0-16383\n"
        f"bb 127.0.0.1:7002@17002,,tls-port=0 {flags} - 0 0 2 connected{slots}\n"
    ).encode()


def within(*ranges: tuple[int, int]) -> list[int]:
    return [b for b in ALL_BUCKETS if any(low <= slot_of(b) <= high for low, high in ranges)]


@pytest.mark.parametrize(
    ("said", "buckets"),
    [
        (nodes("myself,master", " 0-8000"), within((0, 8000))),
        (nodes("myself,master", f" 1 {slot_of(7)} 9000-16383"), [7, *within((9000, 16383))]),
        (nodes("myself,master", ""), []),
        (nodes("myself,master", f" [{slot_of(9)}-<-aa]"), [9]),
        (nodes("myself,master", f" 0-99 [{slot_of(8)}->-aa]"), [8, *within((0, 99))]),
        (nodes("myself,slave", ""), ALL_BUCKETS),
        (b"", ALL_BUCKETS),
    ],
    ids=["a range", "single slots", "none", "imports", "gives away", "replica", "says nothing"],
)
def test_a_server_may_hold_the_buckets_of_its_slots(said: bytes, buckets: Collection[int]) -> None:
    assert sorted(_buckets_of(said)) == sorted(set(buckets))


def test_generations_go_on_rising_over_a_downgrade(settings: Settings) -> None:
    async def query(statement: str) -> list[asyncpg.Record]:
        url = settings.database_url.replace("+asyncpg", "")
        connection = await asyncpg.connect(url)
        try:
            return list(await connection.fetch(statement))
        finally:
            await connection.close()

    asyncio.run(query("UPDATE cache_generations SET generation = 5 WHERE bucket = 7"))
    downgrade(settings, "0003")
    assert asyncio.run(query("SELECT generation FROM service_state")) == [(6,)]
    upgrade(settings)
    rows = asyncio.run(query("SELECT bucket, generation FROM cache_generations ORDER BY bucket"))
    assert rows == [(bucket, 7) for bucket in ALL_BUCKETS]
