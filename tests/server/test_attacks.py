"""What attackers send: refused in the 4xx, without memory, and without saying it back."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from user_service_server.settings import Settings

from ..engines import settings_for
from ..keys import EVERYTHING, REQUIRED, make_key, showing
from ..servers import Server, serving
from ..system.trouble import until

USERS = "/api/v1/users/"
NOBODY = "01a205c7-a743-7a16-a135-c839ba84936e"
BODY_TIMEOUT = 2.0
CLOSED = b"<closed>"
MARK = "zqxjkv"
"""In all that is sent: whatever answers with it has said it back."""
INJECTIONS = [
    f"{MARK}'; DROP TABLE users; --",
    f'{MARK}" OR 1=1 --',
    f"{MARK}'); redis.call('FLUSHALL') --",
    f"{MARK}]] return redis.call('KEYS', '*') --[[",
    f"{MARK}%s%(x)s{{0}}${{7*7}}{{{{7*7}}}}",
    f"../../etc/passwd#{MARK}",
    f"<script>{MARK}</script>",
    f":{MARK} $1 ?",
]


@pytest.fixture(scope="module")
def server(database_url: str, redis_url: str) -> Iterator[Server]:
    with serving(
        database_url,
        redis_url,
        **REQUIRED,
        REDIS_TIMEOUT_MS="2000",
        BODY_TIMEOUT=str(BODY_TIMEOUT),
    ) as started:
        yield started


@pytest.fixture(scope="module")
async def key(database_url: str, redis_url: str) -> str:
    settings: Settings = settings_for(database_url, redis_url)
    return await make_key(settings, "attacker", *EVERYTHING)


@pytest.fixture
async def http(server: Server, key: str) -> Any:
    async with httpx.AsyncClient(base_url=server.url, headers=showing(key), timeout=30) as client:
        yield client


def memory(server: Server) -> float:
    """Return what the server holds, in MB."""
    assert server.process is not None
    return float(psutil.Process(server.process.pid).memory_info().rss) / 1e6


def assert_refused(answer: httpx.Response) -> None:
    assert 400 <= answer.status_code < 500, answer.text[:300]
    body = answer.json()
    assert set(body) == {"success", "data", "message", "error"}
    assert MARK not in answer.text
    assert MARK not in str(answer.headers)


async def raw(server: Server, sent: bytes, within: float = 10) -> bytes:
    """Send bytes and return all that comes back until the server ends the connection, or says no
    more for a second; `CLOSED` behind it where the server ended it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    received = b""
    try:
        writer.write(sent)
        while True:
            chunk = await asyncio.wait_for(reader.read(65536), 1 if received else within)
            if not chunk:
                received += CLOSED
                break
            received += chunk
    except ConnectionError:
        received += CLOSED
    except TimeoutError:
        pass
    finally:
        writer.close()
    return received


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", received)]


async def test_bodies_of_ten_megabytes_are_refused_and_not_kept(
    server: Server, http: httpx.AsyncClient
) -> None:
    await http.post(USERS, json={})
    before = memory(server)
    body = json.dumps({"name": MARK * 1_700_000}).encode()
    json_type = {"Content-Type": "application/json"}

    async def in_chunks() -> Any:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    for _ in range(5):
        for content in (body, in_chunks()):
            try:
                answer = await http.post(USERS, content=content, headers=json_type)
            except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
                continue  # refused before it was sent
            assert answer.status_code == 413
            assert_refused(answer)
    assert memory(server) - before < 30


async def test_headers_of_ten_megabytes_are_refused(server: Server, key: str) -> None:
    before = memory(server)
    for header in (
        b"X-Big: " + MARK.encode() * 1_700_000,
        b"\r\n".join(b"X-%d: %s" % (i, MARK.encode()) for i in range(500_000)),
        b"Authorization: Bearer " + b"k" * 10_000_000,
    ):
        sent = b"GET /api/v1/users HTTP/1.1\r\nHost: t\r\n" + header + b"\r\n\r\n"
        received = await raw(server, sent)
        assert statuses(received) in ([431], [400], [])
        assert MARK.encode() not in received
    assert memory(server) - before < 30
    assert key


async def test_a_body_of_a_hundred_thousand_levels_is_refused(http: httpx.AsyncClient) -> None:
    for opening in ("[", '{"a":', '{"preferences":'):
        content = (opening * 100_000)[:60_000]
        answer = await http.post(
            USERS, content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        assert_refused(answer)


@pytest.mark.parametrize(
    "framing",
    [
        pytest.param("Content-Length: 5\r\nContent-Length: 6", id="two-lengths"),
        pytest.param("Content-Length: 5, 6", id="a-list-of-lengths"),
        pytest.param("Content-Length: +5", id="plus"),
        pytest.param("Content-Length: -1", id="negative"),
        pytest.param("Content-Length: 0x5", id="hexadecimal"),
        pytest.param("Content-Length: 99999999999999999999", id="overflow"),
        pytest.param("Content-Length: 5\r\nTransfer-Encoding: chunked", id="length-and-chunked"),
        pytest.param("Transfer-Encoding: chunked\r\nContent-Length: 5", id="chunked-and-length"),
        pytest.param("Transfer-Encoding: xchunked", id="unknown-encoding"),
        pytest.param("Transfer-Encoding : chunked", id="space-before-colon"),
        pytest.param("Transfer-Encoding: chunked, identity", id="not-the-last"),
        pytest.param("X: y\r\n Transfer-Encoding: chunked", id="folded"),
    ],
)
async def test_of_shapes_that_smuggle_no_second_request_is_answered(
    server: Server, key: str, framing: str
) -> None:
    """What hides behind them is not read: there is one answer, and the connection ends with it.

    Of a length beside chunks, the length is not looked at (RFC 9112, section 6.1).
    """
    hidden = "GET /health/live HTTP/1.1\r\nHost: t\r\n\r\n"
    sent = (
        f"POST {USERS} HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\n{framing}\r\n\r\n0\r\n\r\n{hidden}"
    )
    received = await raw(server, sent.encode(), within=BODY_TIMEOUT + 3)
    (status,) = statuses(received)
    assert status in {400, 408}, received
    assert received.endswith(CLOSED), received


async def test_who_hangs_up_in_the_middle_of_a_body_is_no_crash_of_ours(
    server: Server, key: str
) -> None:
    """It happens all the time, and nobody is to be woken for it."""
    for number, framing in enumerate(("Content-Length: 100", "Transfer-Encoding: chunked")):
        request_id = f"hangs-up-{number}"
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        begun = "5\r\n" if "chunked" in framing else ""
        writer.write(
            f"POST {USERS} HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {key}\r\n"
            f"X-Request-ID: {request_id}\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
            f'{begun}{{"na'.encode()
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()

        async def is_noted(request_id: str = request_id) -> bool:
            return request_id in await asyncio.to_thread(server.log.read_text)

        await until(is_noted, 5)
        (line,) = [
            json.loads(line)
            for line in (await asyncio.to_thread(server.log.read_text)).splitlines()
            if request_id in line
        ]
        assert (line["event"], line["level"], line["status"]) == ("request", "info", 400)


async def test_a_length_that_is_told_twice_and_a_bare_line_feed_are_read_in_one_way(
    server: Server, key: str
) -> None:
    """RFC 9112, sections 6.3 and 2.2, allow both: what follows the body is a request of its own."""
    following = "GET /health/live HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n"
    for framing in ("Content-Length: 5\r\nContent-Length: 5", "X: y\nTransfer-Encoding: chunked"):
        sent = (
            f"POST {USERS} HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\n{framing}\r\n\r\n0\r\n\r\n{following}"
        )
        first, second = statuses(await raw(server, sent.encode()))
        assert first in {400, 422}
        assert second == 200


async def test_line_breaks_do_not_get_into_headers(server: Server, key: str) -> None:
    for field in ("X-Request-ID", "Idempotency-Key", "If-None-Match", "Authorization", "Accept"):
        for bad in (f"a\r\nX-{MARK}: 1", f"a\nX-{MARK}: 1", f"a\r X-{MARK}", "a\x00b"):
            sent = (
                f"GET /api/v1/users/{NOBODY} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n"
                f"{field}: {bad}\r\nAuthorization: Bearer {key}\r\n\r\n"
            )
            received = await raw(server, sent.encode())
            assert statuses(received) in ([400], [401], [404]), received[:200]
            assert MARK.encode() not in received.lower()
    for path in (f"/api/v1/users/%0d%0aX-{MARK}:1", f"/docs/%0d%0a{MARK}", f"/{MARK}%00"):
        received = await raw(
            server,
            f"GET {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n"
            f"Authorization: Bearer {key}\r\n\r\n".encode(),
        )
        assert statuses(received) == [404]
        assert MARK.encode() not in received


@pytest.mark.parametrize(
    "identifier",
    [
        "..%2f..%2fetc%2fpasswd", "..", "%2e%2e", "....//", "%00", "..%5c..%5c", "' OR '1'='1",
        "%27%3B--", f"{NOBODY}%00", f"{NOBODY}%0a", "*", "%", "%ff%fe", "null", "-1", "9" * 500,
    ],
)  # fmt: skip
async def test_an_id_is_nothing_but_an_id(http: httpx.AsyncClient, identifier: str) -> None:
    for path in (
        f"/api/v1/users/{identifier}{MARK}",
        f"/api/v1/users/{identifier}",
        f"/api/v1/users/{identifier}/preferences",
        f"/api/v1/users/{NOBODY}/devices/{identifier}",
        f"/docs/{identifier}",
    ):
        for method in ("GET", "DELETE"):
            answer = await http.request(method, path)
            assert answer.status_code in {200, 400, 404, 405}, (path, answer.text)
            assert MARK not in answer.text
            assert answer.status_code != 200 or answer.url.path.rstrip("/") in {
                "/api/v1/users",
                "/docs",
            }


def fields() -> Iterator[tuple[str, str, Any]]:
    """Yield requests with `{}` in the place of one string."""
    person = {"name": "Jo", "email": "jo@example.com", "password": "StrongPass123!"}
    for name in ("name", "email", "phone", "locale", "external_id"):
        yield "POST", USERS, {**person, name: "{}"}
        yield "PATCH", f"{USERS}{NOBODY}", {name: "{}"}
    for name in ("quiet_hours_start", "quiet_hours_end", "timezone", "muted_until"):
        yield "PATCH", f"{USERS}{NOBODY}/preferences", {name: "{}"}
    yield "PATCH", f"{USERS}{NOBODY}/preferences", {"categories": {"{}": {"email": False}}}
    yield "PATCH", f"{USERS}{NOBODY}/preferences", {"consent": {"source": "{}"}}
    yield "PATCH", f"{USERS}{NOBODY}/preferences", {"{}": True}
    for name in ("token", "app", "platform"):
        device = {"token": "t", "platform": "ios", name: "{}"}
        yield "POST", f"{USERS}{NOBODY}/devices", device
    for name in ("email", "phone", "external_id"):
        yield "POST", f"{USERS}lookup", {name: "{}"}
    yield "POST", f"{USERS}batch", {"ids": ["{}"]}
    yield "POST", "/api/v1/credentials/verify", {"email": "{}", "password": "x"}
    yield "POST", "/api/v1/credentials/verify", {"email": "jo@example.com", "password": "{}"}
    yield "PUT", f"{USERS}{NOBODY}/password", {"password": "{}", "current_password": "{}"}
    yield "POST", "/api/v1/deliveries/resolve", {"channel": "{}", "user_ids": ["{}"]}


async def test_no_string_is_a_statement_or_a_script(http: httpx.AsyncClient) -> None:
    for number, injection in enumerate(INJECTIONS):
        for method, path, body in fields():
            text = json.dumps(body).replace("{}", json.dumps(injection)[1:-1])
            text = text.replace("jo@example.com", f"jo.{number}@example.com")
            headers = {"Content-Type": "application/json"}
            answer = await http.request(method, path, content=text, headers=headers)
            assert answer.status_code < 500, (path, text, answer.text)
            if not answer.is_success:
                assert_refused(answer)
        for name in ("Idempotency-Key", "If-Match", "If-None-Match", "X-Min-Version", "Accept"):
            answer = await http.patch(
                f"{USERS}{NOBODY}", json={"name": "B"}, headers={name: injection}
            )
            assert_refused(answer)
        for query in ("cursor", "limit", "after"):
            for listing in ("/api/v1/users", "/api/v1/changes"):
                answer = await http.get(listing, params={query: injection})
                assert answer.status_code < 500
                assert answer.is_success or MARK not in answer.text
    health = (await http.get("/health")).json()
    assert health["data"]["status"] == "healthy"
    assert (await http.get("/api/v1/users")).json()["data"]["items"], "the table is there"


async def test_confusables_are_other_emails(http: httpx.AsyncClient) -> None:
    made = set()
    for local in ("paypal", "p\u0430ypal", "paypa\u04cf", "\uff50aypal"):
        body = {"name": "P", "email": f"{local}@example.com", "password": "StrongPass123!"}
        answer = await http.post(USERS, json=body)
        assert answer.status_code in {201, 409, 422}, answer.text
        if answer.status_code == 201:
            made.add(answer.json()["data"]["id"])
            looked = await http.post(f"{USERS}lookup", json={"email": body["email"]})
            assert [user["id"] for user in looked.json()["data"]["users"]] == [
                answer.json()["data"]["id"]
            ]
    verified = await http.post(
        "/api/v1/credentials/verify",
        json={"email": "paypal@example.com", "password": "StrongPass123!"},
    )
    assert verified.json()["data"]["user_id"] in made


async def test_much_of_everything(server: Server, http: httpx.AsyncClient) -> None:
    body = {"name": "M", "email": "much@example.com", "password": "StrongPass123!"}
    user = f"{USERS}{(await http.post(USERS, json=body)).json()['data']['id']}"
    emoji = {"token": "\U0001f600" * 1024, "platform": "web"}  # 4096 bytes
    answer = await http.post(f"{user}/devices", json=emoji)
    assert answer.status_code == 201
    assert answer.json()["data"]["token"] == emoji["token"]
    before = memory(server)
    categories = {f"{MARK}{i}": {"email": False} for i in range(1_000_000)}
    try:
        answer = await http.patch(f"{user}/preferences", json={"categories": categories})
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        pass  # refused before it was sent
    else:
        assert answer.status_code == 413
        assert_refused(answer)
    few = {f"{MARK}{i}": {"email": False} for i in range(1_900)}  # as many as 64 KiB hold
    answer = await http.patch(f"{user}/preferences", json={"categories": few})
    assert answer.status_code == 422
    assert_refused(answer)
    assert len(answer.json()["error"]["details"]) <= 100
    assert memory(server) - before < 30


async def test_a_slow_body_is_cut_off_and_others_are_answered(
    server: Server, http: httpx.AsyncClient, key: str
) -> None:
    head = (
        f"POST {USERS} HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {key}\r\n"
        "Content-Type: application/json\r\n"
    )

    async def drip(framing: str, piece: bytes) -> tuple[bytes, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        began = time.monotonic()
        writer.write(f"{head}{framing}\r\n\r\n".encode())
        reading = asyncio.create_task(reader.read(4096))
        while not reading.done() and time.monotonic() - began < BODY_TIMEOUT + 8:
            writer.write(piece)
            await asyncio.wait({reading}, timeout=0.2)
        reading.cancel()
        writer.close()
        received = reading.result() if reading.done() and not reading.cancelled() else b""
        return received, time.monotonic() - began

    before = memory(server)
    slow = [
        *(drip("Content-Length: 1000", b" ") for _ in range(50)),
        *(drip("Transfer-Encoding: chunked", b"1\r\n \r\n") for _ in range(50)),
    ]
    dripping = asyncio.gather(*slow)
    while not dripping.done():
        assert (await http.get("/health/live")).status_code == 200
        await asyncio.sleep(0.2)
    for received, took in await dripping:
        assert b" 408 " in received, received
        assert b'"code":"request_timeout"' in received
        assert took < BODY_TIMEOUT + 6
    assert memory(server) - before < 40


async def test_slow_headers_of_five_hundred_hold_nobody_up(
    server: Server, http: httpx.AsyncClient
) -> None:
    before = memory(server)
    opened = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(500)]
    try:
        for round_ in range(3):
            for _, writer in opened:
                writer.write(b"a" if round_ else b"GET / HTTP/1.1\r\nX-Slow: ")
            took = []
            for _ in range(20):
                began = time.monotonic()
                assert (await http.get(f"{USERS}{NOBODY}")).status_code == 404
                took.append(time.monotonic() - began)
            assert sorted(took)[10] < 1
        assert memory(server) - before < 60
    finally:
        for _, writer in opened:
            writer.close()


async def test_the_documentation_runs_nothing_from_elsewhere(http: httpx.AsyncClient) -> None:
    for path in ("/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"):
        headers = (await http.get(path)).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "no-referrer"
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "frame-ancestors 'none'" in policy
    assert (await http.get("/openapi.json")).headers["X-Content-Type-Options"] == "nosniff"


async def test_no_other_origin_is_let_in(http: httpx.AsyncClient) -> None:
    origin = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "GET"}
    for answer in (
        await http.get(f"{USERS}{NOBODY}", headers=origin),
        await http.options(f"{USERS}{NOBODY}", headers=origin),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control-")]
