"""Where requests go, and the headers that httpx is not asked to make."""

from __future__ import annotations

import gzip

import httpx
import pytest
from user_service_client import NotFound, UserServiceClient, UserServiceError

from tests.client.conftest import ETAG, USER, USER_ID, Service, envelope

BASES = [
    "http://users.test",
    "http://users.test/",
    "https://users.test:8443",
    "http://users.test:80/mounted",
    "http://127.0.0.1:3001/a%20b/",
    "http://[::1]:3001",
]


@pytest.mark.parametrize("base_url", BASES)
@pytest.mark.parametrize("user_id", [USER_ID, "a/b?c#d", "%2e%2e", "ü é", "a..b", "+&="])
async def test_an_address_is_what_httpx_makes_of_its_text(base_url: str, user_id: str) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(404)

    transport = httpx.MockTransport(answer)
    async with UserServiceClient(base_url, transport=transport, retries=0) as client:
        with pytest.raises(NotFound):
            await client.users.get(user_id)
        with pytest.raises(UserServiceError):
            await client.changes.list(after="a/b?c&d=ü")
    for request in seen:
        whole = httpx.Request("GET", f"{request.url}")
        assert request.url == whole.url
        assert request.url.raw_path == whole.url.raw_path
        assert request.headers["Host"] == whole.headers["Host"]
    assert f"{seen[0].url}".startswith(f"{httpx.URL(base_url)}".rstrip("/") + "/api/v1/users/")


async def test_a_body_has_its_length_and_a_read_has_none(
    scripted: UserServiceClient, service: Service
) -> None:
    service.answers({"users": [USER], "missing": []})
    await scripted.users.get_many([USER_ID])
    assert service.sent.headers["Content-Length"] == str(len(service.sent.content))
    assert service.sent.content

    service.answers(USER)
    await scripted.users.get_with_etag(USER_ID)
    assert "Content-Length" not in service.sent.headers


async def test_a_compressed_answer_is_read(scripted: UserServiceClient, service: Service) -> None:
    body = gzip.compress(envelope(USER))
    service.replies(200, body, {"ETag": ETAG, "Content-Encoding": "gzip"})
    assert (await scripted.users.get(USER_ID)).id == USER_ID
