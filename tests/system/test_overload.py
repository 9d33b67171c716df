"""More than the server can do: it says so at once, and stays small and alive."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import psutil
import redis

from ..servers import Server, serving
from .traffic import ask, person, register
from .trouble import bounded_in_time, until

CROWD = 500
HASH_QUEUE = 100
CALM = 0.5
"""Seconds a cached read may take while passwords are hashed on all cores of the machine."""
GROWTH = 128 * 2**20
"""Bytes: 500 requests and their connections, and 19 MiB for each of the hashes at once."""


class Log:
    """What a server has logged since this was made."""

    def __init__(self, server: Server) -> None:
        self._file = server.log
        self._skip = server.log.stat().st_size

    def lines_about(self, *words: str) -> list[str]:
        text = self._file.read_bytes()[self._skip :].decode()
        return [line for line in text.splitlines() if any(word in line for word in words)]


@asynccontextmanager
async def watched(server: Server, user: str) -> AsyncIterator[tuple[list[int], list[float]]]:
    """Yield the server's sizes in bytes and the seconds that reads took, as they come."""
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    sizes: list[int] = []
    reads: list[float] = []

    async def watch() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=10) as http:
            while True:
                began = time.monotonic()
                answer = await http.get(f"/api/v1/users/{user}")
                assert answer.status_code == 200, answer.text
                reads.append(time.monotonic() - began)
                sizes.append(process.memory_info().rss)
                await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    try:
        yield sizes, reads
    finally:
        assert not watching.done() or watching.exception() is None
        watching.cancel()


@bounded_in_time
async def test_crowd_of_registrations_is_served_or_told_to_wait(
    database_url: str, redis_url: str
) -> None:
    with serving(database_url, redis_url, HASH_QUEUE=str(HASH_QUEUE)) as server:
        log = Log(server)
        (user,) = await register(server.url, 1, prefix="reader")
        async with watched(server, user) as (sizes, reads):
            await until(lambda: len(sizes) >= 5, 5)
            before = sizes[-1]
            reads.clear()
            crowd = (
                ask(server, "POST", "/api/v1/users/", person(f"crowd{n}")) for n in range(CROWD)
            )
            answers = await asyncio.gather(*crowd)
        done = [answer for answer in answers if answer.status_code == 201]
        refused = [answer for answer in answers if answer.status_code != 201]
        assert len(done) >= HASH_QUEUE
        assert refused, f"{CROWD} at once were no overload: the test shows nothing"
        for answer in refused:
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "overloaded"
            assert int(answer.headers["Retry-After"]) >= 1
        assert max(sizes) - before < GROWTH
        assert sorted(reads)[int(len(reads) * 0.95)] < CALM

        health = (await ask(server, "GET", "/health")).json()["data"]
        assert health["status"] == "healthy"
        for answer in done:
            assert (await ask(server, "GET", answer.headers["Location"])).status_code == 200
        assert log.lines_about("request.crashed") == []
        assert log.lines_about("unreachable") == [], "an overload is no outage"


@bounded_in_time
async def test_burst_of_cold_reads_is_no_outage(server: Server, redis_url: str) -> None:
    log = Log(server)
    users = await register(server.url, 100, prefix="cold")
    with redis.Redis.from_url(redis_url) as connection:
        connection.flushdb()
    burst = (ask(server, "GET", f"/api/v1/users/{user}") for user in users)
    answers = await asyncio.gather(*burst)
    assert {answer.status_code for answer in answers} == {200}
    assert log.lines_about("unreachable") == [], "Redis was there all the time"
    with redis.Redis.from_url(redis_url) as connection:
        kept = set(connection.scan_iter("user-service:*:{b*}:*"))  # beside counters of limits
        assert len(kept) == len(users)


@bounded_in_time
async def test_crowd_that_writes_to_one_user_leaves_the_others_alone(server: Server) -> None:
    busy, quiet = await register(server.url, 2, prefix="busy")
    log = Log(server)
    path = f"/api/v1/users/{busy}"
    async with watched(server, quiet) as (_, reads):
        crowd = (ask(server, "PATCH", path, {"name": f"N {n}"}) for n in range(200))
        answers = await asyncio.gather(*crowd)
    versions = [a.json()["data"]["version"] for a in answers if a.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert sorted(versions) == list(range(2, len(versions) + 2))
    assert all(answer.json()["error"]["code"] == "overloaded" for answer in refused)
    assert all("Retry-After" in answer.headers for answer in refused)
    assert sorted(reads)[int(len(reads) * 0.95)] < CALM
    final = (await ask(server, "GET", path)).json()["data"]
    assert final["version"] == max(versions)
    assert log.lines_about("unreachable") == [], "Redis was there all the time"
