"""When a streaming replica is believed, and when what it holds may be cached."""

import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime

import httpx
import pytest
import redis
from user_service_schemas import Change, ChangeKind
from user_service_server.app import create_app
from user_service_server.embedded import EmbeddedValkey
from user_service_server.metrics import Metrics
from user_service_server.settings import Settings
from user_service_server.storage.database import Database
from user_service_server.storage.document import DocumentShape
from user_service_server.storage.replica import KNOWN_FOR, Replica
from user_service_server.storage.state import StateWatcher

from ..engines import Engines, open_dir, settings_for
from ..standby import Pair, replicated
from ..system.traffic import person
from ..system.trouble import until

USER = "01890000-0000-7000-8000-000000000001"


@pytest.fixture
def replica(settings: Settings) -> Replica:
    """A replica of which only is told what the feed brings; it is never asked."""
    used = settings_for(
        settings.database_url, settings.redis_url, DATABASE_REPLICA_URL=settings.database_url
    )
    metrics = Metrics()
    state = StateWatcher(used, Database(used), metrics)
    return Replica(used, state, DocumentShape(used), metrics)


def changed(version: int) -> Change:
    """Return a change to this version."""
    at = datetime.now(UTC)
    return Change(
        position=f"e.{version}",
        user_id=USER,
        version=version,
        kind=ChangeKind.USER_UPDATED,
        at=at,
        actor=None,
    )


async def test_what_was_read_is_cached_when_a_later_look_brings_nothing_newer(
    replica: Replica,
) -> None:
    before = time.monotonic()
    current = replica.settle({USER: 2})
    replica.looked(before, 7)
    assert not current.done(), "that look began before it was read"
    replica.saw([changed(2)])
    replica.looked(time.monotonic(), 8)
    assert current.result() == {USER}


async def test_what_a_later_look_brings_something_newer_of_is_not_cached(replica: Replica) -> None:
    before = time.monotonic()
    current = replica.settle({USER: 2})
    replica.saw([changed(3)])
    replica.looked(before, 8)
    assert not current.done()
    replica.looked(time.monotonic(), 8)
    assert current.result() == set()


@pytest.fixture(scope="module", name="pair")
def started_pair(engines: Engines) -> Iterator[tuple[Pair, Settings]]:
    with open_dir() as directory, replicated(directory) as pair:
        url = Engines(pair.primary, engines.valkey).create_database("replicated")
        replica_url = pair.standby.url("replicated")
        yield pair, settings_for(url, engines.valkey.url, DATABASE_REPLICA_URL=replica_url)


@pytest.fixture(scope="module", name="replicated_http")
async def http_of_an_app_with_a_replica(
    pair: tuple[Pair, Settings],
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(pair[1])
    async with (
        app.lifespan(),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),  # type: ignore[arg-type]  # narrower types
            base_url="http://test",
            timeout=30,
        ) as client,
    ):
        yield client


async def test_a_replica_is_believed_if_it_shows_what_a_fresh_look_found(
    pair: tuple[Pair, Settings], replicated_http: httpx.AsyncClient
) -> None:
    answer = await replicated_http.post("/api/v1/users/", json=person("known"))
    user = answer.json()["data"]["id"]
    metrics, database = Metrics(), Database(pair[1])
    state = StateWatcher(pair[1], database, metrics)
    await state.look()
    replica = Replica(pair[1], state, DocumentShape(pair[1]), metrics)

    async def reads(age: float, position: int) -> bool:
        replica.is_well = True
        replica.looked(time.monotonic() - age, position)
        return user in await replica.read([user])

    async def is_there() -> bool:
        return await reads(0, 0)

    try:
        await until(is_there, 10)
        assert not await reads(KNOWN_FOR, 0), "what others wrote since is not known"
        assert not await reads(0, 10**9), "it lags"
        assert not replica.is_well, "others would be read there until it was probed"
        before = time.monotonic()
        replica.wrote([user])
        assert not await reads(time.monotonic() - before, 0), "written since that look"
        assert await reads(0, 0)
    finally:
        await replica.close()
        await state.close()
        await database.close()


async def says(http: httpx.AsyncClient, status: str) -> bool:
    """Whether `/health` says this of the replica."""
    answer = await http.get("/health")
    return bool(answer.json()["data"]["dependencies"]["replica"]["status"] == status)


async def used(http: httpx.AsyncClient) -> float:
    """Return how many documents were read from the replica."""
    name = 'user_service_replica_reads_total{result="used"}'
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def forget(valkey: EmbeddedValkey) -> None:
    """Empty the cache: what is read next, is a miss."""
    with redis.Redis.from_url(valkey.url) as connection:
        connection.flushall()


async def test_a_miss_is_read_from_the_replica_and_nothing_older_than_was_acknowledged(
    pair: tuple[Pair, Settings], replicated_http: httpx.AsyncClient, valkey: EmbeddedValkey
) -> None:
    """Written, and registered, while the replica stands still: the primary is read."""
    http, standby = replicated_http, pair[0].standby
    answer = await http.post("/api/v1/users/", json=person("replicated"))
    path = f"/api/v1/users/{answer.json()['data']['id']}"

    async def is_read_there() -> bool:
        forget(valkey)
        before = await used(http)
        assert (await http.get(path)).status_code == 200
        return await used(http) > before

    await until(is_read_there, 20)
    standby.pause_replay()
    for version in (2, 3, 4):
        assert (await http.patch(path, json={"name": f"Name {version}"})).status_code == 200
        for _ in range(3):
            forget(valkey)
            assert (await http.get(path)).json()["data"]["version"] == version
    answer = await http.post("/api/v1/users/", json=person("unseen"))
    forget(valkey)
    assert (await http.get(f"/api/v1/users/{answer.json()['data']['id']}")).status_code == 200

    async def is_behind() -> bool:
        return await says(http, "behind")

    async def is_up() -> bool:
        return await says(http, "up")

    await until(is_behind, 20)
    standby.resume_replay()
    await until(is_up, 20)
    await until(is_read_there, 20)
    assert (await http.get(path)).json()["data"]["version"] == 4
