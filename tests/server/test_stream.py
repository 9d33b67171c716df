"""The change stream of one process, event by event, with readers that are as slow as they like."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import asyncpg
import httpx
import pytest
from litestar import Litestar
from user_service_server.app import create_app
from user_service_server.changes import feed as feed_module
from user_service_server.changes import stream as stream_module
from user_service_server.embedded import EmbeddedPostgres
from user_service_server.periodic import Periodic
from user_service_server.settings import Settings
from user_service_server.storage.state import renew_epoch

from ..engines import settings_for
from ..system.subscribers import (
    Event,
    EventParser,
    change,
    change_often,
    connected,
    insert_users,
    stream_scope,
)
from ..system.trouble import stopped, until
from .test_changes import prune_feed

SOON = 5.0
"""Seconds for what takes some looks at the log."""


class Reader:
    """Follows the stream of an app in this process; it takes what it is sent until told not to."""

    def __init__(self, app: Litestar, last_event_id: str | None = None) -> None:
        self._app: Any = app  # Litestar's ASGI types are narrower
        self._last = last_event_id
        self.cursor = last_event_id
        """The id of the last event that was asked for."""
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._takes = asyncio.Event()
        self._takes.set()
        self._gone = asyncio.Event()
        self._parser = EventParser()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.refusal = b""
        self.offered = asyncio.Event()
        """Set when the first piece of the stream is there to be taken."""
        self.ended = asyncio.Event()
        """Set when the server has ended the answer in good order."""

    async def __aenter__(self) -> Self:
        headers = [(b"last-event-id", self._last.encode())] if self._last else []
        scope = stream_scope(*headers)
        self._task = asyncio.create_task(self._app(scope, self._receive, self._send))
        return self

    async def __aexit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.disconnect()
        async with asyncio.timeout(SOON):
            await self._task

    async def _receive(self) -> dict[str, str]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
            return
        self.offered.set()
        await self._takes.wait()
        if self.status == 200:
            self._events += self._parser.feed(message["body"])
        else:
            self.refusal += message["body"]
        if not message.get("more_body"):
            self.ended.set()
        self._news.set()

    def stop_reading(self) -> None:
        self._takes.clear()

    def go_on_reading(self) -> None:
        self._takes.set()

    def disconnect(self) -> None:
        self._gone.set()
        self._takes.set()

    async def next(self) -> Event:
        """Return the next event, whatever it is."""
        async with asyncio.timeout(SOON):
            while not self._events:
                self._news.clear()
                await self._news.wait()
        event = self._events.popleft()
        self.cursor = event.id or self.cursor
        return event

    async def take(self, name: str) -> Event:
        """Return the next event of this name, past others."""
        while (event := await self.next()).name != name:
            pass
        return event

    async def versions_of(self, user: str, up_to: int) -> list[int]:
        """Return the user's versions as they came, up to and with this one."""
        versions: list[int] = []
        while not versions or versions[-1] != up_to:
            event = await self.take("change")
            if event.data["user_id"] == user:
                versions.append(event.data["version"])
        return versions

    def drain(self, name: str) -> list[Event]:
        """Return the events of this name that came, past others."""
        found = []
        while self._events:
            event = self._events.popleft()
            self.cursor = event.id or self.cursor
            found += [event] if event.name == name else []
        return found

    @property
    def finished(self) -> bool:
        """Whether the server is done with it, in good order or not."""
        return self._task.done()

    @property
    def left(self) -> list[Event]:
        """What came and was not asked for."""
        return list(self._events)


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    async with connected(database_url) as connection:
        yield connection


@pytest.fixture
async def user(sql: asyncpg.Connection) -> str:
    return (await insert_users(sql, 1))[0]


@pytest.fixture
async def restless(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Litestar]:
    """An app with a heartbeat at each look at the log."""
    monkeypatch.setattr(feed_module, "HEARTBEAT_INTERVAL", 0.0)
    app = create_app(settings)
    async with app.lifespan():
        yield app


async def end_of(app: Litestar, sql: asyncpg.Connection) -> str:
    """Return the cursor behind all that is committed, when the app has read that far."""
    async with Reader(app) as reader:
        await reader.take("heartbeat")
        (mark,) = await insert_users(sql, 1)
        await change(sql, mark)
        await reader.versions_of(mark, 1)
    async with Reader(app) as reader:
        ready = await reader.take("ready")
    assert ready.id is not None
    return ready.id


async def id_of(sql: asyncpg.Connection, user: str, version: int) -> str:
    """Return the id of the event of a change that has a position."""
    return str(
        await sql.fetchval(
            "SELECT epoch || '.' || position FROM changes, service_state"
            " WHERE user_id = $1 AND version = $2",
            user,
            version,
        )
    )


async def metric(http: httpx.AsyncClient, series: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(series))


async def test_stream_from_now_on_begins_with_a_place_to_continue_from(
    app: Litestar, sql: asyncpg.Connection, user: str
) -> None:
    await change(sql, user)
    end = await end_of(app, sql)
    async with Reader(app) as reader:
        ready = await reader.next()
        assert (ready.name, ready.id) == ("ready", end)
        assert ready.data["through"] <= ready.data["now"]
        assert (await reader.next()).name == "heartbeat"
        await change(sql, user)
        event = await reader.take("change")
    assert event.data | {"at": ""} == {
        "position": event.id,
        "user_id": user,
        "version": 2,
        "kind": "user.updated",
        "at": "",
        "actor": None,
    }
    async with Reader(app, ready.id) as reader:
        again = await reader.next()
    assert (again.name, again.id, again.data) == (event.name, event.id, event.data)


async def test_stream_is_not_to_be_buffered_or_kept(app: Litestar) -> None:
    async with Reader(app) as reader:
        await reader.take("ready")
    assert reader.headers[b"content-type"] == b"text/event-stream"
    assert reader.headers[b"cache-control"] == b"no-store"
    assert reader.headers[b"x-accel-buffering"] == b"no"


async def test_last_event_id_replays_from_memory_and_before_it_from_postgres(
    app: Litestar, sql: asyncpg.Connection, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "TAIL_BYTES", 20_000)  # about a hundred events
    start = await end_of(app, sql)
    await change_often(sql, user, 2_500)
    await end_of(app, sql)
    version = 2_500
    for known in (0, 1, 1_500, 2_450):
        async with Reader(app, await id_of(sql, user, known) if known else start) as reader:
            assert await reader.versions_of(user, version) == list(range(known + 1, version + 1))
            version += 1
            await change(sql, user)
            assert await reader.versions_of(user, version) == [version]


async def test_heartbeats_tell_that_an_idle_feed_is_complete(
    restless: Litestar,
) -> None:
    async with Reader(restless) as reader:
        first = (await reader.take("heartbeat")).data
        assert first["through"] <= first["now"]
        while (later := (await reader.take("heartbeat")).data)["through"] == first["through"]:
            pass
    assert first["through"] < later["through"] <= later["now"]


async def test_heartbeats_go_on_without_postgres_and_through_stays(
    restless: Litestar, http: httpx.AsyncClient, postgres: EmbeddedPostgres, database_url: str
) -> None:
    async with Reader(restless) as reader:
        await reader.take("heartbeat")
        async with stopped(postgres):
            # What was read before may still be on its way.
            await until(lambda: len(reader.left) > 5, SOON)
            before = reader.left[-1].data
            seen = len(reader.left)
            await until(lambda: len(reader.left) > seen + 10, SOON)
            latest = reader.left[-1].data
            assert latest["through"] == before["through"]
            assert latest["now"] > before["now"]
        await until(lambda: bool(reader.left[-1].data["through"] > latest["through"]), SOON)
        async with connected(database_url) as sql:
            (user,) = await insert_users(sql, 1)
            await change(sql, user)
        assert await reader.versions_of(user, 1) == [1]

    async def is_back() -> bool:
        return (await http.get("/health")).status_code == 200

    await until(is_back, SOON)  # for the app that the other tests have


async def test_cursor_of_another_epoch_is_reset(
    app: Litestar, sql: asyncpg.Connection, user: str
) -> None:
    end = await end_of(app, sql)
    async with Reader(app, "00000000.1") as reader:
        reset = await reader.next()
        assert (reset.name, reset.data, reset.id) == ("reset", {"reason": "epoch"}, end)
        await change(sql, user)
        assert await reader.versions_of(user, 1) == [1]


async def test_cursor_of_the_future_is_reset(app: Litestar, sql: asyncpg.Connection) -> None:
    """A restore without a new epoch: it has seen what is not there any more."""
    epoch, position = (await end_of(app, sql)).split(".")
    async with Reader(app, f"{epoch}.{int(position) + 1}") as reader:
        reset = await reader.next()
    assert (reset.name, reset.data) == ("reset", {"reason": "epoch"})


@pytest.mark.parametrize(
    "junk", ["junk", "a.", ".1", "a.b", "a.-1", "a." + "1" * 80, "a.1.2", "a.²"]
)
async def test_last_event_id_that_is_no_cursor_is_refused(app: Litestar, junk: str) -> None:
    async with Reader(app, junk) as reader:
        await reader.ended.wait()
    assert reader.status == 400
    assert b'"invalid_cursor"' in reader.refusal


async def test_new_epoch_ends_streams_and_resets_those_who_come_back(
    settings: Settings, app: Litestar, sql: asyncpg.Connection, user: str
) -> None:
    async with Reader(app) as reader:
        ready = await reader.take("ready")
        epoch = await renew_epoch(settings)
        async with asyncio.timeout(SOON):
            await reader.ended.wait()
    async with Reader(app, ready.id) as reader:
        reset = await reader.next()
        assert (reset.name, reset.data) == ("reset", {"reason": "epoch"})
        assert reset.id is not None
        assert reset.id.startswith(f"{epoch}.")
        await change(sql, user)
        assert await reader.versions_of(user, 1) == [1]


async def test_new_epoch_while_a_stream_begins_is_told(
    settings: Settings, app: Litestar, sql: asyncpg.Connection, user: str
) -> None:
    """A slow reader takes a while between the look at its cursor and the first change."""
    start = await end_of(app, sql)
    async with Reader(app) as other:
        await other.take("heartbeat")
        reader = Reader(app, start)
        reader.stop_reading()
        async with reader:
            await reader.offered.wait()
            await renew_epoch(settings)
            await other.ended.wait()
            reader.go_on_reading()
            await change(sql, user)
            await until(
                lambda: (
                    reader.ended.is_set()
                    or any(event.name in {"reset", "change"} for event in reader.left)
                ),
                SOON,
            )
            told = [event.name for event in reader.left if event.name != "heartbeat"]
    assert told[:1] == ["reset"] or (told == [] and reader.ended.is_set())


async def test_cursor_older_than_what_is_kept_is_reset(
    settings: Settings, app: Litestar, sql: asyncpg.Connection, user: str
) -> None:
    start = await end_of(app, sql)
    await change(sql, user)
    await end_of(app, sql)
    await sql.execute("UPDATE changes SET at = at - interval '8 days'")
    await prune_feed(settings)
    end = await end_of(app, sql)
    async with Reader(app, start) as reader:
        reset = await reader.next()
    assert (reset.name, reset.data, reset.id) == ("reset", {"reason": "age"}, end)


async def test_stream_ends_after_its_life_and_continues_without_loss(
    database_url: str, redis_url: str, sql: asyncpg.Connection, user: str
) -> None:
    short_lived = create_app(settings_for(database_url, redis_url, STREAM_MAX_LIFE="1"))
    versions: list[int] = []
    ends = 0
    async with short_lived.lifespan():
        cursor: str | None = await end_of(short_lived, sql)
        version = 0
        while ends < 2:
            async with Reader(short_lived, cursor) as reader:
                while not reader.ended.is_set():
                    version += 1
                    await change(sql, user)
                    await until(lambda: reader.ended.is_set() or bool(reader.left), SOON)
                    versions += [e.data["version"] for e in reader.drain("change")]
                cursor = reader.cursor
                ends += 1
            version += 1
            await change(sql, user)  # while nobody is there
        async with Reader(short_lived, cursor) as reader:
            versions += await reader.versions_of(user, version)
    assert versions == list(range(1, version + 1))


async def test_reader_that_leaves_is_forgotten(app: Litestar, http: httpx.AsyncClient) -> None:
    ended = await metric(http, 'user_service_streams_ended_total{reason="client"}')
    async with Reader(app) as one, Reader(app) as other:
        await one.take("heartbeat")
        await other.take("heartbeat")
        assert await metric(http, "user_service_stream_subscribers ") == 2
        one.disconnect()
        await until(lambda: one.finished, SOON)
        assert await metric(http, "user_service_stream_subscribers ") == 1
    assert await metric(http, "user_service_stream_subscribers ") == 0
    assert await metric(http, 'user_service_streams_ended_total{reason="client"}') == ended + 2


async def test_reader_that_does_not_read_is_cut_off_and_goes_on_later(
    app: Litestar,
    http: httpx.AsyncClient,
    sql: asyncpg.Connection,
    user: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed_module, "QUEUE_BYTES", 100_000)
    cursor = await end_of(app, sql)
    async with Reader(app, cursor) as slow, Reader(app, cursor) as brisk:
        await slow.take("heartbeat")
        slow.stop_reading()
        for version in range(100, 2_100, 100):
            await change_often(sql, user, 100)
            assert await brisk.versions_of(user, version) == list(range(version - 99, version + 1))
        slow.go_on_reading()
        await until(slow.ended.is_set, SOON)
        changes = [event for event in slow.left if event.name == "change"]
        assert len(changes) < 700, "more was kept for it than the queue may hold"
        seen = [event.data["version"] for event in changes]
        assert seen == list(range(1, len(seen) + 1))
    assert await metric(http, 'user_service_streams_ended_total{reason="too_slow"}') > 0
    async with Reader(app, changes[-1].id) as slow:
        assert await slow.versions_of(user, 2_000) == list(range(len(seen) + 1, 2_001))


async def test_reader_that_takes_nothing_for_long_is_cut_off(
    app: Litestar,
    http: httpx.AsyncClient,
    sql: asyncpg.Connection,
    user: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "SEND_TIMEOUT", 0.1)
    async with Reader(app) as reader:
        await reader.take("heartbeat")
        reader.stop_reading()
        await change(sql, user)
        await until(lambda: reader.finished, SOON)
    assert await metric(http, "user_service_stream_subscribers ") == 0


async def test_reader_that_pauses_while_it_catches_up_misses_nothing(
    app: Litestar, sql: asyncpg.Connection, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut off, or it gets what it did not take in time."""
    monkeypatch.setattr(feed_module, "TAIL_BYTES", 20_000)
    start = await end_of(app, sql)
    await change_often(sql, user, 10_000)
    await end_of(app, sql)
    monkeypatch.setattr(stream_module, "SEND_TIMEOUT", 0.1)
    async with Reader(app, start) as reader:
        first = await reader.take("change")
        reader.stop_reading()
        await asyncio.sleep(0.25)  # longer than a send may take, twice
        reader.go_on_reading()
        await until(lambda: reader.finished or len(reader.left) > 3_000, SOON)
        # The mark of `end_of` is somewhere among them, where the id of its user puts it.
        changes = [event.data for event in (first, *reader.left) if event.name == "change"]
    versions = [change["version"] for change in changes if change["user_id"] == user]
    assert versions == list(range(1, len(versions) + 1))


async def test_reader_that_comes_from_a_server_that_is_ahead_is_not_sent_back(
    settings: Settings,
    app: Litestar,
    sql: asyncpg.Connection,
    user: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one user, versions never go back, whichever server a stream is continued at."""
    with monkeypatch.context() as patch:
        patch.setattr(
            feed_module, "Periodic", lambda name, work, _often: Periodic(name, work, lambda: 1.5)
        )
        behind = create_app(settings)
    async with behind.lifespan(), Reader(app) as reader:
        await reader.take("heartbeat")
        await change_often(sql, user, 3)
        assert await reader.versions_of(user, 2) == [1, 2]
        async with Reader(behind, reader.cursor) as continued:
            await change(sql, user)
            assert await continued.versions_of(user, 4) == [3, 4]


async def test_feed_goes_on_at_once_after_a_backlog(
    settings: Settings, sql: asyncpg.Connection, user: str
) -> None:
    """What took long to catch up with is no reason to look away from what comes then."""
    app = create_app(settings)
    async with app.lifespan(), Reader(app) as reader:
        await reader.take("heartbeat")
        await change_often(sql, user, 20_000)
        await reader.versions_of(user, 20_000)
        await change(sql, user)
        async with asyncio.timeout(0.5):
            await reader.versions_of(user, 20_001)
