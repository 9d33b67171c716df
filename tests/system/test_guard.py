"""Limits over real servers: exact for a caller, and for the passwords of one account."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx
import pytest
from user_service_server.settings import Settings

from ..keys import EVERYTHING, REQUIRED, make_key, showing
from ..servers import Server, serving
from .traffic import ask

VERIFY = "/api/v1/credentials/verify"
PASSWORD = "StrongPass123!"
FAILURES = 10
CALLERS = 50


@contextmanager
def two_servers(
    database_url: str, redis_url: str, **others: str
) -> Iterator[tuple[Server, Server]]:
    """Two processes that are patient with Redis: on a busy machine it is late."""
    options = {**REQUIRED, "REDIS_TIMEOUT_MS": "10000", **others}
    with (
        serving(database_url, redis_url, **options) as one,
        serving(database_url, redis_url, **options) as two,
    ):
        yield one, two


@pytest.fixture(scope="module")
async def keys(settings: Settings) -> list[Mapping[str, str]]:
    """What fifty callers show."""
    return [showing(await make_key(settings, f"caller-{i}", *EVERYTHING)) for i in range(CALLERS)]


async def test_of_four_hundred_at_once_over_two_processes_a_hundred_pass(
    database_url: str, redis_url: str, keys: list[Mapping[str, str]]
) -> None:
    with two_servers(database_url, redis_url, RATE_LIMIT_READ="100") as both:
        body = {"name": "L", "email": "limited@example.com", "password": PASSWORD}
        user = (await ask(both[0], "POST", "/api/v1/users", body, keys[0])).headers["Location"]
        # In the cache, so that Postgres need not serve 400 at once.
        assert (await ask(both[0], "GET", user, headers=keys[1])).status_code == 200
        answers = await asyncio.gather(
            *(ask(both[i % 2], "GET", user, headers=keys[0]) for i in range(400))
        )
        assert Counter(a.status_code for a in answers) == {200: 100, 429: 300}
        for refused in (a for a in answers if a.status_code == 429):
            assert 1 <= int(refused.headers["Retry-After"]) <= 60
        free = (ask(server, "GET", user, headers=keys[1]) for server in both)
        other = await asyncio.gather(*free)
        assert {a.status_code for a in other} == {200}


async def test_of_a_thousand_guesses_at_one_account_ten_are_tried(
    database_url: str, redis_url: str, keys: list[Mapping[str, str]]
) -> None:
    """From 50 callers over two processes; the owner is told why not, and others get in."""
    with two_servers(database_url, redis_url, PASSWORD_FAILURES=str(FAILURES)) as both:
        for email in ("victim@example.com", "another@example.com"):
            body = {"name": "V", "email": email, "password": PASSWORD}
            assert (await ask(both[0], "POST", "/api/v1/users", body, keys[0])).status_code == 201

        async def guess(number: int) -> httpx.Response:
            body = {"email": "victim@example.com", "password": f"Guess-{number}"}
            return await ask(both[number % 2], "POST", VERIFY, body, keys[number % CALLERS])

        told: Counter[int] = Counter()
        for start in range(0, 1000, 200):
            answers = await asyncio.gather(*map(guess, range(start, start + 200)))
            told.update(a.status_code for a in answers)
        assert told == {401: FAILURES, 429: 1000 - FAILURES}
        assert sum([await hashed(server, keys[0]) for server in both]) == FAILURES
        for server in both:
            for email, status in (("victim@example.com", 429), ("another@example.com", 200)):
                body = {"email": email, "password": PASSWORD}
                answer = await ask(server, "POST", VERIFY, body, keys[-1])
                assert answer.status_code == status, answer.text
                if status == 429:
                    assert answer.json()["error"]["code"] == "rate_limited"
                    assert 1 <= int(answer.headers["Retry-After"]) <= 900


async def hashed(server: Server, key: Mapping[str, str]) -> int:
    """Return how many wrong passwords a server has tried against a hash, by its own count."""
    metrics = (await ask(server, "GET", "/metrics", headers=key)).text.splitlines()
    return sum(
        int(float(line.split()[-1]))
        for line in metrics
        if line.startswith("user_service_http_requests_total")
        and "credentials/verify" in line
        and 'status="401"' in line
    )
