"""How a server comes up before what it needs, and how it goes without losing an answer."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from ..engines import Engines
from ..servers import Server, serving
from .traffic import Answer, Traffic, person, register
from .trouble import until

STARTS_WITHIN = 15.0


@pytest.fixture
def starting(own_engines: Engines) -> Iterator[Server]:
    """A server that is not started yet, on engines of its own, with a migrated database."""
    database = own_engines.create_database("waiting")
    server = Server({"DATABASE_URL": database, "REDIS_URL": own_engines.valkey.url})
    yield server
    if server.process is not None:
        server.kill()
    server.log.unlink()


def logged(server: Server, *events: str) -> list[dict[str, Any]]:
    """Return the lines of the log about these events, without one that is being written."""
    lines = [line for line in server.log.read_text().splitlines(keepends=True) if line[-1] == "\n"]
    return [entry for line in lines if (entry := json.loads(line))["event"] in events]


def is_listening(server: Server) -> bool:
    try:
        httpx.get(f"{server.url}/health/ready", timeout=1)
    except httpx.ConnectError:
        return False
    return True


def health(server: Server) -> tuple[int, str]:
    answer = httpx.get(f"{server.url}/health")
    return answer.status_code, answer.json()["data"]["status"]


async def test_server_started_before_postgres_waits_for_it(
    starting: Server, own_engines: Engines
) -> None:
    own_engines.postgres.stop()
    starting.start(wait=False)
    await until(lambda: logged(starting, "postgres.waiting") != [], STARTS_WITHIN)
    # Two more looks at Postgres, about which nothing new is to be said.
    await asyncio.sleep(1.2)
    assert not is_listening(starting)
    (line,) = logged(starting, "postgres.waiting")
    assert line["level"] == "warning"
    assert "Postgres (DATABASE_URL)" in line["waiting_for"]
    assert line["up_to_seconds"] == 60

    own_engines.postgres.start()
    await asyncio.to_thread(starting.wait_until_ready)
    assert await register(starting.url, 1) != []
    assert len(logged(starting, "postgres.waiting")) == 1
    assert logged(starting, "request.crashed") == []


async def test_server_started_before_redis_waits_for_it(
    starting: Server, own_engines: Engines
) -> None:
    own_engines.valkey.stop()
    starting.start(wait=False)
    await until(lambda: logged(starting, "redis.waiting") != [], STARTS_WITHIN)
    assert not is_listening(starting)
    own_engines.valkey.start()
    came = time.monotonic()
    await asyncio.to_thread(starting.wait_until_ready)
    assert time.monotonic() - came < 2
    assert len(logged(starting, "redis.waiting")) == 1
    assert health(starting) == (200, "healthy")


async def test_server_serves_without_a_redis_that_does_not_come(
    starting: Server, own_engines: Engines
) -> None:
    own_engines.valkey.stop()
    await asyncio.to_thread(starting.start)
    assert len(logged(starting, "redis.waiting", "redis.missing")) == 2
    assert health(starting) == (200, "degraded")
    assert await register(starting.url, 1) != []
    own_engines.valkey.start()
    await until(lambda: health(starting) == (200, "healthy"), 2)


async def test_server_on_an_empty_database_names_the_command_that_it_waits_for(
    starting: Server, own_engines: Engines
) -> None:
    starting.environ["DATABASE_URL"] = own_engines.postgres.create_database("empty")
    starting.start(wait=False)
    await until(lambda: logged(starting, "postgres.waiting") != [], STARTS_WITHIN)
    (line,) = logged(starting, "postgres.waiting")
    assert "user-service migrate" in line["waiting_for"]
    assert not is_listening(starting)

    migrate = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "user_service_server", "migrate"),
        env={**starting.environ, "AUTH": "off"},
        cwd=starting.log.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert await migrate.wait() == 0
    await asyncio.to_thread(starting.wait_until_ready)
    assert await register(starting.url, 1) != []
    # A table that is not there yet is waited for, not stumbled over.
    assert "ERROR" not in own_engines.postgres.log_path.read_text()


async def test_server_gives_up_waiting_for_postgres_with_one_line(
    starting: Server, own_engines: Engines
) -> None:
    own_engines.postgres.stop()
    starting.environ["STARTUP_TIMEOUT"] = "0.5"
    starting.start(wait=False)
    assert starting.process is not None
    assert await asyncio.to_thread(starting.process.wait, STARTS_WITHIN) == 1
    starting.process = None
    last = starting.log.read_text().splitlines()[-1]
    assert last.startswith("the service did not start: ")
    assert "Traceback" not in starting.log.read_text()


async def test_sigterm_is_followed_by_the_grace_and_then_the_end(
    database_url: str, redis_url: str
) -> None:
    with serving(database_url, redis_url, SHUTDOWN_GRACE="1.5") as server:
        users = await register(server.url, 4, prefix="grace")
        assert server.process is not None
        async with (
            Traffic(server.url, read=users[:2], write=users[2:]) as traffic,
            httpx.AsyncClient(base_url=server.url) as probe,
        ):
            await traffic.go_on(0.3)
            server.process.terminate()
            told = time.monotonic()
            answer = await probe.get("/health/ready")
            while answer.status_code == 200:
                answer = await probe.get("/health/ready")
            assert time.monotonic() - told < 0.25
            assert answer.status_code == 503
            assert answer.json()["success"] is False
            assert (await probe.get("/health/live")).status_code == 200
            in_grace = await traffic.go_on(told + 1.2 - time.monotonic())
            code = await asyncio.to_thread(server.process.wait, 5)
            after = time.monotonic() - told
        assert code == 0
        assert 1.5 <= after < 3
        server.process = None
        for work in ("read", "write"):
            assert len(served := traffic.of(work, in_grace)) > 10
            assert {answer.status for answer in served} == {200}
        # Behind the grace: answered, or told by a closed connection before it was taken.
        assert {a.status for a in traffic.answers if not was_refused(a)} == {200}
        assert logged(server, "request.crashed") == []


def was_refused(answer: Answer) -> bool:
    """Whether the caller knows that nothing was done: there was nobody to take the request."""
    return answer.code in ("ConnectError", "ReadError", "RemoteProtocolError") and (
        answer.seconds < 0.1
    )


async def test_registrations_under_way_at_sigterm_are_answered_and_kept(
    database_url: str, redis_url: str
) -> None:
    people = [person(f"underway{number}") for number in range(20)]
    with serving(database_url, redis_url, HASH_CONCURRENCY="1") as server:
        assert server.process is not None
        async with httpx.AsyncClient(base_url=server.url, timeout=15) as http:
            asked = [asyncio.create_task(http.post("/api/v1/users/", json=one)) for one in people]
            # One hash at a time: with the first answer, the others wait for theirs.
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            assert sum(task.done() for task in asked) < len(asked) / 2
            server.process.terminate()
            answers = await asyncio.gather(*asked)
        assert await asyncio.to_thread(server.process.wait, 5) == 0
        server.process = None
        assert {answer.status_code for answer in answers} == {201}
        assert logged(server, "request.crashed") == []
        server.start()
        async with httpx.AsyncClient(base_url=server.url) as http:
            for answer in answers:
                read = await http.get(answer.headers["Location"])
                assert read.json()["data"] == answer.json()["data"]
