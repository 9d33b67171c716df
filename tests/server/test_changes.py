"""The change feed page by page: kinds, versions, order, cursors, and what is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest
from litestar import Litestar
from user_service_server.changes import feed as feed_module
from user_service_server.changes.feed import ChangeFeed
from user_service_server.metrics import Metrics
from user_service_server.settings import Settings
from user_service_server.storage.database import Database
from user_service_server.storage.document import DocumentShape
from user_service_server.storage.replica import Replica
from user_service_server.storage.state import StateWatcher, renew_epoch

from ..system.subscribers import change, change_often, connected, insert_users
from ..system.trouble import until
from .statements import around_direct
from .test_users import assert_failed

CHANGES = "/api/v1/changes"


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    async with connected(database_url) as connection:
        yield connection


@pytest.fixture(autouse=True)
async def settled(sql: asyncpg.Connection, app: Litestar) -> None:  # noqa: ARG001 - it numbers them
    """What earlier tests changed has its position, so that each begins at the end."""

    async def holds() -> bool:
        return not await sql.fetchval("SELECT count(*) FROM changes WHERE position IS NULL")

    await until(holds, 10)


async def prune_feed(settings: Settings) -> int:
    """Do what the upkeep does with the feed, to its end; returns how many changes are gone."""
    database, metrics = Database(settings), Metrics()
    state = StateWatcher(settings, database, metrics)
    replica = Replica(settings, state, DocumentShape(settings), metrics)
    feed = ChangeFeed(settings, database, state, replica, metrics)
    try:
        gone = 0
        while batch := await feed.prune():
            gone += batch
        return gone
    finally:
        await feed.close()


async def page(http: httpx.AsyncClient, after: str | None = None, limit: int = 1000) -> Any:
    query = {"limit": str(limit)} | ({} if after is None else {"after": after})
    answer = await http.get(CHANGES, params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()["data"]


async def end(http: httpx.AsyncClient) -> str:
    """Return the cursor behind the last change that has a position."""
    cursor = None
    while (found := await page(http, cursor))["items"]:
        cursor = found["next"]
    return str(found["next"])


async def arrived(http: httpx.AsyncClient, after: str, count: int) -> list[dict[str, Any]]:
    """Wait until so many changes lie behind a cursor, and return them."""
    items: list[dict[str, Any]] = []
    async with asyncio.timeout(5):
        while len(items) < count:
            found = await page(http, after)
            items += found["items"]
            after = found["next"]
            await asyncio.sleep(0 if found["items"] else 0.02)
    return items


async def test_every_kind_of_change_is_in_the_feed_with_its_version(
    http: httpx.AsyncClient,
) -> None:
    start = await end(http)

    async def ask(method: str, path: str, **body: Any) -> Any:
        answer = await http.request(method, f"/api/v1/users/{path}", json=body or None)
        assert answer.is_success, answer.text
        return answer.json()["data"]

    one = (await ask("POST", "", name="One", email="one@example.com", password="StrongPass123!"))[
        "id"
    ]
    two = (await ask("POST", "", name="Two", email="two@example.com", password="StrongPass123!"))[
        "id"
    ]
    await ask("PATCH", one, name="Other")
    await ask("PATCH", one, name="Other")  # changes nothing
    await ask("PUT", f"{one}/preferences", push=False)
    await ask("PUT", f"{one}/password", password="Another-Pass-456")
    device = await ask("POST", f"{one}/devices", token="token", platform="ios")
    await ask("POST", f"{one}/devices", token="token", platform="ios")  # seen again
    await ask("PATCH", f"{one}/devices/{device['id']}", active=False)
    await ask("POST", f"{two}/devices", token="token", platform="ios")  # moves
    device = await ask("POST", f"{one}/devices", token="next", platform="web")
    await ask("DELETE", f"{one}/devices/{device['id']}")
    await ask("DELETE", one)

    items = await arrived(http, start, 12)
    assert {(i["actor"], set(i) == set(items[0])) for i in items} == {(None, True)}
    assert set(items[0]) == {"position", "user_id", "version", "kind", "at", "actor"}
    told = {u: [(i["kind"], i["version"]) for i in items if i["user_id"] == u] for u in (one, two)}
    assert told == {
        one: [
            ("user.created", 1),
            ("user.updated", 2),
            ("preferences.updated", 3),
            ("password.updated", 3),
            ("device.registered", 4),
            ("device.updated", 5),
            ("device.moved", 6),
            ("device.registered", 7),
            ("device.removed", 8),
            ("user.deleted", 9),
        ],
        two: [("user.created", 1), ("device.moved", 2)],
    }


async def test_pages_go_on_with_next_and_end_with_an_empty_one(
    http: httpx.AsyncClient, sql: asyncpg.Connection
) -> None:
    start = await end(http)
    users = await insert_users(sql, 3)
    for _ in range(5):
        await change(sql, *users)
    whole = await arrived(http, start, 15)
    assert len(whole) == 15

    pages = []
    after = start
    while (found := await page(http, after, limit=4))["items"]:
        pages.append(found["items"])
        assert found["next"] == found["items"][-1]["position"]
        after = found["next"]
    assert [len(items) for items in pages] == [4, 4, 4, 3]
    assert [item for items in pages for item in items] == whole
    assert found["next"] == after, "an empty page leads on from where it is"
    await change(sql, users[0])
    (item,) = await arrived(http, after, 1)
    assert (item["user_id"], item["version"]) == (users[0], 6)


async def test_without_a_cursor_a_page_begins_at_the_oldest(
    http: httpx.AsyncClient, sql: asyncpg.Connection
) -> None:
    start = await end(http)
    (user,) = await insert_users(sql, 1)
    await change(sql, user)
    await arrived(http, start, 1)
    first = await sql.fetchval("SELECT min(position) FROM changes")
    (item,) = (await page(http, limit=1))["items"]
    assert item["position"] == f"{start.split('.')[0]}.{first}"


async def test_order_is_by_version_even_where_rows_were_inserted_the_other_way(
    http: httpx.AsyncClient, sql: asyncpg.Connection, database_url: str
) -> None:
    """A transaction that is late with its commit, and one whose row has the lower number."""
    start = await end(http)
    one, two = await insert_users(sql, 2)
    async with connected(database_url) as slow:
        transaction = slow.transaction()
        await transaction.start()
        await change(slow, one)  # its row has its number, and is not committed
        await change(sql, two)
        (first,) = await arrived(http, start, 1)
        await transaction.commit()
    items = await arrived(http, start, 2)
    assert [(i["user_id"], i["version"]) for i in items] == [(two, 1), (one, 1)]
    assert items[0] == first


async def test_one_batch_has_each_users_versions_in_order(
    http: httpx.AsyncClient, sql: asyncpg.Connection
) -> None:
    start = await end(http)
    (user,) = await insert_users(sql, 1)
    await sql.execute(
        "INSERT INTO changes (user_id, version, kind, at)"
        " SELECT $1, v, 'user.updated', now() FROM generate_series(50, 1, -1) v",
        user,
    )
    items = await arrived(http, start, 50)
    assert [item["version"] for item in items] == list(range(1, 51))


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x", ""])
async def test_limit_out_of_bounds_is_refused(http: httpx.AsyncClient, limit: str) -> None:
    answer = await http.get(CHANGES, params={"limit": limit})
    assert_failed(answer, 422, "validation_failed", "limit")


@pytest.mark.parametrize(
    "cursor",
    [
        *["", "junk", ".", "1", "é.1", "{epoch}", "{epoch}.", "{epoch}.-1", "{epoch}.1.0"],
        *["{epoch}.x", "{epoch}." + "9" * 19, "{epoch}." + "9" * 40, "{epoch}." + "9" * 80],
        *["00000000.0", "{epoch}.00", "{epoch}.01", "{epoch}.\u0661", "{epoch}.1\n", " {epoch}.1"],
    ],
)
async def test_cursor_that_was_never_given_out_is_refused(
    http: httpx.AsyncClient, cursor: str
) -> None:
    epoch = (await end(http)).split(".")[0]
    answer = await http.get(CHANGES, params={"after": cursor.format(epoch=epoch)})
    assert_failed(answer, 400, "invalid_cursor")


async def test_cursor_of_the_future_is_refused(http: httpx.AsyncClient) -> None:
    epoch, position = (await end(http)).split(".")
    answer = await http.get(CHANGES, params={"after": f"{epoch}.{int(position) + 1}"})
    assert_failed(answer, 400, "invalid_cursor")


async def test_cursor_of_another_epoch_is_refused(
    http: httpx.AsyncClient, settings: Settings
) -> None:
    cursor = await end(http)
    epoch = await renew_epoch(settings)

    async def is_noticed() -> bool:
        return bool((await page(http))["next"].startswith(f"{epoch}."))

    await until(is_noticed, 5)
    assert_failed(await http.get(CHANGES, params={"after": cursor}), 400, "invalid_cursor")


async def test_pruning_takes_what_is_old_and_never_more_than_a_beginning(
    http: httpx.AsyncClient, sql: asyncpg.Connection, settings: Settings
) -> None:
    start = await end(http)
    (user,) = await insert_users(sql, 1)
    await change_often(sql, user, 10)
    items = await arrived(http, start, 10)
    position = {item["version"]: int(item["position"].split(".")[1]) for item in items}
    # 6 is newer than its place says: a long transaction. What is behind it stays, too.
    await sql.execute(
        "UPDATE changes SET at = now() - interval '7 days 1 hour' WHERE position <= $1",
        position[9],
    )
    await sql.execute("UPDATE changes SET at = now() WHERE position = $1", position[6])
    assert await prune_feed(settings) >= 5
    kept = [row[0] for row in await sql.fetch("SELECT position FROM changes ORDER BY position")]
    assert kept == [position[version] for version in range(6, 11)]
    floor = await sql.fetchval("SELECT pruned_position FROM change_feed")
    assert floor == position[5]
    assert await prune_feed(settings) == 0

    assert_failed(await http.get(CHANGES, params={"after": start}), 400, "invalid_cursor")
    before_last = items[3]["position"]
    assert_failed(await http.get(CHANGES, params={"after": before_last}), 400, "invalid_cursor")
    for after in (items[4]["position"], None):
        assert [item["version"] for item in (await page(http, after))["items"]] == [6, 7, 8, 9, 10]


async def test_a_change_without_a_position_is_never_pruned(
    sql: asyncpg.Connection, settings: Settings, http: httpx.AsyncClient
) -> None:
    start = await end(http)
    (user,) = await insert_users(sql, 1)
    async with sql.transaction():
        await change(sql, user)
        await sql.execute(
            "UPDATE changes SET at = now() - interval '8 days' WHERE user_id = $1", user
        )
        await prune_feed(settings)
    (item,) = await arrived(http, start, 1)
    assert item["user_id"] == user


async def test_pruning_in_batches_goes_to_the_end(
    http: httpx.AsyncClient,
    sql: asyncpg.Connection,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = await end(http)
    (user,) = await insert_users(sql, 1)
    await change_often(sql, user, 25)
    await arrived(http, start, 25)
    monkeypatch.setattr(feed_module, "BATCH", 10)
    await sql.execute("UPDATE changes SET at = now() - interval '8 days'")
    assert await prune_feed(settings) >= 25
    assert await sql.fetchval("SELECT count(*) FROM changes") == 0
    feed = await sql.fetchrow("SELECT last_position, pruned_position FROM change_feed")
    assert feed["last_position"] == feed["pruned_position"]
    found = await page(http)
    assert found["items"] == []
    assert (await page(http, found["next"]))["items"] == []


async def test_page_that_pruning_overtakes_is_no_gap(
    http: httpx.AsyncClient, sql: asyncpg.Connection, settings: Settings
) -> None:
    """What is deleted between the look at the cursor and the page was not read."""
    start = await end(http)
    (user,) = await insert_users(sql, 1)
    await change_often(sql, user, 20)
    items = await arrived(http, start, 20)
    await sql.execute(
        "UPDATE changes SET at = now() - interval '8 days' WHERE position <= $1",
        int(items[9]["position"].split(".")[1]),
    )
    pruned: list[int] = []

    async def before(statement: str, _connection: object) -> None:
        if "changes.position >" in statement and not pruned:
            pruned.append(await prune_feed(settings))

    with around_direct(before):
        answer = await http.get(CHANGES, params={"after": start})
    assert pruned
    assert pruned[0] >= 10
    if answer.status_code == 200:
        assert [item["version"] for item in answer.json()["data"]["items"]] == list(range(1, 21))
    else:
        assert_failed(answer, 400, "invalid_cursor")
