"""Garbled requests to a whole server: none crashes it, and no cursor or tag does what it must not.

The long forms of these are in `tests/chaos/test_fuzz.py`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema_rs
import msgspec
import pytest
from litestar import Litestar
from user_service_schemas import STATUS_OF, ErrorCode, User
from user_service_server.http.openapi import openapi_document
from user_service_server.settings import Settings

from ..engines import settings_for
from ..system.subscribers import stream_scope
from .garbling import Garbler, Late, search_async
from .test_fuzz import is_plain_json, not_shown, routes_with_body, type_of

USERS = "/api/v1/users"
CHANGES = "/api/v1/changes"
JSON = {"Content-Type": "application/json"}
KEY = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,253}[\x21-\x7e])?")
PEOPLE = 30
REVISIONS = 25


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    """No password is hashed where none is needed: that takes longer than all else."""
    return settings_for(database_url, redis_url, PASSWORD_REQUIRED="false")


async def register(http: httpx.AsyncClient, number: int) -> str:
    jane = {"name": "Jane Roe", "email": f"jane.{number}@example.com"}
    user: str = (await http.post(f"{USERS}/", json=jane)).json()["data"]["id"]
    return user


def assert_in_envelope(answer: httpx.Response) -> None:
    """See that it is an answer of the contract, and no crash."""
    if answer.status_code == 503:
        raise Late
    assert answer.status_code < 500, answer.text
    if answer.status_code == 304:
        return
    body = answer.json()
    assert body.keys() == {"success", "data", "message", "error"}
    assert body["success"] is answer.is_success
    if not answer.is_success:
        assert STATUS_OF[ErrorCode(body["error"]["code"])] == answer.status_code


class Routes:
    """The routes that take bodies, and somebody to send them to."""

    def __init__(self, app: Litestar, http: httpx.AsyncClient) -> None:
        self._http = http
        self._routes = sorted(routes_with_body(app), key=lambda route: route[0])
        document = openapi_document(app, "1")
        self._told = json.dumps(document)
        self._is_user = jsonschema_rs.validator_for(
            {"$ref": "#/components/schemas/User", "components": document["components"]}
        )
        self.answered = Counter[str]()

    async def check(self, seed: int) -> None:
        """Send one garbled body to somebody of its own."""
        garbler = Garbler(seed)
        path, handler = garbler.random.choice(self._routes)
        body = garbler.body(type_of(handler), 4096)
        user = await register(self._http, seed)
        phone = {"token": f"token of {seed}", "platform": "ios"}
        answer = await self._http.post(f"{USERS}/{user}/devices", json=phone)
        device = answer.json()["data"]["id"]
        path = re.sub("{user_id[^}]*}", user, re.sub("{device_id[^}]*}", device, path))
        method = garbler.random.choice(sorted(handler.http_methods - {"OPTIONS"}))
        answer = await self._http.request(method, path, content=body, headers=JSON)

        said = (method, path, body, answer.text)
        self.answered[f"{handler.operation_id}: {answer.status_code}"] += 1
        assert_in_envelope(answer)
        if not answer.is_success and is_plain_json(body):
            not_shown(json.loads(body), answer.text, self._told)
        read = await self._http.get(f"{USERS}/{user}")
        assert read.status_code == 200, said
        shown = read.json()["data"]
        self._is_user.validate(shown)
        document = msgspec.convert(shown, User)
        assert read.headers["etag"].rstrip('"').endswith(f".{document.version}"), said
        if answer.is_success and answer.headers.get("etag") and user in path:
            assert answer.headers["etag"] == read.headers["etag"], said
        part = garbler.random.choice(["devices", "preferences", "preferences/history"])
        assert (await self._http.get(f"{USERS}/{user}/{part}")).status_code == 200, said
        assert (await self._http.delete(f"{USERS}/{user}")).status_code == 200, said


@dataclass
class Listing:
    """A listing as it is, read page by page: its ids, and the cursor behind each."""

    path: str
    parameter: str
    ids: list[str] = field(default_factory=list)
    cursors: list[str] = field(default_factory=list)


class Listings:
    """Three listings in which nothing changes, each read with all sorts of cursors."""

    def __init__(self, app: Litestar, http: httpx.AsyncClient) -> None:
        self._app = app
        self._http = http
        self.all: list[Listing] = []

    async def prepare(self) -> None:
        """Make people and changes, and read what there is."""
        users = [await register(self._http, number) for number in range(PEOPLE)]
        for number in range(REVISIONS):
            body = {"email": number % 2 == 1}
            await self._http.patch(f"{USERS}/{users[0]}/preferences", json=body)
        self.all = [
            await self._read(Listing(USERS, "cursor")),
            await self._read(Listing(f"{USERS}/{users[0]}/preferences/history", "cursor")),
        ]
        while not await self._feed_has(users[0], 1 + REVISIONS):
            pass
        self.all.append(await self._read(Listing(CHANGES, "after")))

    async def _feed_has(self, user: str, version: int) -> bool:
        """Whether this, the last of all changes, has its place in the feed."""
        sent = {"limit": "1000"}
        while True:
            page = (await self._http.get(CHANGES, params=sent)).json()["data"]
            if any((c["user_id"], c["version"]) == (user, version) for c in page["items"]):
                return True
            if not page["items"]:
                return False
            sent["after"] = page["next"]

    async def _read(self, listing: Listing) -> Listing:
        cursor: str | None = None
        while True:
            sent = {"limit": "1"} | ({} if cursor is None else {listing.parameter: cursor})
            page = (await self._http.get(listing.path, params=sent)).json()["data"]
            listing.ids += [_id(item) for item in page["items"]]
            cursor = page.get("next_cursor") or page.get("next")
            if cursor is None or not page["items"]:
                return listing
            listing.cursors.append(cursor)

    async def check(self, seed: int) -> None:
        """Read a page behind a cursor that may be none."""
        garbler = Garbler(seed)
        random = garbler.random
        listing = random.choice(self.all)
        of = random.choice([listing, listing, *self.all])
        valid = random.choice(of.cursors)
        cursor = random.choice([valid.encode(), *(self._garbled(garbler, valid) for _ in range(2))])
        limit = random.choice([b"1", b"3", b"200", str(random.randint(-3, 1002)).encode()])
        if random.random() < 0.2:
            limit = random.choice(
                [garbler.text().encode(), garbler.torn(limit), b"+1", b" 1", b"1_0", b"1e1", b"1.0"]
            )
        query = [(listing.parameter.encode(), cursor), (b"limit", limit)]
        if random.random() < 0.1:
            query.append((garbler.text().encode(), garbler.text().encode()))
        if random.random() < 0.05:
            query.append(random.choice(query))
        random.shuffle(query)
        sent = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in query)
        answer = await self._http.get(f"{listing.path}?{sent}")

        said = (listing.path, query, answer.text[:300])
        assert_in_envelope(answer)
        if answer.is_success:
            page = answer.json()["data"]
            ids = [_id(item) for item in page["items"]]
            start = listing.ids.index(ids[0]) if ids else len(listing.ids)
            assert ids == listing.ids[start : start + len(ids)], said
            size = int(float(limit))  # as in JSON, 1e1 is an integer
            assert len(ids) == min(size, len(listing.ids) - start), said
            if cursor == valid.encode():
                assert of is listing, said
                assert start == listing.cursors.index(valid) + 1, said
            if listing.parameter == "after":
                issued = {one.encode() for one in listing.cursors}
                assert cursor in issued or re.fullmatch(rb"[0-9a-f]+\.0", cursor), said
            behind = start + len(ids)
            if "next" in page and ids:
                assert page["next"] == listing.cursors[behind - 1], said
            elif page.get("next_cursor"):
                assert page["next_cursor"] == listing.cursors[behind - 1], said
            elif "next_cursor" in page:
                assert behind == len(listing.ids), said
        else:
            error = answer.json()["error"]
            assert error["code"] in {"invalid_cursor", "validation_failed"}, said
            if error["code"] == "validation_failed":
                named = {detail["field"] for detail in error["details"]}
                assert named <= {"limit", listing.parameter}, said
                assert named, said
            elif len(query) == 2 and re.fullmatch(b"[1-9][0-9]?", limit):
                assert cursor != valid.encode() or of is not listing, said
            for _, value in query:
                text = value.decode(errors="replace")
                assert len(text) < 7 or text not in answer.text, said

    def _garbled(self, garbler: Garbler, cursor: str) -> bytes:
        how = garbler.random.random()
        if how < 0.3:
            return garbler.text().encode()
        if how < 0.6:
            return garbler.torn(cursor.encode())
        if how < 0.7 and "." in cursor:
            epoch, _, position = cursor.partition(".")
            other = garbler.random.choice(
                [
                    f"{epoch}.0{position}",
                    f"{epoch}.{10 ** garbler.random.randint(1, 60)}",
                    f"{epoch}.{position}".translate({48 + n: 0x660 + n for n in range(10)}),
                    f"{epoch.upper()}.{position}",
                    f"{epoch}.-{position}",
                    f"{epoch}.\u00b2",
                    f"\u00e9.{position}",
                    f" {cursor}",
                ]
            )
            return other.encode()
        plain = (
            base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
            if "." not in cursor
            else b""
        )
        torn = garbler.torn(plain or b"users:1")
        return base64.urlsafe_b64encode(torn).rstrip(b"=" * garbler.random.randint(0, 1) or b"\0")

    async def check_stream(self, seed: int) -> None:
        """Follow the feed from a `Last-Event-ID` that may be none."""
        garbler = Garbler(seed)
        feed = self.all[-1]
        valid = garbler.random.choice(feed.cursors)
        sent = garbler.random.choice([valid.encode(), self._garbled(garbler, valid)])
        sent = re.sub(b"[\r\n\0]", b"", sent)
        status, received = await head_of_stream(self._app, [(b"last-event-id", sent)])

        said = (sent, status, received[:500])
        if status == 503:
            raise Late
        if status == 400:
            assert json.loads(received)["error"]["code"] == "invalid_cursor", said
            assert sent != valid.encode(), said
            return
        assert status == 200, said
        events = re.findall(rb"(?:id: (.*)\n)?event: (.*)\ndata: (.*)\n\n", received)
        assert events, said
        if not sent:
            assert events[0][1] == b"ready", said
        elif sent.decode("latin-1") in feed.cursors:
            follows = feed.cursors[feed.cursors.index(sent.decode()) + 1 :]
            ids = [id_.decode() for id_, name, _ in events if name == b"change"]
            assert ids == follows[: len(ids)], said
            assert ids or not follows, said
        else:
            ids = [id_.decode() for id_, name, _ in events if name == b"change"]
            zero = re.fullmatch(rb"[0-9a-f]+\.0", sent)
            assert events[0][1] == b"reset" or (zero and ids == feed.cursors[: len(ids)]), said


async def head_of_stream(app: Any, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """Open a stream, and leave it with its first events."""
    status, received = 0, b""
    enough = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await enough.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, received
        status = message.get("status", status)
        received += message.get("body", b"")
        if b"event: " in received:
            enough.set()

    scope = stream_scope(*headers)
    async with asyncio.timeout(20):
        await app(scope, receive, send)
    return status, received


def _id(item: dict[str, Any]) -> str:
    """Return by what an item is told from others: a revision has no id, but a version."""
    return str(item.get("position") or item.get("id") or item["version"])


class Conditions:
    """One user, read and written under garbled conditions."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._path = ""

    async def prepare(self) -> None:
        self._path = f"{USERS}/{await register(self._http, 4711)}"

    async def check(self, seed: int) -> None:
        garbler = Garbler(seed)
        etag = (await self._http.get(self._path)).headers["etag"]
        how = garbler.random.randrange(4)
        if how == 0:
            await self._check_read(garbler, etag)
        elif how == 1:
            await self._check_write(garbler, etag)
        elif how == 2:
            await self._check_key(garbler)
        else:
            await self._check_others(garbler)

    def _header(self, garbler: Garbler, valid: str) -> str:
        how = garbler.random.random()
        text = valid
        if how < 0.3:
            text = garbler.torn(valid.encode()).decode("latin-1")
        elif how < 0.5:
            text = garbler.text().encode().decode("latin-1")
        elif how < 0.6:
            text = ", ".join([garbler.text().encode().decode("latin-1"), valid, "W/" + valid])
        elif how < 0.7:
            text = garbler.random.choice(
                ["*", "W/" + valid, "**", "", valid.replace('"', ""), valid * 50]
            )
        return re.sub("[\r\n\0]", "", text)

    async def _send(
        self, method: str, headers: dict[str, str], body: dict[str, Any] | None = None
    ) -> httpx.Response:
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = await self._http.request(method, self._path, json=body, headers=encoded)  # type: ignore[arg-type]
        assert_in_envelope(answer)
        return answer

    async def _check_read(self, garbler: Garbler, etag: str) -> None:
        held = self._header(garbler, etag)
        least = self._header(garbler, str(garbler.random.randint(0, 10)))
        answer = await self._send("GET", {"If-None-Match": held, "X-Min-Version": least})
        said = (held, least, etag, answer.status_code, answer.text)
        if not re.fullmatch("[0-9]{1,18}", least):
            assert answer.status_code == 422, said
        elif held.strip() == "*" or etag in held:
            assert answer.status_code == 304, said
        else:
            assert answer.status_code == 200, said
        assert answer.is_success or len(held) < 7 or held not in answer.text, said

    async def _check_write(self, garbler: Garbler, etag: str) -> None:
        named = self._header(garbler, etag)
        body = {"name": f"Jane {garbler.random.random()}"}
        answer = await self._send("PATCH", {"If-Match": named}, body)
        epoch, _, version = etag.strip('"').split(".")
        tags = re.findall(rf'"{epoch}\.[0-9a-f]+\.0*{version}"', named)
        said = (named, etag, answer.status_code, answer.text)
        assert answer.status_code == (200 if tags or named.strip() == "*" else 412), said
        assert answer.headers["etag"], said

    async def _check_key(self, garbler: Garbler) -> None:
        key = self._header(garbler, f"key-{garbler.random.random()}")
        if garbler.random.random() < 0.2:
            key = key[:1] * garbler.random.choice([254, 255, 256])
        bodies = [{"name": f"Jane {garbler.random.random()}"} for _ in range(2)]
        first = await self._send("PATCH", {"Idempotency-Key": key}, bodies[0])
        again = await self._send("PATCH", {"Idempotency-Key": key}, bodies[0])
        other = await self._send("PATCH", {"Idempotency-Key": key}, bodies[1])
        said = (key, first.status_code, again.status_code, other.status_code)
        if not KEY.fullmatch(key):
            assert {first.status_code, again.status_code, other.status_code} == {422}, said
            assert first.json()["error"]["details"][0]["field"] == "Idempotency-Key", said
            assert len(key) < 7 or key not in first.text, said
        elif first.status_code == 200:
            assert "idempotency-replayed" in again.headers, said
            assert again.content == first.content, said
            assert other.json()["error"]["code"] == "idempotency_key_reused", said
        else:
            # A text that another seed has drawn, too.
            assert first.json()["error"]["code"] == "idempotency_key_reused", said

    async def _check_others(self, garbler: Garbler) -> None:
        """Send what is read of other headers: how the body and the answer are written, and ids."""
        types = self._header(garbler, "application/json; charset=utf-8")
        accepted = self._header(garbler, "application/problem+json;q=0.9, */*;q=0.1")
        traced = self._header(garbler, "trace-1")
        headers = {"Content-Type": types, "Accept": accepted, "X-Request-ID": traced}
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = await self._http.post(
            f"{USERS}/lookup",
            content=b'{"phone": "+48221234567"}',
            headers=encoded,  # type: ignore[arg-type]
        )
        said = (headers, answer.status_code, answer.text)
        if answer.headers["content-type"] == "application/problem+json":
            assert answer.json()["code"] == "unsupported_media_type", said
        else:
            assert_in_envelope(answer)
        is_json = types.partition(";")[0].strip().lower() == "application/json"
        assert answer.status_code == (200 if is_json else 415), said
        is_fit = re.fullmatch("[A-Za-z0-9._:-]{1,128}", traced)
        assert (answer.headers["x-request-id"] == traced) == bool(is_fit), said


async def test_no_garbled_body_crashes_a_route_or_harms_a_user(
    app: Litestar, http: httpx.AsyncClient
) -> None:
    await search_async(Routes(app, http).check, range(40))


async def test_a_garbled_cursor_is_refused_or_shows_a_page_of_its_listing(
    app: Litestar, http: httpx.AsyncClient
) -> None:
    listings = Listings(app, http)
    await listings.prepare()
    await search_async(listings.check, range(150))
    await search_async(listings.check_stream, range(50))


async def test_a_garbled_condition_or_key_is_never_met(http: httpx.AsyncClient) -> None:
    conditions = Conditions(http)
    await conditions.prepare()
    await search_async(conditions.check, range(200))
