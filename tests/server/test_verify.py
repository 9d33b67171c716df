"""Whose a password is: the same work and the same answer for everybody whose it is not."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest
from argon2 import PasswordHasher, extract_parameters
from litestar import Litestar
from sqlalchemy import Engine, event
from user_service_server.app import create_app
from user_service_server.credentials.hashers import Hashers
from user_service_server.credentials.service import Credentials
from user_service_server.settings import Settings

from ..engines import settings_for
from .test_credentials import another_service, set_password, stored
from .test_users import PASSWORD, assert_failed, register, rows

VERIFY = "/api/v1/credentials/verify"
_WEAK = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    return settings_for(
        database_url, redis_url, RATE_LIMIT_CREDENTIALS="1000000", PASSWORD_FAILURES="10"
    )


@pytest.fixture
async def user(http: httpx.AsyncClient) -> dict[str, Any]:
    return await register(http)


async def verify(http: httpx.AsyncClient, email: str, password: str) -> httpx.Response:
    return await http.post(VERIFY, json={"email": email, "password": password})


async def change(database_url: str, statement: str, *values: object) -> None:
    connection = await asyncpg.connect(database_url.replace("+asyncpg", ""))
    try:
        await connection.execute(statement, *values)
    finally:
        await connection.close()


async def test_the_right_password_tells_whose_it_is(
    http: httpx.AsyncClient, user: dict[str, Any]
) -> None:
    for email in (user["email"], user["email"].upper(), f" {user['email']} "):
        answer = await verify(http, email, PASSWORD)
        assert answer.status_code == 200, answer.text
        assert answer.json()["data"] == {"user_id": user["id"]}
        assert answer.headers["Cache-Control"] == "no-store"


class Work:
    """What the service does: passwords verified, by the parameters of their hashes; statements."""

    def __init__(self) -> None:
        self.verified: list[object] = []
        self.statements: list[str] = []

    def taken(self) -> tuple[list[object], list[str]]:
        done = (self.verified, self.statements)
        self.verified, self.statements = [], []
        return done


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Any:
    work = Work()
    compare = Hashers.compare

    async def counted(self: Hashers, password: str, password_hash: str) -> bool:
        work.verified.append(extract_parameters(password_hash))
        return await compare(self, password, password_hash)

    monkeypatch.setattr(Hashers, "compare", counted)

    def noted(_c: object, _cursor: object, statement: str, *_: object) -> None:
        # Beside the requests others are at work: the feed, and who watches Postgres.
        if " users" in statement and "changes" not in statement:
            work.statements.append(statement)

    event.listen(Engine, "before_cursor_execute", noted)
    yield work
    event.remove(Engine, "before_cursor_execute", noted)


async def test_whoever_it_is_not_the_same_is_done_and_answered(
    http: httpx.AsyncClient, user: dict[str, Any], database_url: str, work: Work
) -> None:
    passwordless = await register(http)
    await change(
        database_url, "UPDATE users SET password_hash = NULL WHERE id = $1", passwordless["id"]
    )
    deleted = await register(http)
    await http.delete(f"/api/v1/users/{deleted['id']}")
    work.taken()
    cases = {
        "wrong": (user["email"], "Wrong-Password-1"),
        "long": (user["email"], "x" * 1024),
        "empty": (user["email"], ""),
        "unknown": ("nobody.at.all@example.com", PASSWORD),
        "unknown, empty": ("nobody.at.all@example.com", ""),
        "passwordless": (passwordless["email"], PASSWORD),
        "passwordless, empty": (passwordless["email"], ""),
        "deleted": (deleted["email"], PASSWORD),
        "nobody's": ("a@b", PASSWORD),
        "confusable": (user["email"].replace("e", "\u0435", 1), PASSWORD),
    }
    done, said = {}, {}
    for name, (email, password) in cases.items():
        answer = await verify(http, email, password)
        assert_failed(answer, 401, "invalid_credentials")
        verified, statements = work.taken()
        done[name] = (verified, statements)
        body = answer.json()
        body["error"]["request_id"] = answer.headers["X-Request-ID"] = ""
        headers = {**answer.headers}
        # What is left of the caller's own limit tells nothing of the user.
        assert headers.pop("RateLimit".lower()).startswith('"credentials";')
        said[name] = (body, headers)
    assert {name: one for name, one in done.items() if one != done["wrong"]} == {}
    assert len(done["wrong"][0]) == len(done["wrong"][1]) == 1
    assert all(one == said["wrong"] for one in said.values()), said


@pytest.mark.parametrize(
    "password",
    [
        pytest.param("x" * 1025, id="1025-bytes"),
        pytest.param("\U0001f511" * 257, id="257-keys-of-4-bytes"),
        pytest.param(None, id="null"),
        pytest.param(7, id="a-number"),
    ],
)
async def test_what_is_no_password_is_refused(http: httpx.AsyncClient, password: Any) -> None:
    answer = await http.post(VERIFY, json={"email": "a@example.com", "password": password})
    assert answer.status_code == 422, answer.text
    assert "argon" not in answer.text


@pytest.mark.parametrize(
    "raw", ['"\\ud800"', '"\\ud800abcdef"', '"\\u0000\\u0000"', '"\\udfff\\ud800x"']
)
async def test_any_text_is_judged_or_refused(http: httpx.AsyncClient, raw: str) -> None:
    answer = await http.post(
        VERIFY,
        content=f'{{"email": "strange@example.com", "password": {raw}}}',
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code in {400, 401}, answer.text


async def test_past_the_limit_nobody_is_tried_and_the_owner_is_told(
    http: httpx.AsyncClient, user: dict[str, Any], work: Work
) -> None:
    answers = await asyncio.gather(
        *(verify(http, user["email"], f"Wrong-Password-{i}") for i in range(40))
    )
    assert Counter(answer.status_code for answer in answers) == {401: 10, 429: 30}
    verified, _ = work.taken()
    assert len(verified) == 10
    told = await verify(http, user["email"], PASSWORD)
    assert_failed(told, 429, "rate_limited")
    assert 1 <= int(told.headers["Retry-After"]) <= 900
    # By the other way in, too; and nobody else is concerned.
    guessed = await set_password(http, user, "Another-Pass-456", "Wrong-Password-1")
    assert_failed(guessed, 429, "rate_limited")
    other = await register(http)
    assert (await verify(http, other["email"], PASSWORD)).status_code == 200


async def test_an_unknown_email_is_limited_like_a_known_one(http: httpx.AsyncClient) -> None:
    answers = [await verify(http, "unknown.limited@example.com", "x") for _ in range(12)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429] * 2


async def test_right_ones_are_free(http: httpx.AsyncClient, user: dict[str, Any]) -> None:
    for _ in range(25):
        assert (await verify(http, user["email"], PASSWORD)).status_code == 200
    for _ in range(9):
        assert (await verify(http, user["email"], "Wrong-Password-1")).status_code == 401
    assert (await verify(http, user["email"], PASSWORD)).status_code == 200


async def weaken(database_url: str, user: dict[str, Any]) -> str:
    weak = _WEAK.hash(PASSWORD)
    await change(
        database_url, "UPDATE users SET password_hash = $2 WHERE id = $1", user["id"], weak
    )
    return weak


async def test_a_weak_hash_becomes_a_strong_one_of_the_same_password(
    http: httpx.AsyncClient, user: dict[str, Any], database_url: str
) -> None:
    weak = await weaken(database_url, user)
    assert (await verify(http, user["email"], "Wrong-Password-1")).status_code == 401
    assert await stored(database_url, user) == weak
    assert (await verify(http, user["email"], PASSWORD)).status_code == 200
    kept = await stored(database_url, user)
    assert kept is not None
    assert extract_parameters(kept).memory_cost >= 19456
    assert (await verify(http, user["email"], PASSWORD)).status_code == 200
    [(version,)] = await rows(database_url, "SELECT version FROM users WHERE id = $1", user["id"])
    assert version == user["version"]


async def test_a_rehash_does_not_undo_a_change_meanwhile(
    http: httpx.AsyncClient,
    user: dict[str, Any],
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await weaken(database_url, user)
    from user_service_server.credentials import repository  # noqa: PLC0415

    renew = repository.renew_password_hash

    async def late(*arguments: Any) -> None:
        assert (await set_password(http, user, "Another-Pass-456")).status_code == 200
        await renew(*arguments)

    monkeypatch.setattr(repository, "renew_password_hash", late)
    assert (await verify(http, user["email"], PASSWORD)).status_code == 200
    assert (await verify(http, user["email"], "Another-Pass-456")).status_code == 200
    assert (await verify(http, user["email"], PASSWORD)).status_code == 401


async def test_a_right_password_is_right_when_there_is_no_time_to_rehash(
    user: dict[str, Any], database_url: str, redis_url: str
) -> None:
    weak = await weaken(database_url, user)
    async with another_service(
        database_url, redis_url, HASH_CONCURRENCY="1", HASH_QUEUE="0"
    ) as http:
        answers = await asyncio.gather(
            *(verify(http, user["email"], PASSWORD) for _ in range(5)),
        )
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert Counter(answer.status_code for answer in answers)[200] >= 1
    assert weak is not None


async def test_who_is_refused_for_lack_of_room_has_not_guessed(
    user: dict[str, Any], database_url: str, redis_url: str
) -> None:
    async with another_service(
        database_url, redis_url, HASH_CONCURRENCY="1", HASH_QUEUE="0", PASSWORD_FAILURES="3"
    ) as http:
        await asyncio.gather(*(verify(http, user["email"], PASSWORD) for _ in range(3)))
        assert (await verify(http, user["email"], PASSWORD)).status_code == 200


@pytest.fixture(scope="module")
async def app(settings: Settings) -> AsyncIterator[Litestar]:
    assert Credentials.verify.__doc__
    app = create_app(settings)
    async with app.lifespan():
        yield app
