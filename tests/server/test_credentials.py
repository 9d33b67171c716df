"""Passwords over HTTP: which are refused, who may change one, and what happens when many wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from argon2 import PasswordHasher, extract_parameters
from argon2.exceptions import VerifyMismatchError
from user_service_server.app import create_app

from ..engines import settings_for
from .test_users import PASSWORD, assert_failed, changes_of, fetch, register, rows

NEW = "Another-Pass-456"
_hasher = PasswordHasher()


@asynccontextmanager
async def another_service(
    database_url: str, redis_url: str, **others: str
) -> AsyncIterator[httpx.AsyncClient]:
    """Run the app with other settings on the same engines."""
    app = create_app(settings_for(database_url, redis_url, **others))
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # Litestar's ASGI types are narrower
    async with (
        app.lifespan(),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


async def set_password(
    http: httpx.AsyncClient, user: dict[str, Any], password: str, current: str | None = None
) -> httpx.Response:
    body = {"password": password} | ({} if current is None else {"current_password": current})
    return await http.put(f"/api/v1/users/{user['id']}/password", json=body)


async def stored(database_url: str, user: dict[str, Any]) -> str | None:
    """Return the hash that is kept."""
    [(found,)] = await rows(
        database_url, "SELECT password_hash FROM users WHERE id = $1", user["id"]
    )
    return None if found is None else str(found)


bad_password = pytest.mark.parametrize(
    "password",
    [
        pytest.param("password123", id="common"),
        pytest.param("PassWord123", id="common-in-capitals"),
        pytest.param("Judged@Example.com", id="the-email"),
        pytest.param("judged person", id="the-name"),
        pytest.param("seven77", id="seven-characters"),
        pytest.param("x" * 129, id="129-characters"),
        pytest.param(12345678, id="a-number"),
    ],
)


@bad_password
async def test_a_bad_password_is_refused_at_registration(
    http: httpx.AsyncClient, password: str
) -> None:
    body = {"name": "Judged Person", "email": "judged@example.com", "password": password}
    answer = await http.post("/api/v1/users/", json=body)
    assert_failed(answer, 422, "validation_failed", "password")
    assert str(password) not in answer.text


async def test_a_registration_needs_a_password(http: httpx.AsyncClient) -> None:
    for said in ({}, {"password": None}):
        body = {"name": "No Password", "email": "no.password@example.com", **said}
        answer = await http.post("/api/v1/users/", json=body)
        assert_failed(answer, 422, "validation_failed", "password")


@bad_password
async def test_a_bad_password_is_refused_later(
    http: httpx.AsyncClient, database_url: str, password: str
) -> None:
    email = "judged@example.com"
    found = await http.post("/api/v1/users/lookup", json={"email": email})
    users = found.json()["data"]["users"]
    user = users[0] if users else await register(http, name="Judged Person", email=email)
    kept = await stored(database_url, user)
    answer = await set_password(http, user, password)
    assert_failed(answer, 422, "validation_failed", "password")
    assert await stored(database_url, user) == kept


@pytest.mark.parametrize(
    "password",
    [
        pytest.param("x" * 7 + "ż", id="eight-characters"),
        pytest.param("ż" * 128, id="128-characters"),
        pytest.param("  spaces around  ", id="not-trimmed"),
        pytest.param("control\x00\x07\n", id="any-characters"),
    ],
)
async def test_a_password_is_kept_as_argon2id_of_exactly_what_was_sent(
    http: httpx.AsyncClient, database_url: str, password: str
) -> None:
    user = await register(http, password=password)
    kept = await stored(database_url, user)
    assert kept is not None
    assert kept.startswith("$argon2id$")
    parameters = extract_parameters(kept)
    assert parameters.memory_cost >= 19456
    assert (parameters.time_cost, parameters.parallelism) >= (2, 1)
    assert _hasher.verify(kept, password)
    with pytest.raises(VerifyMismatchError):
        _hasher.verify(kept, password.strip() + " ")


async def test_no_answer_shows_a_password_or_its_hash(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user = await register(http, password="Never-Shown-1")
    kept = await stored(database_url, user)
    path = f"/api/v1/users/{user['id']}"
    for answer in (
        await http.get(path),
        await http.patch(path, json={"name": "Somebody Else"}),
        await http.post("/api/v1/users/batch", json={"ids": [user["id"]]}),
        await set_password(http, user, NEW, "Never-Shown-2"),
        await set_password(http, user, NEW, "Never-Shown-1"),
    ):
        assert "Never-Shown" not in answer.text
        assert NEW not in answer.text
        assert "argon2" not in answer.text
    assert await stored(database_url, user) != kept


async def test_only_who_knows_the_current_password_changes_it_with_it(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user = await register(http)
    kept = await stored(database_url, user)
    for wrong in ("Wrong-Password-1", "", f"{PASSWORD} ", "x" * 1024):
        answer = await set_password(http, user, NEW, wrong)
        assert_failed(answer, 401, "invalid_credentials")
    too_long = await set_password(http, user, NEW, "x" * 1025)
    assert_failed(too_long, 422, "validation_failed", "current_password")
    assert await stored(database_url, user) == kept
    assert await changes_of(database_url, user["id"]) == [(1, "user.created")]
    assert (await set_password(http, user, NEW, PASSWORD)).status_code == 200
    changed = await stored(database_url, user)
    assert changed is not None
    assert _hasher.verify(changed, NEW)
    assert_failed(await set_password(http, user, NEW, PASSWORD), 401, "invalid_credentials")


async def test_without_the_current_one_the_password_is_set(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user = await register(http)
    assert (await set_password(http, user, NEW)).status_code == 200
    kept = await stored(database_url, user)
    assert kept is not None
    assert _hasher.verify(kept, NEW)
    assert await fetch(http, user["id"]) == user


async def test_of_changes_at_once_with_the_same_current_password_one_is_done(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user = await register(http)
    wanted = [f"Changed-Password-{i}" for i in range(5)]
    answers = await asyncio.gather(
        *(set_password(http, user, password, PASSWORD) for password in wanted)
    )
    assert Counter(answer.status_code for answer in answers) == {200: 1, 401: 4}
    (done,) = (p for p, answer in zip(wanted, answers, strict=True) if answer.is_success)
    kept = await stored(database_url, user)
    assert kept is not None
    assert _hasher.verify(kept, done)
    assert len(await changes_of(database_url, user["id"])) == 2


async def test_where_users_log_in_elsewhere_they_need_no_password(
    database_url: str, redis_url: str
) -> None:
    async with another_service(database_url, redis_url, PASSWORD_REQUIRED="false") as http:
        created = await http.post(
            "/api/v1/users/", json={"name": "Single Sign", "email": "sso@example.com"}
        )
        assert created.status_code == 201
        user = created.json()["data"]
        assert await stored(database_url, user) is None
        guessed = await set_password(http, user, NEW, "")
        assert_failed(guessed, 401, "invalid_credentials")
        common = {"name": "A", "email": "sso2@example.com", "password": "password123"}
        refused = await http.post("/api/v1/users/", json=common)
        assert_failed(refused, 422, "validation_failed", "password")
        assert (await set_password(http, user, NEW)).status_code == 200
        assert (await set_password(http, user, PASSWORD, NEW)).status_code == 200


async def test_past_the_queue_the_service_is_overloaded_and_recovers(
    database_url: str, redis_url: str
) -> None:
    async with another_service(
        database_url, redis_url, HASH_CONCURRENCY="1", HASH_QUEUE="2"
    ) as http:

        async def attempt(i: int) -> httpx.Response:
            body = {"name": "Q", "email": f"queue.{i}@example.com", "password": PASSWORD}
            return await http.post("/api/v1/users/", json=body)

        answers = await asyncio.gather(*(attempt(i) for i in range(20)))
        refused = [answer for answer in answers if not answer.is_success]
        assert len(answers) - len(refused) >= 3, "one is hashed, two wait"
        assert len(refused) >= 10
        for answer in refused:
            assert_failed(answer, 503, "overloaded")
            assert int(answer.headers["retry-after"]) >= 1
        assert (await attempt(20)).status_code == 201
        metrics = (await http.get("/metrics")).text
        assert "user_service_passwords_waiting 0.0" in metrics


async def test_while_passwords_are_hashed_others_are_answered(http: httpx.AsyncClient) -> None:
    user = await register(http)
    changes = [asyncio.create_task(set_password(http, user, f"{NEW}{i}")) for i in range(8)]
    await asyncio.sleep(0)
    answered = 0
    while not all(change.done() for change in changes):
        await fetch(http, user["id"])
        answered += 1
    assert answered > len(changes), "reads go on between two hashes"
    assert {(await change).status_code for change in changes} == {200}
