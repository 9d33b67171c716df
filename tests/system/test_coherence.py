"""Two servers on one database and one Redis: what is read is never older than promised.

The short form of `chaos/test_coherence.py`, which goes on for minutes; what a restored database
does to what was known of it before; and what the checker of all this condemns.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import asyncpg
import httpx
import psutil
import pytest
import redis
from user_service_server.settings import load_settings
from user_service_server.storage import state

from ..chaos.faults import kill_between_commit_and_publication, redis_flushed
from ..chaos.history import GONE, NEVER, History, Move, Read, Write, lag, violations
from ..chaos.load import PAST_THE_CACHE, Load
from ..chaos.replicas import Replicas, replicas
from .traffic import register
from .trouble import paused, until

# A busy machine is late, and nothing is cached for ten seconds after a Redis that was.
PATIENT = {"REDIS_TIMEOUT_MS": "2000"}
SECOND_BOUND = 1.0
"""Seconds after which nothing older is read, whatever fails."""
FIRST_BOUND = 0.020
"""Seconds after which nothing older is read of another server's writes, for 99.9 % of them."""


@pytest.fixture(scope="module", name="replicas")
async def two_servers() -> AsyncIterator[Replicas]:
    async with replicas(**PATIENT) as started:
        yield started


async def test_nothing_older_than_promised_is_read(replicas: Replicas) -> None:
    async with Load(replicas.ports) as load:
        await load.go_on(2)
        # It is a load when all that is checked has happened: later on a busy machine.
        while not (len(load.history.reads) > 1000 and load.has_deleted):
            await load.go_on(0.1)
    assert violations(load.history, SECOND_BOUND) == []
    assert lag(load.history).p999 <= FIRST_BOUND
    assert not load.refused
    assert await load.at_rest() == []


async def test_nothing_stale_is_read_after_faults(replicas: Replicas) -> None:
    async with Load(replicas.ports) as load:
        await redis_flushed(replicas, load, 0.5)
        assert not load.refused
        await kill_between_commit_and_publication(replicas)
        await load.go_on(SECOND_BOUND + 0.3)
    assert violations(load.history, SECOND_BOUND) == []
    assert set(load.refused) <= {0}
    await asyncio.to_thread(replicas.servers[0].start)
    assert await load.at_rest() == []


async def test_what_a_killed_server_committed_and_did_not_publish_is_read(
    replicas: Replicas,
) -> None:
    first, second = replicas.servers
    (user,) = await register(first.url, 1, prefix=uuid.uuid4().hex)
    async with httpx.AsyncClient() as http:
        path = f"/api/v1/users/{user}"
        assert (await http.get(second.url + path)).json()["data"]["version"] == 1
        replicas.gate.before_publication = first.kill
        with pytest.raises(httpx.TransportError):
            await http.patch(first.url + path, json={"name": "Committed"})
        assert (await http.get(second.url + path)).json()["data"]["name"] == "Committed"
    await asyncio.to_thread(first.start)


@asynccontextmanager
async def locked(
    replicas: Replicas, user: str
) -> AsyncIterator[Callable[[], Coroutine[Any, Any, bool]]]:
    """Lock a user for a while; gives what tells whether anybody waits for that."""
    socket = {"host": str(replicas.postgres.socket_dir), "user": "postgres"}
    holder = await asyncpg.connect(**socket, database="replicas")
    watcher = await asyncpg.connect(**socket, database="replicas")

    async def is_waiting() -> bool:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        return bool(await watcher.fetchval(waiting))

    try:
        async with holder.transaction():
            await holder.execute("SELECT FROM users WHERE id = $1 FOR UPDATE", user)
            yield is_waiting
    finally:
        await holder.close()
        await watcher.close()


async def test_a_server_that_stood_still_does_not_read_what_was_left_behind_meanwhile(
    replicas: Replicas,
) -> None:
    first, second = replicas.servers
    (user,) = await register(second.url, 1, prefix=uuid.uuid4().hex)
    path = f"/api/v1/users/{user}"
    async with httpx.AsyncClient(base_url=second.url, timeout=10) as http:
        async with AsyncExitStack() as stack:
            async with locked(replicas, user) as is_waiting:
                writing = asyncio.create_task(http.patch(path, json={"name": "Left behind"}))
                await until(is_waiting, 2)
                # It has announced itself, and cannot publish in time; Redis hears of it late.
                await stack.enter_async_context(paused(replicas.valkey))
            assert (await writing).status_code == 200
        answer = await http.get(first.url + path)
        assert answer.json()["data"]["name"] == "Left behind"
        process = psutil.Process(first.pid)
        process.suspend()
        try:
            stopped = time.monotonic()
            assert (await http.patch(path, json={"name": "Written"})).status_code == 200
            # The requests are there when it goes on: no look comes before them.
            reading = [asyncio.create_task(http.get(first.url + path)) for _ in range(5)]
            await asyncio.sleep(max(0.1, stopped + SECOND_BOUND - time.monotonic()))
        finally:
            process.resume()
        names = [(await one).json()["data"]["name"] for one in reading]
    assert names == ["Written"] * 5


class Known(NamedTuple):
    """What callers know when the database is restored to a time before."""

    user: str
    untouched: str
    """Another user, who lost the same write."""
    etag: str
    cursor: str


async def known_of_a_lost_write(replicas: Replicas, http: httpx.AsyncClient) -> Known:
    """Back up, write, and restore: returns what is known of the write that was lost."""
    postgres, socket = replicas.postgres, str(replicas.postgres.socket_dir)
    dump = str(postgres.data_dir / "dump")

    async def run(program: str, *arguments: str) -> None:
        done = await asyncio.to_thread(postgres.run, program, "-h", socket, *arguments)
        assert done.returncode == 0, done.stderr

    user, untouched = await register(replicas.servers[0].url, 2, prefix=uuid.uuid4().hex)
    # With their positions in the feed: the next one is given twice, before the restore and after.
    for registered in (user, untouched):
        await position_of(http, registered, 1)
    await run("pg_dump", "-Fc", "-f", dump, "replicas")
    etag = await write_and_cache(replicas, http, user)
    cursor = await position_of(http, user, 2)
    assert await write_and_cache(replicas, http, untouched) == etag
    await run("psql", "-c", "DROP DATABASE replicas WITH (FORCE)")
    await run("createdb", "-T", "template0", "replicas")
    await run("pg_restore", "-d", "replicas", dump)

    async def is_back() -> bool:
        answers = [await http.get(f"{server.url}/api/v1/users") for server in replicas.servers]
        return all(answer.status_code == 200 for answer in answers)

    await until(is_back, 5)
    return Known(user, untouched, etag, cursor)


async def write_and_cache(replicas: Replicas, http: httpx.AsyncClient, user: str) -> str:
    """Write what will be lost, wait until it is cached, and return its entity tag."""
    written = await http.patch(f"/api/v1/users/{user}", json={"name": "Lost"})
    # It is stored behind the answer to a reader, if the writer did not.
    await http.get(f"/api/v1/users/{user}")
    with redis.Redis.from_url(replicas.valkey.url) as connection:
        await until(lambda: bool(connection.keys(f"*:{user}")), 2)
    return written.headers["ETag"]


async def position_of(http: httpx.AsyncClient, user: str, version: int) -> str:
    """Wait until a change is in the feed, and return its position."""
    after: dict[str, str] = {}
    async with asyncio.timeout(5):
        while True:
            answer = await http.get("/api/v1/changes", params={**after, "limit": 100})
            if answer.status_code == 503:
                await asyncio.sleep(0.1)  # on a busy machine Postgres is sometimes late
                continue
            assert answer.status_code == 200, answer.text
            page = answer.json()["data"]
            for change in page["items"]:
                if (change["user_id"], change["version"]) == (user, version):
                    return str(change["position"])
            after = {"after": page["next"]}


async def name_of(http: httpx.AsyncClient, user: str, **headers: str) -> str:
    answer = await http.get(f"/api/v1/users/{user}", headers=headers)
    return str(answer.json()["data"]["name"])


async def first_event(http: httpx.AsyncClient, cursor: str) -> str:
    headers = {"Last-Event-ID": cursor}
    async with http.stream("GET", "/api/v1/changes/stream", headers=headers) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("event:"):
                return line.removeprefix("event:").strip()
    raise AssertionError("the stream ended without an event")


# There is no damage to show where a late Redis made the servers leave all behind after the dump.
@pytest.mark.flaky(reruns=2)
async def test_what_was_known_before_a_restore_is_believed_until_the_epoch_is_renewed(
    replicas: Replicas,
) -> None:
    async with httpx.AsyncClient(base_url=replicas.servers[0].url, timeout=10) as http:
        async with http.stream("GET", "/api/v1/changes/stream") as live:
            known = await known_of_a_lost_write(replicas, http)
            path = f"/api/v1/users/{known.user}"
            held, seen = {"If-None-Match": known.etag}, {"If-Match": known.etag}

            # The damage: a cached document, a copy and a cursor of what never was.
            assert await name_of(http, known.untouched) == "Lost"
            assert await name_of(http, known.untouched, **PAST_THE_CACHE) != "Lost"
            await http.patch(path, json={"name": "Other"})
            assert (await http.get(path, headers=held)).status_code == 304
            assert await position_of(http, known.user, 2) == known.cursor
            answer = await http.get("/api/v1/changes", params={"after": known.cursor})
            assert answer.json()["data"]["items"] == []
            assert (await http.patch(path, json={"name": "Mistaken"}, headers=seen)).is_success

            await renew_epoch(replicas)
            async with asyncio.timeout(5):
                async for _ in live.aiter_lines():  # it ends, to be reset when it comes back
                    pass
        for server in replicas.servers:
            async with httpx.AsyncClient(base_url=server.url) as other:
                assert await name_of(other, known.untouched) != "Lost"
                assert await name_of(other, known.user, **held) == "Mistaken"
        assert (await http.patch(path, json={"name": "No more"}, headers=seen)).status_code == 412
        answer = await http.get("/api/v1/changes", params={"after": known.cursor})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_cursor")
        assert await first_event(http, known.cursor) == "reset"


async def renew_epoch(replicas: Replicas) -> None:
    """Renew the epoch, as `user-service epoch renew` does, and wait until both servers know.

    In this process: on a busy machine a command takes longer to start than a write waits.
    """
    epoch = await state.renew_epoch(load_settings(replicas.servers[1].environ, None))

    async def is_known() -> bool:
        async with httpx.AsyncClient() as http:
            answers = [await http.get(f"{s.url}/api/v1/changes") for s in replicas.servers]
        nexts = [answer.json()["data"]["next"] for answer in answers if answer.is_success]
        return [place.partition(".")[0] for place in nexts] == [epoch] * 2

    await until(is_known, 5)


async def test_a_write_under_way_while_the_epoch_is_renewed_is_read_afterwards(
    replicas: Replicas,
) -> None:
    (user,) = await register(replicas.servers[0].url, 1, prefix=uuid.uuid4().hex)
    path = f"/api/v1/users/{user}"
    first, second = (
        httpx.AsyncClient(base_url=server.url, timeout=10) for server in replicas.servers
    )
    async with first, second:
        async with locked(replicas, user) as is_waiting:
            writing = asyncio.create_task(second.patch(path, json={"name": "Written"}))
            await until(is_waiting, 2)
            await renew_epoch(replicas)
            for _ in range(2):
                assert (await first.get(path)).json()["data"]["version"] == 1
        assert (await writing).status_code == 200
        for http in (first, second):
            assert (await http.get(path)).json()["data"]["name"] == "Written"


# What the checker condemns. A second server of each history is 1, and the bound is a second.


def read(version: int, began: float, *, server: int = 0, **others: Any) -> Read:
    return Read("john", server, began, began + 0.1, version, **others)


def write(version: int, ended: float, *, server: int = 0) -> Write:
    return Write("john", server, ended - 0.1, ended, version)


RIGHT = {
    "nothing": History(),
    "what was written": History([write(2, 1)], [read(2, 2), read(3, 3)]),
    "old while it is written": History([write(2, 1)], [read(1, 0.95)]),
    "old of another server within the bound": History([write(2, 1)], [read(1, 1.9, server=1)]),
    "old of a write that was not answered": History([write(2, NEVER)], [read(1, 5)]),
    "back within the bound": History([], [read(2, 1), read(1, 1.9)]),
    "gone while it is deleted": History([write(GONE, 1)], [read(GONE, 0.95)]),
    "gone by a deletion without an answer": History(
        [Write("john", 0, 1, NEVER, GONE)], [read(GONE, 5, server=1)]
    ),
    "a token where it was, until it is moved": History(
        [],
        [read(1, 0.95, tokens=("t",))],
        [Move("t", "john", 0, 0, 0.1), Move("t", "jim", 0, 1, 2)],
    ),
    "a token whose move was not answered, at either": History(
        [],
        [read(1, 5, tokens=("t",))],
        [Move("t", "john", 0, 0, 0.1), Move("t", "jim", 0, 1, NEVER)],
    ),
}
WRONG = {
    "older than its server acknowledged": History([write(2, 1)], [read(1, 1.01)]),
    "older than the other server acknowledged": History([write(2, 1)], [read(1, 2.2, server=1)]),
    "went back": History([], [read(2, 1, server=1), read(1, 2.2)]),
    "a deleted user came back: older than its server acknowledged": History(
        [write(GONE, 1)], [read(7, 1.01)]
    ),
    "a deleted user came back: older than the other server acknowledged": History(
        [write(GONE, 1)], [read(7, 2.2, server=1)]
    ),
    "nobody has deleted it": History([write(1, 1)], [read(GONE, 2)]),
    "two contents of one version": History([], [read(2, 1, content=1), read(2, 1, content=2)]),
    "a token of somebody else": History(
        [],
        [read(1, 2.01, tokens=("t",))],
        [Move("t", "john", 0, 0, 0.1), Move("t", "jim", 0, 1, 2)],
    ),
    "below X-Min-Version": History([], [read(1, 1, at_least=2)]),
}


@pytest.mark.parametrize("history", RIGHT.values(), ids=RIGHT)
def test_the_checker_lets_pass(history: History) -> None:
    assert violations(history, 1.0) == []


@pytest.mark.parametrize(("rule", "history"), WRONG.items(), ids=WRONG)
def test_the_checker_condemns(rule: str, history: History) -> None:
    assert [violation.rule for violation in violations(history, 1.0)] == [rule]


def test_the_lag_of_a_write_is_until_the_last_older_read_of_the_other_server() -> None:
    history = History(
        [write(2, 1), write(3, 2), write(4, 5, server=1)],
        [read(1, 1.5, server=1), read(2, 2.5, server=1), read(2, 1.9), read(4, 6)],
    )
    measured = lag(history)
    assert measured.writes == 3
    assert measured.p50 == pytest.approx(0.5)
    assert measured.most == pytest.approx(0.5)
