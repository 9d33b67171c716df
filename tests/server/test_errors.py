"""What every failed answer has in common: its id, its two forms, and silence about the inside."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from litestar import Litestar, get
from litestar.types import Message
from structlog.testing import capture_logs
from user_service_schemas import STATUS_OF, ErrorCode
from user_service_server.app import create_app
from user_service_server.settings import Settings

from .test_users import register

NOBODY = "/api/v1/users/01a205c7-a743-7a16-a135-c839ba84936e"
PROBLEM_JSON = "application/problem+json"
CONTRACT = {
    400: {"malformed_json", "invalid_cursor"},
    401: {"unauthenticated", "invalid_credentials"},
    403: {"forbidden"},
    404: {"user_not_found", "device_not_found", "route_not_found"},
    405: {"method_not_allowed"},
    408: {"request_timeout"},
    409: {"email_taken", "external_id_taken", "idempotency_in_progress"},
    412: {"version_mismatch"},
    413: {"body_too_large"},
    415: {"unsupported_media_type"},
    422: {"validation_failed", "idempotency_key_reused"},
    429: {"rate_limited"},
    500: {"internal_error"},
    503: {"dependency_unavailable", "overloaded"},
}


@get("/crash")
async def crash() -> None:
    raise RuntimeError("the secret of the inside")


@pytest.fixture(scope="module")
async def crashing(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """Calls an app that has a route with a bug."""
    app = create_app(settings)
    app.register(crash)
    async with app.lifespan():
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # as in conftest.py
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


def test_each_code_has_the_status_of_the_contract() -> None:
    assert {code.value: STATUS_OF[code] for code in ErrorCode} == {
        code: status for status, codes in CONTRACT.items() for code in codes
    }


async def test_a_crash_answers_in_the_envelope_and_says_nothing_of_the_inside(
    crashing: httpx.AsyncClient,
) -> None:
    answer = await crashing.get("/crash")

    assert answer.status_code == 500
    assert answer.json() == {
        "success": False,
        "data": None,
        "message": answer.json()["message"],
        "error": {
            "code": "internal_error",
            "details": [],
            "request_id": answer.headers["x-request-id"],
        },
    }
    assert not re.search("secret|RuntimeError|crash|Traceback", answer.text)


async def test_a_crash_is_a_problem_where_one_is_asked_for(crashing: httpx.AsyncClient) -> None:
    answer = await crashing.get("/crash", headers={"Accept": PROBLEM_JSON})
    assert answer.headers["content-type"] == PROBLEM_JSON
    assert (answer.json()["status"], answer.json()["code"]) == (500, "internal_error")


async def test_a_crash_is_logged_with_its_place_and_without_its_message(
    crashing: httpx.AsyncClient, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = await crashing.get("/crash")
    logged = "".join(capfd.readouterr())
    assert "RuntimeError" in logged
    assert "test_errors.py" in logged
    assert answer.headers["x-request-id"] in logged
    assert "the secret of the inside" not in logged


@pytest.mark.parametrize("given", ["4711", "a-b.c:d_E", "x" * 128])
async def test_a_request_id_is_taken_over(http: httpx.AsyncClient, given: str) -> None:
    answer = await http.get(NOBODY, headers={"X-Request-ID": given})
    assert answer.headers["x-request-id"] == given
    assert answer.json()["error"]["request_id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "two words", "<script>", 'a"b', "\xff"])
async def test_a_request_id_that_is_unfit_for_logs_is_replaced(
    http: httpx.AsyncClient, given: str
) -> None:
    headers = httpx.Headers({"X-Request-ID": given}, encoding="latin-1")
    answer = await http.get(NOBODY, headers=headers)
    made = answer.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f-]{36}", made)
    assert answer.json()["error"]["request_id"] == made


async def test_each_request_has_an_id_of_its_own(http: httpx.AsyncClient) -> None:
    ids = [(await http.get("/health/live")).headers["x-request-id"] for _ in range(3)]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        (PROBLEM_JSON, PROBLEM_JSON),
        ("Application/Problem+JSON", PROBLEM_JSON),
        (f"{PROBLEM_JSON}, application/json;q=0.5", PROBLEM_JSON),
        (f"application/json, {PROBLEM_JSON};q=0", "application/json"),
        (f"{PROBLEM_JSON};q=1e999", "application/json"),
    ],
)
async def test_a_caller_gets_the_form_of_errors_that_it_accepts(
    http: httpx.AsyncClient, accept: str, media_type: str
) -> None:
    answer = await http.get(NOBODY, headers={"Accept": accept})
    assert answer.headers["content-type"] == media_type
    assert "accept" in answer.headers["vary"].lower()


async def test_errors_are_not_kept_by_caches(http: httpx.AsyncClient) -> None:
    assert (await http.get(NOBODY)).headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", [NOBODY, "/health/live", "/nope"])
async def test_head_answers_as_get_does_but_without_a_body(
    http: httpx.AsyncClient, path: str
) -> None:
    got, head = await http.get(path), await http.head(path)
    assert head.status_code == got.status_code
    assert head.headers["content-type"] == got.headers["content-type"]
    assert head.headers["content-length"] == got.headers["content-length"]
    assert not head.content


async def test_the_ids_in_paths_are_read_in_any_case_and_with_any_slash(
    http: httpx.AsyncClient,
) -> None:
    jane = {"name": "Jane Roe", "email": "jane@example.com", "password": "Strong-Pass-123!"}
    made = await http.post("/api/v1/users", json=jane)
    user = made.json()["data"]
    paths = [f"/api/v1/users/{user['id']}", f"/api/v1/users/{user['id'].upper()}/"]
    assert [(await http.get(path)).json()["data"] for path in paths] == [user, user]


async def test_a_body_of_the_largest_size_is_read(http: httpx.AsyncClient) -> None:
    body = json.dumps({"email": "nobody@example.com"}).encode().ljust(64 * 1024)
    headers = {"Content-Type": "application/json; charset=utf-8"}
    answer = await http.post("/api/v1/users/lookup", content=body, headers=headers)
    assert answer.json()["data"] == {"users": []}
    more = await http.post("/api/v1/users/lookup", content=body + b" ", headers=headers)
    assert more.status_code == 413


async def test_unknown_methods_do_not_multiply_the_metrics(http: httpx.AsyncClient) -> None:
    for number in range(3):
        await http.request(f"BREW{number}", "/nope")
    assert "BREW" not in (await http.get("/metrics")).text


@pytest.mark.parametrize("path", [NOBODY, "/nowhere", "/health/live"])
@pytest.mark.parametrize("refused", ["http.response.start", "http.response.body"])
async def test_an_answer_that_cannot_be_sent_is_a_crash_after_which_no_other_begins(
    app: Litestar, path: str, refused: str
) -> None:
    await _crashes_once(app, path, refused)


@pytest.mark.parametrize("refused", ["http.response.start", "http.response.body"])
async def test_a_user_who_cannot_be_sent_is_such_a_crash(
    app: Litestar, http: httpx.AsyncClient, refused: str
) -> None:
    user = await register(http)
    await _crashes_once(app, f"/api/v1/users/{user['id']}", refused)


async def _crashes_once(app: Litestar, path: str, refused: str) -> None:
    sent: list[str] = []

    async def send(message: Message) -> None:
        sent.append(message["type"])
        if message["type"] == refused:
            raise RuntimeError("the secret of the inside")

    async def receive() -> Any:
        raise NotImplementedError  # nobody reads a body

    scope: Any = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"test")],
        "client": None,
        "server": ("test", 80),
        "state": {},
    }
    with capture_logs() as logged:
        await app(scope, receive, send)
    expected = ["http.response.start", "http.response.body"]
    assert sent == expected[: expected.index(refused) + 1]
    assert [line["event"] for line in logged] == ["request.crashed"]
    assert "secret" not in str(logged)
