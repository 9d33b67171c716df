"""Feedback: what providers said of tokens and addresses, and what becomes of it."""

from __future__ import annotations

import asyncio
import itertools
import time
from asyncio import Future
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import uuid4

import httpx
import pytest
from user_service_server.app import create_app
from user_service_server.embedded import EmbeddedPostgres
from user_service_server.settings import Settings
from user_service_server.storage.migrations import downgrade, upgrade
from user_service_server.storage.wire import Command, Wire

from ..engines import Engines, settings_for
from ..system.subscribers import connected
from ..system.trouble import until
from .races import no_deadlock, opposite_moves, race_feedback, register_by_many
from .test_devices import listed, new_token, post, shown, someone
from .test_documents import counted, held_after
from .test_users import assert_failed, changes_of, fetch, is_waiting, register, rows

FEEDBACK = "/api/v1/feedback"
LATER = "2100-01-01T00:00:00Z"
EARLIER = "2020-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    """Without passwords, which take most of a registration's time, and with patience with Redis.

    With a connection for each of those who race: on a busy machine ten are not enough for 24 who
    wait for each other, and some are told to try again.
    """
    return settings_for(
        database_url,
        redis_url,
        PASSWORD_REQUIRED="false",
        REDIS_TIMEOUT_MS="5000",
        FEEDBACK_MAX_PER_HOUR="1000000",
        DATABASE_POOL_SIZE="30",
    )


@asynccontextmanager
async def another(
    database_url: str, redis_url: str, **others: str
) -> AsyncIterator[httpx.AsyncClient]:
    """Start another server on the same engines."""
    wanted = {"PASSWORD_REQUIRED": "false", "REDIS_TIMEOUT_MS": "5000", **others}
    app = create_app(settings_for(database_url, redis_url, **wanted))
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # Litestar's ASGI types are narrower
    async with (
        app.lifespan(),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


def push(token: str, reason: str = "unregistered", at: str = LATER) -> dict[str, str]:
    return {"channel": "push", "token": token, "reason": reason, "at": at}


def email(address: str, reason: str = "hard_bounce", at: str = LATER) -> dict[str, str]:
    return {"channel": "email", "address": address, "reason": reason, "at": at}


async def report(http: httpx.AsyncClient, *items: dict[str, str], **headers: str) -> list[str]:
    """Report, and return the results."""
    answer = await http.post(FEEDBACK, json={"items": list(items)}, headers=headers)
    assert answer.status_code == 200, answer.text
    return [result["result"] for result in answer.json()["data"]]


async def now_of(database_url: str) -> datetime:
    ((now,),) = await rows(database_url, "SELECT clock_timestamp()")
    moment: datetime = now
    return moment


async def person(http: httpx.AsyncClient, address: str, **fields: Any) -> str:
    return str((await register(http, password=None, email=address, **fields))["id"])


def new_address() -> str:
    return f"{uuid4().hex}@example.com"


async def is_deliverable(http: httpx.AsyncClient, user_id: str) -> bool:
    """Return what the document says, cached and as Postgres has it."""
    path = f"/api/v1/users/{user_id}"
    cached = (await http.get(path)).json()["data"]
    passed_over = {"X-Min-Version": str(10**9)}
    assert (await http.get(path, headers=passed_over)).json()["data"] == cached
    return bool(cached["email_deliverable"])


@pytest.mark.parametrize("reason", ["unregistered", "expired"])
async def test_a_reason_that_blames_the_token_deactivates_its_device(
    http: httpx.AsyncClient, database_url: str, reason: str
) -> None:
    user_id, token = await someone(http), new_token()
    await post(http, user_id, token)
    await fetch(http, user_id)
    assert await report(http, push(token, reason)) == ["applied"]
    assert await shown(http, user_id) == []
    (device,) = await listed(http, user_id)
    assert (device["active"], device["inactive_reason"]) == (False, reason)
    assert (await changes_of(database_url, user_id))[2:] == [(3, "device.updated")]
    assert (await fetch(http, user_id))["version"] == 3


@pytest.mark.parametrize("reason", ["mismatched", "rejected"])
async def test_a_reason_that_blames_somebody_else_is_counted_and_changes_nothing(
    http: httpx.AsyncClient, reason: str
) -> None:
    user_id, token = await someone(http), new_token()
    await post(http, user_id, token)
    document = await fetch(http, user_id)
    before = await counter(http, channel="push", reason=reason, result="ignored")
    assert await report(http, push(token, reason), push(new_token(), reason)) == ["ignored"] * 2
    assert await counter(http, channel="push", reason=reason, result="ignored") == before + 2
    assert await fetch(http, user_id) == document


async def counter(http: httpx.AsyncClient, **labels: str) -> float:
    name = ",".join(f'{label}="{value}"' for label, value in labels.items())
    lines = (await http.get("/metrics")).text.splitlines()
    wanted = f"user_service_feedback_total{{{name}}} "
    return sum(float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted))


async def test_what_was_seen_after_the_report_is_left_alone(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user_id, token = await someone(http), new_token()
    before = (await now_of(database_url)).isoformat()
    device = (await post(http, user_id, token)).json()["data"]
    assert await report(http, push(token, at=before)) == ["ignored"]
    assert await shown(http, user_id) == [token]
    assert await report(http, push(token, at=device["last_seen_at"])) == ["applied"], "not after it"


async def test_what_is_seen_while_it_is_reported_is_left_alone(http: httpx.AsyncClient) -> None:
    user_id, token = await someone(http), new_token()
    await post(http, user_id, token)
    document = await fetch(http, user_id)
    with held_after("SELECT token_digest") as held:
        reported = asyncio.create_task(report(http, push(token)))
        await held.reached.wait()
        await post(http, user_id, token)
        held.let_go()
        assert await reported == ["ignored"]
    assert await shown(http, user_id) == [token]
    assert (await fetch(http, user_id)) == document


async def test_a_complaint_while_the_user_opts_out_is_one_change(http: httpx.AsyncClient) -> None:
    address = new_address()
    user_id = await person(http, address)
    with held_after("AS opted_in_at") as held:
        reported = asyncio.create_task(report(http, email(address, "complaint")))
        await held.reached.wait()
        await http.patch(f"/api/v1/users/{user_id}/preferences", json={"email": False})
        held.let_go()
        assert await reported == ["ignored"]
    assert (await fetch(http, user_id))["version"] == 2


async def test_a_report_of_the_future_counts_as_now(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user_id, token = await someone(http), new_token()
    await post(http, user_id, token)
    hence = (await now_of(database_url) + timedelta(hours=1)).isoformat()
    assert await report(http, push(token, at=hence)) == ["applied"]
    await post(http, user_id, token)  # the app is there again
    answer = await report(http, push(token, at=EARLIER))
    assert (answer, await shown(http, user_id)) == (["ignored"], [token])
    ((seen,),) = await rows(
        database_url,
        "UPDATE devices SET last_seen_at = clock_timestamp() + interval '1 minute'"
        " WHERE token = $1 RETURNING last_seen_at",
        token,
    )
    assert await report(http, push(token, at=(seen + timedelta(hours=1)).isoformat())) == [
        "ignored"
    ], "of a minute hence it is seen, and the report is of now"


async def test_reporting_twice_changes_nothing(http: httpx.AsyncClient) -> None:
    address = new_address()
    user_id, token = await person(http, address), new_token()
    await post(http, user_id, token)
    items = [push(token), email(address), email(address, "complaint"), push(token)]
    assert await report(http, *items) == ["applied", "applied", "applied", "ignored"]
    document = await fetch(http, user_id)
    assert document["version"] == 3
    assert await report(http, *items) == ["ignored"] * 4
    assert await report(http, push(token, "expired"), email(address, at=EARLIER)) == ["ignored"] * 2
    assert await fetch(http, user_id) == document


async def test_results_keep_the_order_and_unknown_is_said(http: httpx.AsyncClient) -> None:
    user_id, tokens = await someone(http), [new_token() for _ in range(3)]
    for token in tokens:
        await post(http, user_id, token)
    results = await report(
        http,
        push(new_token()),
        push(tokens[1]),
        email(new_address(), "soft_bounce"),
        push(tokens[0], at=EARLIER),
        push(tokens[2], "rejected"),
        email(new_address(), "complaint"),
        push(tokens[2]),
    )
    expected = ["unknown", "applied", "ignored", "ignored", "ignored", "unknown", "applied"]
    assert results == expected
    assert await shown(http, user_id) == [tokens[0]]
    assert (await fetch(http, user_id))["version"] == 5, "two devices at once are one change"
    assert await report(http) == []


async def test_of_two_reports_of_one_token_the_first_that_holds_is_applied(
    http: httpx.AsyncClient,
) -> None:
    user_id, token = await someone(http), new_token()
    await post(http, user_id, token)
    results = await report(http, push(token, at=EARLIER), push(token, "expired"), push(token))
    assert results == ["ignored", "applied", "ignored"]
    assert (await listed(http, user_id))[0]["inactive_reason"] == "expired"


async def test_of_a_web_push_subscription_the_endpoint_is_enough(http: httpx.AsyncClient) -> None:
    user_id, endpoint = await someone(http), f"https://push.example.com/{new_token()}"
    subscription = f'{{"endpoint":"{endpoint}","keys":{{"auth":"x"}}}}'
    await post(http, user_id, subscription, platform="web")
    assert await report(http, push(endpoint, "expired")) == ["applied"]
    assert await shown(http, user_id) == []


async def test_a_hard_bounce_suppresses_the_address_and_not_its_user(
    http: httpx.AsyncClient, database_url: str
) -> None:
    address, other = new_address(), new_address()
    user_id = await person(http, address)
    assert await report(http, email(f" {address.upper()}")) == ["applied"], "by its canonical form"
    assert await is_deliverable(http, user_id) is False
    assert (await changes_of(database_url, user_id))[1:] == [(2, "address.suppressed")]
    path = f"/api/v1/users/{user_id}"
    answer = await http.patch(path, json={"email": other})
    assert answer.json()["data"]["email_deliverable"] is True
    answer = await http.patch(path, json={"email": address})
    assert answer.json()["data"]["email_deliverable"] is False
    respelled = await http.patch(path, json={"email": address.title()})
    assert respelled.json()["data"]["email_deliverable"] is False, "it is the same address"
    await http.patch(path, json={"email": other})
    heir = await person(http, address)
    assert await is_deliverable(http, heir) is False, "whoever has it"
    assert await is_deliverable(http, user_id) is True


async def test_an_address_that_nobody_has_is_suppressed_for_whoever_will(
    http: httpx.AsyncClient,
) -> None:
    address = new_address()
    assert await report(http, email(address), email(address)) == ["applied", "ignored"]
    assert await report(http, email(address)) == ["ignored"]
    user_id = await person(http, address)
    document = await fetch(http, user_id)
    assert (document["email_deliverable"], document["version"]) == (False, 1)


async def test_suppression_survives_erasure(http: httpx.AsyncClient) -> None:
    address = new_address()
    user_id = await person(http, address)
    await report(http, email(address))
    await http.delete(f"/api/v1/users/{user_id}")
    assert await is_deliverable(http, await person(http, address)) is False


async def test_a_suppressed_address_may_be_tried_again(
    http: httpx.AsyncClient, database_url: str
) -> None:
    address = new_address()
    user_id = await person(http, address)
    path = f"/api/v1/users/{user_id}/suppression"
    etag = (await http.delete(path)).headers["etag"]
    assert etag.endswith('.1"'), "nothing to lift"
    bounced = (await now_of(database_url)).isoformat()
    await report(http, email(address, at=bounced))
    restored = await http.delete(path)
    assert (restored.status_code, restored.json()["data"]) == (200, None)
    assert restored.headers["etag"].endswith('.3"')
    assert await is_deliverable(http, user_id) is True
    assert [kind for _, kind in await changes_of(database_url, user_id)][1:] == [
        *("address.suppressed", "address.restored")
    ]
    assert (await http.delete(path)).headers["etag"] == restored.headers["etag"]
    for there_and_back in (new_address(), address):
        moved = await http.patch(f"/api/v1/users/{user_id}", json={"email": there_and_back})
        assert moved.json()["data"]["email_deliverable"] is True
    assert await report(http, email(address, at=bounced)) == ["ignored"], "the same report again"
    assert await is_deliverable(http, user_id) is True
    assert await report(http, email(address)) == ["applied"], "a new one"
    assert await is_deliverable(http, user_id) is False


async def test_the_restoring_of_an_address_is_a_write_like_any_other(
    http: httpx.AsyncClient,
) -> None:
    user_id = await someone(http)
    path = f"/api/v1/users/{user_id}/suppression"
    assert_failed(await http.delete(path, headers={"If-Match": '"0.0.7"'}), 412, "version_mismatch")
    nobody = "/api/v1/users/01a205c7-a743-7a16-a135-c839ba84936e/suppression"
    assert_failed(await http.delete(nobody), 404, "user_not_found")
    key = {"Idempotency-Key": uuid4().hex}
    first, again = [await http.delete(path, headers=key) for _ in range(2)]
    assert (again.content, again.headers["idempotency-replayed"]) == (first.content, "true")


async def test_who_registers_with_an_address_is_waited_for_before_it_is_restored(
    http: httpx.AsyncClient, database_url: str
) -> None:
    """It has looked whether it may be written to, and waits for another who gives up a name."""
    address, taken = new_address(), uuid4().hex
    owner, giver = await person(http, address), await person(http, new_address(), external_id=taken)
    await report(http, email(address))
    waits = partial(is_waiting, database_url)
    async with connected(database_url) as sql:
        async with sql.transaction():
            await sql.execute("UPDATE users SET external_id = NULL WHERE id = $1", giver)
            body = {"name": "Heir", "email": address, "external_id": taken}
            registering = asyncio.create_task(http.post("/api/v1/users/", json=body))
            await until(partial(waits, "INSERT INTO users"), 2)
            path = f"/api/v1/users/{owner}/suppression"
            restoring = asyncio.create_task(http.delete(path))
            await until(partial(waits, "pg_advisory_xact_lock"), 2)
        assert_failed(await registering, 409, "email_taken", "email")
        assert (await restoring).status_code == 200
    assert await is_deliverable(http, owner) is True


async def test_a_complaint_is_an_opt_out_with_its_place_in_the_history(
    http: httpx.AsyncClient, database_url: str
) -> None:
    address = new_address()
    user_id = await person(http, address, preferences={"push": False})
    assert await report(http, email(address, "complaint")) == ["applied"]
    document = await fetch(http, user_id)
    assert (document["preferences"]["email"], document["preferences"]["push"]) == (False, False)
    assert document["email_deliverable"] is True, "critical messages pass"
    assert (await changes_of(database_url, user_id))[1:] == [(2, "preferences.updated")]
    path = f"/api/v1/users/{user_id}/preferences/history"
    entry = (await http.get(path)).json()["data"]["items"][0]
    assert (entry["version"], entry["source"], entry["policy_version"]) == (2, "feedback", None)
    assert entry["changes"] == [{"field": "email", "before": True, "after": False}]
    critical = {"channel": "email", "user_ids": [user_id], "priority": "critical"}
    resolved = await http.post("/api/v1/deliveries/resolve", json=critical)
    assert resolved.json()["data"][0]["decision"] == "allow"


async def test_the_same_complaint_again_does_not_undo_what_the_user_said_since(
    http: httpx.AsyncClient, database_url: str
) -> None:
    address = new_address()
    user_id = await person(http, address)
    complained = (await now_of(database_url)).isoformat()
    await report(http, email(address, "complaint", complained))
    await http.patch(f"/api/v1/users/{user_id}/preferences", json={"email": True})
    assert await report(http, email(address, "complaint", complained)) == ["ignored"]
    assert (await fetch(http, user_id))["preferences"]["email"] is True
    assert await report(http, email(address, "complaint")) == ["applied"]


async def test_a_complaint_of_before_the_registration_counts_all_the_same(
    http: httpx.AsyncClient,
) -> None:
    """The defaults of a registration are nobody's word."""
    address = new_address()
    user_id = await person(http, address)
    assert await report(http, email(address, "complaint", EARLIER)) == ["applied"]
    assert (await fetch(http, user_id))["preferences"]["email"] is False


async def test_one_users_changes_are_one_version(
    http: httpx.AsyncClient, database_url: str
) -> None:
    address, token = new_address(), new_token()
    user_id = await person(http, address)
    await post(http, user_id, token)
    results = await report(http, push(token), email(address, "complaint"), email(address))
    assert results == ["applied"] * 3
    assert (await changes_of(database_url, user_id))[2:] == [(3, "address.suppressed")]
    document = await fetch(http, user_id)
    assert (document["version"], document["devices"]) == (3, [])
    assert (document["email_deliverable"], document["preferences"]["email"]) == (False, False)


async def test_a_repeat_with_the_same_key_is_answered_as_the_first(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user_id, token, key = await someone(http), new_token(), uuid4().hex
    await post(http, user_id, token)
    body = {"items": [push(token)]}
    headers = {"Idempotency-Key": key}
    first = await http.post(FEEDBACK, json=body, headers=headers)
    await post(http, user_id, token)
    again = await http.post(FEEDBACK, json=body, headers=headers)
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["idempotency-replayed"] == "true"
    assert await shown(http, user_id) == [token], "it was not reported again"
    other = await http.post(FEEDBACK, json={"items": []}, headers=headers)
    assert_failed(other, 422, "idempotency_key_reused")
    found = await rows(database_url, "SELECT user_id FROM recorded_answers WHERE key = $1", key)
    assert found == [(None,)], "it is about nobody, and erased with nobody"


async def test_an_address_that_is_none_is_named(http: httpx.AsyncClient) -> None:
    token = new_token()
    user_id = await someone(http)
    await post(http, user_id, token)
    items = [push(token), email("jane@exa_mple..com"), email("x@" + "-" * 70 + ".com")]
    answer = await http.post(FEEDBACK, json={"items": items})
    assert_failed(answer, 422, "validation_failed", "items[1].address", "items[2].address")
    assert await shown(http, user_id) == [token], "all or none"


async def test_the_ends_of_the_calendar_are_times_like_any_other(http: httpx.AsyncClient) -> None:
    user_id, token, addresses = await someone(http), new_token(), [new_address(), new_address()]
    await post(http, user_id, token)
    first, last = "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999-14:00"
    assert await report(http, push(token, at=first), push(token, at=last)) == ["ignored", "applied"]
    results = await report(http, email(addresses[0], at=first), email(addresses[1], at=last))
    assert results == ["applied"] * 2


async def test_a_body_may_have_eight_mebibytes(http: httpx.AsyncClient) -> None:
    large = [push(f"{n}-" + "x" * 4000) for n in range(1000)]
    assert await report(http, *large) == ["unknown"] * 1000
    answer = await http.post(
        FEEDBACK,
        content=b" " * (8 * 1024 * 1024) + b"{}",
        headers={"Content-Type": "application/json"},
    )
    assert_failed(answer, 413, "body_too_large")


async def test_a_thousand_reports_are_a_handful_of_statements(
    http: httpx.AsyncClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips: list[int] = []
    call = Wire.call

    def noted(wire: Wire, commands: Sequence[Command]) -> Future[list[Any]]:
        trips.append(len(commands))
        return call(wire, commands)

    monkeypatch.setattr(Wire, "call", noted)
    await crowd(database_url, 1000)
    ((user_id,),) = await rows(database_url, "SELECT id FROM users WHERE name = 'crowd 7'")
    await fetch(http, str(user_id))
    items = [
        push(f"crowd-{n}") if n % 2 else email(f"crowd-{n}@example.com", reason)
        for n, reason in zip(range(1000), itertools.cycle(["complaint", "-", "hard_bounce", "-"]))
    ]
    began = time.perf_counter()
    trips.clear()
    with counted() as statements:
        assert await report(http, *items) == ["applied"] * 1000
    print(f"\n{len(statements)} statements, {time.perf_counter() - began:.3f} s")  # noqa: T201
    assert len(statements) <= 20
    # Beside what was read before, and is still being filled.
    assert [n for n in trips if n > 1] == [1000, 1000], "announced at once, and published at once"
    kinds = await rows(
        database_url,
        "SELECT kind, count(*), min(c.version), max(c.version) FROM changes c"
        " JOIN users ON users.id = user_id WHERE name LIKE 'crowd %' GROUP BY 1 ORDER BY 1",
    )
    assert kinds == [
        ("address.suppressed", 250, 2, 2),
        ("device.updated", 500, 2, 2),
        ("preferences.updated", 250, 2, 2),
    ]
    assert (await fetch(http, str(user_id)))["devices"] == []
    with counted() as statements:
        assert await report(http, *items) == ["ignored"] * 1000
    assert not [s for s in statements if s.lstrip().startswith(("UPDATE", "INSERT", "WITH"))]


async def crowd(database_url: str, number: int, prefix: str = "crowd", **device: str) -> None:
    """Insert users with a device each, beside the server."""
    await rows(
        database_url,
        """
        WITH people AS (
            INSERT INTO users (id, name, email, email_key, version, created_at, updated_at)
            SELECT gen_random_uuid(), $2 || ' ' || n, $2 || '-' || n || '@example.com',
                $2 || '-' || n || '@example.com', 1, now(), now()
            FROM generate_series(0, $1 - 1) AS n
            RETURNING id, name
        ), wishes AS (
            INSERT INTO preferences (user_id, email, push) SELECT id, true, true FROM people
        )
        INSERT INTO devices (id, user_id, token, token_digest, platform, active,
                             registered_at, last_seen_at)
        SELECT gen_random_uuid(), id, replace(name, ' ', '-'),
            sha256(replace(name, ' ', '-')::bytea), 'ios', true, now(), $3
        FROM people""",
        number,
        prefix,
        datetime.fromisoformat(device.get("seen", "2026-01-01T00:00:00Z")),
    )


async def test_large_reports_at_once_take_turns_and_lose_nothing(
    http: httpx.AsyncClient, database_url: str, postgres: EmbeddedPostgres
) -> None:
    await crowd(database_url, 400, "turn")
    items = [
        item for n in range(400) for item in (push(f"turn-{n}"), email(f"turn-{n}@example.com"))
    ]
    backwards = items[::-1]
    reports = await asyncio.gather(
        *(report(http, *some) for some in (items, backwards, items[:50], backwards[:50]))
    )
    assert sum(results.count("applied") for results in reports) == 800
    assert_no_deadlock(postgres)


def assert_no_deadlock(postgres: EmbeddedPostgres) -> None:
    assert no_deadlock(postgres.log_path)


async def test_an_app_that_registers_at_every_launch_changes_nothing(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user_id, token = await someone(http), new_token()
    first = await post(http, user_id, token)
    document = await fetch(http, user_id)
    reported = (await now_of(database_url)).isoformat()
    with counted() as statements:
        for _ in range(1000):
            again = await post(http, user_id, token)
            assert again.headers["etag"] == first.headers["etag"]
        assert len(statements) == 1000, "one each, which notes that it was seen"
        statements.clear()
        assert await fetch(http, user_id) == document
        assert statements == [], "it is still cached"
    assert len(await changes_of(database_url, user_id)) == 2
    assert await report(http, push(token, at=reported)) == ["ignored"]
    assert await fetch(http, user_id) == document


async def insist(http: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
    """Report until it is taken or refused: 503 asks for that, on a machine that is busy."""
    for _ in range(20):
        answer = await http.post(FEEDBACK, json=body)
        if answer.status_code != 503:
            return answer
        await asyncio.sleep(float(answer.headers["retry-after"]))
    raise AssertionError("always busy")


async def test_the_brake_is_exact_over_two_servers(database_url: str, redis_url: str) -> None:
    await rows(database_url, "DELETE FROM feedback_counts")
    await crowd(database_url, 120, "brake")
    limit = {"FEEDBACK_MAX_PER_HOUR": "50"}
    async with (
        another(database_url, redis_url, **limit) as one,
        another(database_url, redis_url, **limit) as other,
    ):
        parts = [[push(f"brake-{n}") for n in range(i, i + 3)] for i in range(0, 120, 3)]
        answers = await asyncio.gather(
            *(insist((one, other)[i % 2], {"items": part}) for i, part in enumerate(parts))
        )
        said = Counter(answer.status_code for answer in answers)
        assert said == {200: 16, 429: 24}, "48 of 50: three more would be too many"
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert_failed(refused, 429, "rate_limited")
        assert 59 * 60 <= int(refused.headers["retry-after"]) <= 61 * 60
        metrics = [(await http.get("/metrics")).text for http in (one, other)]
        braked = sum(
            float(line.split()[1])
            for text in metrics
            for line in text.splitlines()
            if line.startswith("user_service_feedback_braked_total ")
        )
        assert braked == 24
        left = await rows(
            database_url, "SELECT count(*) FROM devices WHERE token LIKE 'brake-%' AND active"
        )
        assert left == [(120 - 48,)], "nothing of what was refused was applied"
        taken = next(i for i, answer in enumerate(answers) if answer.status_code == 200)
        assert await report(one, *parts[taken]) == ["ignored"] * 3, (
            "what does nothing is not stopped"
        )
        active = await rows(
            database_url, "SELECT token FROM devices WHERE token LIKE 'brake-%' AND active LIMIT 3"
        )
        assert await report(one, *(push(token) for (token,) in active[:2])) == ["applied"] * 2
        assert_failed(
            await other.post(FEEDBACK, json={"items": [push(active[2][0])]}), 429, "rate_limited"
        )
        await rows(database_url, "UPDATE feedback_counts SET minute = minute - interval '62 min'")
        assert await report(other, push(active[2][0])) == ["applied"], "an hour later"
    await rows(database_url, "DELETE FROM feedback_counts")


async def test_more_than_an_hours_worth_at_once_is_refused_and_said_so(
    database_url: str, redis_url: str
) -> None:
    await rows(database_url, "DELETE FROM feedback_counts")
    await crowd(database_url, 4, "much")
    async with another(database_url, redis_url, FEEDBACK_MAX_PER_HOUR="3") as http:
        items = [push(f"much-{n}") for n in range(4)]
        answer = await http.post(FEEDBACK, json={"items": items})
        assert_failed(answer, 429, "rate_limited")
        assert answer.headers["retry-after"] == "3600"
        assert await report(http, *items[:3]) == ["applied"] * 3
        hurried = await http.post(
            FEEDBACK, json={"items": items}, headers={"Idempotency-Key": "much"}
        )
        assert_failed(hurried, 429, "rate_limited")
        await rows(database_url, "DELETE FROM feedback_counts")
        results = await report(http, *items, **{"Idempotency-Key": "much"})
        assert results == ["ignored"] * 3 + ["applied"], "a refusal was not recorded"
    await rows(database_url, "DELETE FROM feedback_counts")


async def test_a_token_that_many_register_at_once_has_one_owner(
    http: httpx.AsyncClient, database_url: str, postgres: EmbeddedPostgres
) -> None:
    await register_by_many(http, database_url, rounds=5)
    assert_no_deadlock(postgres)


async def test_opposite_moves_of_two_tokens(
    http: httpx.AsyncClient, database_url: str, postgres: EmbeddedPostgres
) -> None:
    await opposite_moves(http, database_url, rounds=5)
    assert_no_deadlock(postgres)


async def test_feedback_and_registrations_that_race_end_as_some_order_explains(
    http: httpx.AsyncClient, database_url: str, postgres: EmbeddedPostgres
) -> None:
    await race_feedback(http, database_url, rounds=20)
    assert_no_deadlock(postgres)


async def test_a_bounce_and_a_registration_of_its_address_agree(
    http: httpx.AsyncClient, postgres: EmbeddedPostgres
) -> None:
    for _ in range(20):
        address, other = new_address(), new_address()
        mover = await person(http, other)
        body = {"name": "Jane Roe", "email": address}
        await asyncio.gather(
            report(http, email(address), email(other)),
            http.post("/api/v1/users/", json=body),
            http.patch(f"/api/v1/users/{mover}", json={"email": address}),
            report(http, email(other), email(address)),
        )
        found = await http.post("/api/v1/users/lookup", json={"email": address})
        (owner,) = found.json()["data"]["users"]
        assert owner["email_deliverable"] is False
        assert await is_deliverable(http, owner["id"]) is False
    assert_no_deadlock(postgres)


async def test_times_are_kept_as_they_were_reported(
    http: httpx.AsyncClient, database_url: str
) -> None:
    address, at = new_address(), datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    await report(http, email(address, at=at.astimezone().isoformat()))
    found = await rows(
        database_url,
        "SELECT reason, at, lifted_at FROM suppressed_addresses"
        " WHERE digest = sha256(('email:' || $1)::bytea)",
        address,
    )
    assert found == [("hard_bounce", at, None)]


def test_the_migration_goes_back_and_forth(engines: Engines, redis_url: str) -> None:
    url = engines.create_database("feedback_back_and_forth")
    settings = settings_for(url, redis_url)
    answer = """
        INSERT INTO recorded_answers (caller, key, digest, status, headers, body, user_id, at)
        VALUES ('anonymous', $1, '', 200, '[]', '', $2, now())"""
    asyncio.run(rows(url, answer, "of nobody", None))
    asyncio.run(rows(url, answer, "of somebody", str(uuid4())))
    downgrade(settings, "0004")
    assert asyncio.run(rows(url, "SELECT key FROM recorded_answers")) == [("of somebody",)]
    upgrade(settings)
    assert asyncio.run(rows(url, "SELECT count(*) FROM suppressed_addresses")) == [(0,)]
