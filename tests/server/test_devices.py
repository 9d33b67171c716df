"""Devices over HTTP: a token has one owner, and a user a bounded number of devices."""

from __future__ import annotations

import asyncio
import json
from itertools import count
from typing import Any

import httpx
import pytest
from user_service_server.app import create_app
from user_service_server.embedded import EmbeddedPostgres
from user_service_server.settings import Settings

from ..engines import settings_for
from .test_users import assert_failed, changes_of, fetch, register, rows

_numbers = count()


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    """Without passwords, which take most of a registration's time, and with patience with Redis.

    A machine that is busy is not the trouble that is tested here.
    """
    return settings_for(database_url, redis_url, PASSWORD_REQUIRED="false", REDIS_TIMEOUT_MS="5000")


def new_token() -> str:
    return f"token-{next(_numbers)}"


async def someone(http: httpx.AsyncClient) -> str:
    """Register somebody; returns the id."""
    return str((await register(http, password=None))["id"])


async def post(http: httpx.AsyncClient, user_id: str, token: str, **others: Any) -> httpx.Response:
    body = {"token": token, "platform": "ios", **others}
    answer = await http.post(f"/api/v1/users/{user_id}/devices", json=body)
    assert answer.status_code in (200, 201), answer.text
    return answer


async def listed(http: httpx.AsyncClient, user_id: str) -> list[dict[str, Any]]:
    """Return all devices, inactive ones included."""
    answer = await http.get(f"/api/v1/users/{user_id}/devices")
    assert answer.status_code == 200
    devices: list[dict[str, Any]] = answer.json()["data"]
    return devices


async def shown(http: httpx.AsyncClient, user_id: str) -> list[str]:
    """Return the tokens that the document shows, cached and as Postgres has it."""
    path = f"/api/v1/users/{user_id}"
    cached = (await http.get(path)).json()["data"]
    passed_over = {"X-Min-Version": str(10**9)}
    assert (await http.get(path, headers=passed_over)).json()["data"] == cached
    return [device["token"] for device in cached["devices"]]


async def test_a_new_token_is_created_and_a_known_one_is_updated(http: httpx.AsyncClient) -> None:
    user_id, token = await someone(http), new_token()
    new = await post(http, user_id, token, app="com.example.app:sandbox", active=True)
    assert new.status_code == 201
    device = new.json()["data"]
    assert set(device) == {
        *("id", "token", "platform", "app", "active"),
        *("registered_at", "last_seen_at", "inactive_reason"),
    }
    assert (device["token"], device["platform"], device["active"]) == (token, "ios", True)
    assert (device["app"], device["inactive_reason"]) == ("com.example.app:sandbox", None)
    known = await post(http, user_id, token, platform="android")
    assert known.status_code == 200
    assert known.json()["data"]["id"] == device["id"]
    assert (known.json()["data"]["platform"], known.json()["data"]["app"]) == ("android", None)
    document = await fetch(http, user_id)
    assert document["version"] == 3
    assert document["devices"] == [
        {
            **{name: device[name] for name in ("id", "token", "active", "registered_at")},
            "platform": "android",
            "app": None,
        }
    ]


async def test_ones_own_active_token_moves_last_seen_and_nothing_else(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user_id, token = await someone(http), new_token()
    first = await post(http, user_id, token)
    document = await fetch(http, user_id)
    again = await post(http, user_id, token)
    assert (again.status_code, again.headers["etag"]) == (200, first.headers["etag"])
    before, after = first.json()["data"], again.json()["data"]
    assert after["last_seen_at"] > before["last_seen_at"]
    assert after == {**before, "last_seen_at": after["last_seen_at"]}
    assert (await listed(http, user_id)) == [after]
    assert await fetch(http, user_id) == document
    assert len(await changes_of(database_url, user_id)) == 2


async def test_an_inactive_token_becomes_active_again_as_the_newest(
    http: httpx.AsyncClient,
) -> None:
    user_id, old, new = await someone(http), new_token(), new_token()
    device = (await post(http, user_id, old)).json()["data"]
    await post(http, user_id, new)
    path = f"/api/v1/users/{user_id}/devices/{device['id']}"
    off = await http.patch(path, json={"active": False})
    assert off.json()["data"]["inactive_reason"] == "deactivated"
    assert await shown(http, user_id) == [new]
    assert [d["active"] for d in await listed(http, user_id)] == [True, False]
    back = await post(http, user_id, old)
    assert (back.status_code, back.json()["data"]["id"]) == (200, device["id"])
    assert (back.json()["data"]["active"], back.json()["data"]["inactive_reason"]) == (True, None)
    assert await shown(http, user_id) == [old, new]
    assert (await fetch(http, user_id))["version"] == 5


async def test_a_device_is_switched_off_and_on(http: httpx.AsyncClient) -> None:
    user_id, tokens = await someone(http), [new_token(), new_token()]
    first, _second = [(await post(http, user_id, token)).json()["data"] for token in tokens]
    path = f"/api/v1/users/{user_id}/devices/{first['id']}"
    assert (await http.patch(path, json={"active": False})).json()["data"]["active"] is False
    assert await shown(http, user_id) == tokens[1:]
    on = await http.patch(path, json={"active": True})
    assert (on.json()["data"]["active"], on.json()["data"]["inactive_reason"]) == (True, None)
    assert await shown(http, user_id) == tokens
    assert on.headers["etag"].endswith('.5"')


async def test_a_token_may_be_registered_switched_off(http: httpx.AsyncClient) -> None:
    user_id, token = await someone(http), new_token()
    created = await post(http, user_id, token, active=False)
    assert (created.status_code, created.json()["data"]["active"]) == (201, False)
    assert await shown(http, user_id) == []
    await post(http, user_id, token)
    assert await shown(http, user_id) == [token]
    assert (await post(http, user_id, token, active=False)).json()["data"]["active"] is False
    assert await shown(http, user_id) == []


async def test_a_deleted_device_is_gone_and_its_token_is_new_again(
    http: httpx.AsyncClient,
) -> None:
    user_id, token = await someone(http), new_token()
    device = (await post(http, user_id, token)).json()["data"]
    path = f"/api/v1/users/{user_id}/devices/{device['id']}"
    deleted = await http.delete(path)
    assert (deleted.status_code, deleted.json()["data"]) == (200, None)
    assert await shown(http, user_id) == []
    assert_failed(await http.delete(path), 404, "device_not_found")
    assert_failed(await http.patch(path, json={"active": True}), 404, "device_not_found")
    again = await post(http, user_id, token)
    assert again.status_code == 201
    assert again.json()["data"]["id"] != device["id"]


async def test_a_device_is_found_below_its_owner_only(http: httpx.AsyncClient) -> None:
    owner, other = await someone(http), await someone(http)
    device = (await post(http, owner, new_token())).json()["data"]
    path = f"/api/v1/users/{other}/devices/{device['id']}"
    assert_failed(await http.patch(path, json={"active": False}), 404, "device_not_found")
    assert_failed(await http.delete(path), 404, "device_not_found")
    odd = f"/api/v1/users/{other}/devices/mine"
    assert_failed(await http.delete(odd), 404, "device_not_found", "device_id")


async def test_another_users_token_moves_and_both_documents_tell_it(
    http: httpx.AsyncClient, database_url: str
) -> None:
    former, heir, token = await someone(http), await someone(http), new_token()
    device = (await post(http, former, token)).json()["data"]
    for user_id in (former, heir):
        await fetch(http, user_id)
    moved = await post(http, heir, token)
    assert moved.status_code == 201
    assert moved.json()["data"]["id"] != device["id"]
    assert await shown(http, former) == []
    assert await shown(http, heir) == [token]
    assert (await fetch(http, former))["version"] == 3
    assert (await fetch(http, heir))["version"] == 2
    assert (await changes_of(database_url, former))[-1] == (3, "device.moved")
    assert (await changes_of(database_url, heir))[-1] == (2, "device.moved")
    gone = f"/api/v1/users/{former}/devices/{device['id']}"
    assert_failed(await http.delete(gone), 404, "device_not_found")


async def test_an_inactive_token_of_another_user_moves_too(http: httpx.AsyncClient) -> None:
    former, heir, token = await someone(http), await someone(http), new_token()
    await post(http, former, token, active=False)
    assert (await post(http, heir, token)).status_code == 201
    assert await listed(http, former) == []
    assert await shown(http, heir) == [token]


async def test_a_token_that_ten_register_at_once_has_one_owner(
    http: httpx.AsyncClient, database_url: str
) -> None:
    users, token = [await someone(http) for _ in range(10)], new_token()
    answers = await asyncio.gather(*(post(http, user_id, token) for user_id in users))
    assert {answer.status_code for answer in answers} == {201}
    owners = [user_id for user_id in users if await shown(http, user_id) == [token]]
    assert len(owners) == 1
    versions = [(await fetch(http, user_id))["version"] for user_id in users]
    assert sorted(versions) == [2, *[3] * 9], "nine lost it again"
    for user_id in users:
        logged = [version for version, _kind in await changes_of(database_url, user_id)]
        assert logged == list(range(1, len(logged) + 1))


async def test_opposite_moves_at_once_do_not_deadlock(
    http: httpx.AsyncClient, postgres: EmbeddedPostgres
) -> None:
    one, other = await someone(http), await someone(http)
    first, second = new_token(), new_token()
    await post(http, one, first)
    await post(http, other, second)
    for _ in range(15):
        answers = await asyncio.gather(
            post(http, one, second),
            post(http, other, first),
            post(http, one, second),
            post(http, other, first),
        )
        assert {answer.status_code for answer in answers} <= {200, 201}
        assert await shown(http, one) == [second]
        assert await shown(http, other) == [first]
        one, other = other, one
    versions = [(await fetch(http, user_id))["version"] for user_id in (one, other)]
    assert versions == [2 + 2 * 15] * 2, "each round gave one and took one"
    assert "deadlock" not in postgres.log_path.read_text(errors="replace")


async def test_of_a_web_push_subscription_the_endpoint_decides(http: httpx.AsyncClient) -> None:
    user_id, heir = await someone(http), await someone(http)
    endpoint = f"https://push.example.com/{new_token()}"

    def subscription(key: str) -> str:
        return json.dumps({"endpoint": endpoint, "expirationTime": None, "keys": {"p256dh": key}})

    first = await post(http, user_id, subscription("one"), platform="web")
    renewed = await post(http, user_id, subscription("two"), platform="web")
    assert (first.status_code, renewed.status_code) == (201, 200)
    assert renewed.json()["data"]["id"] == first.json()["data"]["id"]
    assert await shown(http, user_id) == [subscription("two")]
    assert (await fetch(http, user_id))["version"] == 3
    assert (await post(http, heir, subscription("three"), platform="web")).status_code == 201
    assert await shown(http, user_id) == []
    bare = await post(http, heir, endpoint, platform="web")
    assert bare.status_code == 200, "the endpoint by itself is the same device"
    odd = await post(http, heir, '{"endpoint": 7}', platform="web")
    assert odd.status_code == 201, "JSON that is no subscription is a token as it stands"


async def test_a_token_of_4096_characters_is_taken(http: httpx.AsyncClient) -> None:
    user_id, token = await someone(http), "ż" * 4096
    assert (await post(http, user_id, token)).status_code == 201
    assert await shown(http, user_id) == [token]


async def test_beyond_twenty_the_least_recently_seen_is_evicted(http: httpx.AsyncClient) -> None:
    user_id, tokens = await someone(http), [new_token() for _ in range(21)]
    for token in tokens[:20]:
        await post(http, user_id, token)
    await post(http, user_id, tokens[0])  # seen again
    await post(http, user_id, tokens[20])
    left = {tokens[0], *tokens[2:]}
    assert set(await shown(http, user_id)) == left
    assert (await fetch(http, user_id))["version"] == 22
    evicted = [device for device in await listed(http, user_id) if not device["active"]]
    assert [(d["token"], d["inactive_reason"]) for d in evicted] == [(tokens[1], "evicted")]
    path = f"/api/v1/users/{user_id}/devices/{evicted[0]['id']}"
    assert (await http.patch(path, json={"active": True})).status_code == 200
    assert set(await shown(http, user_id)) == (left | {tokens[1]}) - {tokens[2]}
    assert (await shown(http, user_id))[0] == tokens[1]


async def test_the_cap_holds_for_registrations_at_once(http: httpx.AsyncClient) -> None:
    user_id = await someone(http)
    tokens = [new_token() for _ in range(25)]
    for some in (tokens[:9], tokens[9:18], tokens[18:]):
        await asyncio.gather(*(post(http, user_id, token) for token in some))
    assert len(await shown(http, user_id)) == 20
    assert (await fetch(http, user_id))["version"] == 26


async def test_a_lowered_cap_changes_no_document_under_its_version(
    http: httpx.AsyncClient, database_url: str, redis_url: str
) -> None:
    user_id, tokens = await someone(http), [new_token() for _ in range(3)]
    etag = [(await post(http, user_id, token)).headers["etag"] for token in tokens][-1]
    app = create_app(
        settings_for(database_url, redis_url, PASSWORD_REQUIRED="false", MAX_ACTIVE_DEVICES="2")
    )
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # Litestar's ASGI types are narrower
    async with (
        app.lifespan(),
        httpx.AsyncClient(transport=transport, base_url="http://test") as lowered,
    ):
        # Conditional, so that it does not take the short way of a token that is only seen.
        again = await lowered.post(
            f"/api/v1/users/{user_id}/devices",
            json={"token": tokens[2], "platform": "ios"},
            headers={"If-Match": etag},
        )
        document = await shown(lowered, user_id)
    assert again.status_code == 200
    raised = again.headers["etag"] != etag
    assert (len(document) < 3) == raised
    assert len(await changes_of(database_url, user_id)) == 4 + raised


async def test_there_are_never_more_than_a_hundred(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user_id = await someone(http)
    inactive = """
        INSERT INTO devices (id, user_id, token, token_digest, platform, active, inactive_reason,
                             registered_at, last_seen_at, deactivated_at)
        SELECT gen_random_uuid(), $1, 'inactive-' || n, sha256(('hundred-' || n)::bytea), 'web',
               false, 'evicted', now(), now(), now() - make_interval(hours => n)
        FROM generate_series(1, 100) n"""
    await rows(database_url, inactive, user_id)
    token = new_token()
    await post(http, user_id, token)
    devices = await listed(http, user_id)
    assert len(devices) == 100
    left = {device["token"] for device in devices}
    assert left == {token, *(f"inactive-{n}" for n in range(1, 100))}, "the oldest one went"


async def test_what_is_inactive_for_longer_than_the_retention_is_deleted(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user_id, tokens = await someone(http), [new_token() for _ in range(4)]
    for token in tokens[:3]:
        device = (await post(http, user_id, token)).json()["data"]
        path = f"/api/v1/users/{user_id}/devices/{device['id']}"
        if token != tokens[2]:
            await http.patch(path, json={"active": False})
    await rows(
        database_url,
        "UPDATE devices SET deactivated_at = now() - interval '30 days 1 minute' WHERE token = $1",
        tokens[0],
    )
    await rows(
        database_url,
        "UPDATE devices SET deactivated_at = now() - interval '29 days 23 hours' WHERE token = $1",
        tokens[1],
    )
    await post(http, user_id, tokens[3])
    assert {d["token"] for d in await listed(http, user_id)} == set(tokens[1:])
    # Its owner is nobody now, so it is new.
    assert (await post(http, user_id, tokens[0])).status_code == 201


async def test_the_first_device_is_the_newest_registration(http: httpx.AsyncClient) -> None:
    user_id, tokens = await someone(http), [new_token() for _ in range(3)]
    for token in tokens:
        await post(http, user_id, token)
    await post(http, user_id, tokens[0])  # seen, not registered anew
    assert await shown(http, user_id) == tokens[::-1]
    assert [d["token"] for d in await listed(http, user_id)] == tokens[::-1]
