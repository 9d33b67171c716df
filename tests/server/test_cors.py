"""Whose scripts may call from a browser: those of named origins, and of exactly these."""

from __future__ import annotations

import httpx
import pytest
from user_service_server.settings import Settings

from ..engines import settings_for
from .test_users import register

OURS = "https://admin.example.com"
ALSO_OURS = "http://localhost:5173"
USER = "/api/v1/users/01a205c7-a743-7a16-a135-c839ba84936e"


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    origins = f"{OURS}, {ALSO_OURS}"
    return settings_for(database_url, redis_url, CORS_ORIGINS=origins, PASSWORD_REQUIRED="false")


def told(answer: httpx.Response) -> dict[str, str]:
    return {n: v for n, v in answer.headers.items() if n.startswith("access-control-")}


async def preflight(http: httpx.AsyncClient, origin: str) -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": "PATCH"}
    return await http.options(USER, headers=asked)


async def test_a_named_origin_is_told_what_it_may_do(http: httpx.AsyncClient) -> None:
    for origin in (OURS, ALSO_OURS):
        answer = await preflight(http, origin)
        assert answer.status_code == 204
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert "PATCH" in answer.headers["Access-Control-Allow-Methods"]
        assert "Idempotency-Key" in answer.headers["Access-Control-Allow-Headers"]
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert answer.headers["X-Request-ID"]


async def test_a_named_origin_may_read_answers_and_errors(http: httpx.AsyncClient) -> None:
    """What the answer varies by is told beside what it varied by before."""
    user = await register(http, password=None)
    for path, status in (
        (f"/api/v1/users/{user['id']}", 200),
        (USER, 404),
        ("/api/v1/users", 200),
        ("/nowhere", 404),
    ):
        answer = await http.get(path, headers={"Origin": OURS})
        assert answer.status_code == status
        assert answer.headers["Access-Control-Allow-Origin"] == OURS
        assert "ETag" in answer.headers["Access-Control-Expose-Headers"]
        varies = {part.strip() for part in answer.headers["Vary"].split(",")}
        assert varies == ({"Accept", "Origin"} if status == 404 else {"Origin"})


@pytest.mark.parametrize(
    "origin",
    [
        "https://elsewhere.example",
        "null",
        "http://admin.example.com",
        "https://admin.example.com:8443",
        "https://admin.example.com.evil.example",
        "https://evil-admin.example.com",
        "https://adminXexample.com",
        f"{OURS}, {ALSO_OURS}",
        "",
    ],
)
async def test_another_origin_is_told_nothing(http: httpx.AsyncClient, origin: str) -> None:
    assert told(await preflight(http, origin)) == {}
    answer = await http.get("/api/v1/users", headers={"Origin": origin})
    assert told(answer) == {}
    assert answer.headers["Vary"] == "Origin"


async def test_who_is_no_browser_is_told_nothing(http: httpx.AsyncClient) -> None:
    assert told(await http.get("/api/v1/users")) == {}
    answer = await http.options(USER)
    assert answer.status_code == 204
    assert "OPTIONS" in answer.headers["Allow"]
