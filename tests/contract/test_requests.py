"""What surrounds every answer, by the fake and by the server alike."""

from __future__ import annotations

import httpx
import pytest
from user_service_client import UserServiceClient

from .people import (
    NOBODY,
    PASSWORD,
    USERS,
    assert_refused,
    data_of,
    new_email,
    register,
    version_of,
)


@pytest.mark.parametrize("rest", ["", "/preferences"])
async def test_a_copy_that_is_right_is_not_sent_again(raw: httpx.AsyncClient, rest: str) -> None:
    path = f"{USERS}/{(await register(raw))['id']}"
    etag = (await raw.get(path + rest)).headers["etag"]
    for held in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        answer = await raw.get(path + rest, headers={"If-None-Match": held})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
        assert answer.headers["cache-control"] == "private, no-cache"
    await raw.patch(path, json={"name": "Bob"})
    changed = await raw.get(path + rest, headers={"If-None-Match": etag})
    assert (changed.status_code, version_of(changed)) == (200, 2)


async def test_the_version_of_another_epoch_or_format_is_another(raw: httpx.AsyncClient) -> None:
    path = f"{USERS}/{(await register(raw))['id']}"
    epoch, shape, version = (await raw.get(path)).headers["etag"].strip('"').split(".")
    other_format = {"If-None-Match": f'"{epoch}.0.{version}"'}
    assert (await raw.get(path, headers=other_format)).status_code == 200
    other_epoch = {"If-Match": f'"0.{shape}.{version}"'}
    answer = await raw.patch(path, json={"name": "Bob"}, headers=other_epoch)
    assert_refused(answer, 412, "version_mismatch")
    assert answer.headers["etag"] == f'"{epoch}.{shape}.{version}"'
    same_version = {"If-Match": f'"{epoch}.0.{version}"'}
    assert (await raw.patch(path, json={"name": "Bob"}, headers=same_version)).is_success


async def test_a_least_version_is_a_number(raw: httpx.AsyncClient) -> None:
    path = f"{USERS}/{(await register(raw))['id']}"
    assert (await raw.get(path, headers={"X-Min-Version": "1"})).is_success
    answer = await raw.get(path, headers={"X-Min-Version": "x"})
    assert_refused(answer, 422, "validation_failed", "X-Min-Version")


async def test_a_repeated_write_happens_once(raw: httpx.AsyncClient) -> None:
    body = {"name": "Ada", "email": new_email(), "password": PASSWORD}
    key = {"Idempotency-Key": new_email()}
    first = await raw.post(f"{USERS}/", json=body, headers=key)
    again = await raw.post(f"{USERS}/", json=body, headers=key)
    assert (again.status_code, again.content) == (201, first.content)
    assert [again.headers[name] for name in ("etag", "location")] == [
        first.headers[name] for name in ("etag", "location")
    ]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    other = await raw.post(f"{USERS}/", json=body | {"name": "Bob"}, headers=key)
    assert_refused(other, 422, "idempotency_key_reused")


async def test_a_refusal_is_not_repeated(raw: httpx.AsyncClient) -> None:
    ada = await register(raw)
    key = {"Idempotency-Key": new_email()}
    body = {"name": "Eve", "email": ada["email"], "password": PASSWORD}
    assert_refused(await raw.post(USERS, json=body, headers=key), 409, "email_taken", "email")
    await raw.delete(f"{USERS}/{ada['id']}")
    assert (await raw.post(USERS, json=body, headers=key)).status_code == 201


async def test_an_erased_users_answers_are_forgotten(raw: httpx.AsyncClient) -> None:
    path = f"{USERS}/{(await register(raw))['id']}"
    key = {"Idempotency-Key": new_email()}
    gone = {"Idempotency-Key": new_email()}
    assert (await raw.patch(path, json={"name": "Bob"}, headers=key)).is_success
    assert (await raw.delete(path, headers=gone)).is_success
    assert_refused(await raw.patch(path, json={"name": "Bob"}, headers=key), 404, "user_not_found")
    assert (await raw.delete(path, headers=gone)).headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize("key", ["", " ", "x" * 256])
async def test_a_key_is_checked(raw: httpx.AsyncClient, key: str) -> None:
    path = f"{USERS}/{(await register(raw))['id']}"
    answer = await raw.patch(path, json={"name": "Bob"}, headers={"Idempotency-Key": key})
    assert_refused(answer, 422, "validation_failed", "Idempotency-Key")


async def test_a_request_id_comes_back(raw: httpx.AsyncClient) -> None:
    answer = await raw.get(f"{USERS}/x", headers={"X-Request-ID": "mine-1"})
    assert_refused(answer, 404, "user_not_found", "user_id")
    assert answer.headers["x-request-id"] == "mine-1"
    answer = await raw.get(f"{USERS}/x", headers={"X-Request-ID": "not fit for a log"})
    assert answer.headers["x-request-id"] not in ("", "not fit for a log")


async def test_errors_are_problems_for_who_wants_them(raw: httpx.AsyncClient) -> None:
    answer = await raw.get(f"{USERS}/{NOBODY}", headers={"Accept": "application/problem+json"})
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == "urn:user-service:error:user_not_found"
    assert (problem["status"], problem["request_id"]) == (404, answer.headers["x-request-id"])


async def test_what_is_no_json_is_refused(raw: httpx.AsyncClient) -> None:
    path = f"{USERS}/{(await register(raw))['id']}"
    json = {"Content-Type": "application/json"}
    for body, headers, status, code in (
        (b"{", json, 400, "malformed_json"),
        (b"", json, 400, "malformed_json"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}", {}, 415, "unsupported_media_type"),
        (b" " * 65537, json, 413, "body_too_large"),
    ):
        answer = await raw.patch(path, content=body, headers=headers)
        assert_refused(answer, status, code)
    assert (await raw.get(path)).json()["data"]["version"] == 1


async def test_unknown_paths_and_methods(raw: httpx.AsyncClient) -> None:
    assert_refused(await raw.get("/api/v1/nothing"), 404, "route_not_found")
    answer = await raw.post(f"{USERS}/{NOBODY}", json={})
    assert_refused(answer, 405, "method_not_allowed")
    assert {"GET", "HEAD", "PATCH", "PUT", "DELETE"} <= set(answer.headers["allow"].split(", "))
    assert (await raw.options(USERS)).status_code == 204
    head = await raw.head(f"{USERS}/{(await register(raw))['id']}")
    assert (head.status_code, head.content, version_of(head)) == (200, b"", 1)


async def test_health(client: UserServiceClient, raw: httpx.AsyncClient) -> None:
    health = await client.health()
    assert health.status == "healthy"
    assert {name: one.status for name, one in health.dependencies.items()} == {
        "postgres": "up",
        "redis": "up",
    }
    assert data_of(await raw.get("/health/live")) == {"status": "alive"}
    assert data_of(await raw.get("/health/ready/")) == {"status": "ready"}
