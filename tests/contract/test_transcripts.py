"""The fake answers request for request as the server does: statuses, headers, words and all."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from user_service_client.testing import FakeUserService
from user_service_server.app import create_app

from ..engines import settings_for
from .people import FEEDBACK, NOBODY, PASSWORD, RESOLVE, USERS

Ask = Callable[..., Awaitable[httpx.Response]]
"""Takes a method, a path and httpx's keywords; what it is answered is compared."""

JSON = {"Content-Type": "application/json"}
VERIFY = "/api/v1/credentials/verify"
SHELL = (
    *("date", "server", "content-length", "x-request-id"),
    *("ratelimit", "ratelimit-policy", "x-content-type-options"),
)
"""Headers that are of the connection, of the length of times and ids, or of limits, of which the
fake has none."""


class Transcript:
    """What one service answered, with ids, times and positions named by when they came up."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._names: dict[str, str] = {}
        self.lines: list[str] = []

    async def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Ask, and note the answer."""
        answer = await self._http.request(method, path, **request)
        headers = sorted(
            (name, ", ".join(sorted(value.split(", "))) if name == "allow" else value)
            for name, value in answer.headers.items()
            if name not in SHELL
        )
        shown = {name: value for name, value in request.items() if name != "content"}
        self.lines.append(
            self._plain(f"{method} {path} {shown} -> {answer.status_code} {headers} {answer.text}")
        )
        return answer

    def _plain(self, text: str) -> str:
        text = re.sub(r"""((?:'cursor': '|"next_cursor":"))([\w-]{8,})""", _cursor, text)
        text = re.sub(r"history:\d+\b(?!-)", "history:…", text)
        text = re.sub(r'"latency_ms":[\d.]+', '"latency_ms":…', text)
        text = re.sub(r'"request_id":"[^"]+"', '"request_id":…', text)
        text = re.sub(r"(?!2030)\b\d{4}-\d\d-\d\dT[\d:.]+Z", "…", text)
        text = re.sub(r"(?<![.\w-])[0-9a-f]{8}(?=\.[0-9a-f]+\b)", "epoch", text)
        return re.sub(r"(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", self._name, text)

    def _name(self, found: re.Match[str]) -> str:
        return self._names.setdefault(found[0].lower(), f"id-{len(self._names)}")


def _cursor(found: re.Match[str]) -> str:
    return found[1] + base64.urlsafe_b64decode(found[2] + "=" * (-len(found[2]) % 4)).decode()


def _cursor_of(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


async def _someone(ask: Ask, email: str, **fields: Any) -> str:
    body = {"name": "Ada", "email": email, "password": PASSWORD, **fields}
    return str((await ask("POST", f"{USERS}/", json=body)).json()["data"]["id"])


async def registrations(ask: Ask) -> None:
    """Who is registered, and who is refused."""
    everything = {
        "name": "  Ada ",
        "email": "Ada@Registered.example.com",
        "password": PASSWORD,
        "phone": "+48221234567",
        "external_id": "crm-1",
        "locale": "zh-hant-tw",
        "preferences": {
            "push": False,
            "quiet_hours_start": "22:00",
            "quiet_hours_end": "07:00",
            "timezone": "Europe/Warsaw",
            "muted_until": "2030-01-01T01:00:00+01:00",
            "categories": {"marketing": {"email": False}},
            "consent": {"source": "form"},
        },
    }
    created = await ask("POST", f"{USERS}/", json=everything)
    await ask("GET", f"{USERS}/{created.json()['data']['id']}")
    for fields in (
        {},
        {"external_id": "other"},
        {"email": "x@registered.example.com"},
        {"email": "x@registered.example.com", "external_id": "crm-1", "phone": "12"},
        {"password": "password1"},
        {"password": "ADA@registered.example.com", "email": "ada@registered.example.com"},
        {"password": "Ada Lovelace", "name": "ada lovelace"},
        {"password": "short"},
        {"password": None},
        {"password": 12345678},
        {"name": ""},
        {"name": "x" * 201},
        {"name": "a\u0007b", "phone": "+12"},
        {"locale": "pl_PL"},
        {"locale": "12"},
        {"email": "nonsense"},
        {"email": "ada@nowhere"},
        {"email": "ada@somewhere.test"},
        {"email": "a..b@example.com"},
        {"email": "ada@-x.com"},
        {"unknown": 1, "email": None},
        {"preferences": {"quiet_hours_start": "22:00"}},
        {"preferences": {"quiet_hours_start": "25:00", "what": 1}},
        {"preferences": {"timezone": "Nowhere"}, "password": "short", "phone": "12"},
        {"preferences": None},
    ):
        await ask("POST", USERS, json=everything | fields)
    for body in (b"{}", b"[]", b'"x"', b"{", b"", b"\xff", b"[" * 5000, b"null"):
        await ask("POST", USERS, content=body, headers=JSON)


async def profiles(ask: Ask) -> None:
    """How a profile changes, how it is found, and how it goes."""
    first = await _someone(ask, "first@profiles.example.com", external_id="profile-1")
    second = await _someone(ask, "second@profiles.example.com", phone="+48225554433")
    third = await _someone(ask, "third@profiles.example.com", phone="+48225554433")
    path = f"{USERS}/{first}"
    for method, change in (
        ("PATCH", {"name": "Ada L"}),
        ("PUT", {"phone": "+48221112233", "locale": "PL-pl"}),
        ("PATCH", {"name": "Ada L"}),
        ("PUT", {}),
        ("PATCH", {"email": "First@profiles.example.com"}),
        ("PATCH", {"email": "SECOND@profiles.example.com"}),
        ("PATCH", {"email": "anew@profiles.example.com", "external_id": "profile-2"}),
        ("PATCH", {"phone": None, "locale": None, "external_id": None}),
        ("PATCH", {"name": None}),
        ("PATCH", {"name": "", "email": "x@localhost", "nonsense": 1}),
        ("PATCH", {"phone": "+1"}),
        ("PATCH", {"password": "x"}),
    ):
        await ask(method, path, json=change)
        await ask("GET", path)
    for subject in (
        {"email": "ANEW@profiles.example.com"},
        {"email": "first@profiles.example.com"},
        {"phone": "+48225554433"},
        {"phone": "+48229999999"},
        {"external_id": "profile-1"},
        {"external_id": "profile-9"},
        {"email": "not-an-email"},
        {"email": "x@invalid"},
        {"phone": "+4822"},
        {},
        {"email": "a@example.com", "phone": "+48229999999"},
        {"name": "Ada"},
    ):
        await ask("POST", f"{USERS}/lookup", json=subject)
    for ids in ([], [third, NOBODY, first, third.upper()], ["x", 1], ["x"] * 1001, "x"):
        await ask("POST", f"{USERS}/batch/", json={"ids": ids})
    cursor = _cursor_of(f"users:{first}")
    page = await ask("GET", USERS, params={"limit": "1", "cursor": cursor})
    await ask("GET", USERS, params={"limit": "1", "cursor": page.json()["data"]["next_cursor"]})
    await ask("GET", USERS, params={"limit": "2", "cursor": cursor})
    for cursor in ("", "zzz", "é", _cursor_of("users:x"), _cursor_of(f"history:{first}")):
        await ask("GET", USERS, params={"cursor": cursor})
    for user in (second, NOBODY, "not-an-id", second.upper()):
        await ask("DELETE", f"{USERS}/{user}")
        await ask("GET", f"{USERS}/{user}")
        await ask("PATCH", f"{USERS}/{user}", json={"name": "x"})
        await ask("PATCH", f"{USERS}/{user}", json={"name": ""})
    await ask("POST", f"{USERS}/lookup", json={"phone": "+48225554433"})
    await ask("POST", f"{USERS}/batch", json={"ids": [second, third]})
    await _someone(ask, "second@profiles.example.com")


async def preferences(ask: Ask) -> None:
    """How preferences merge, and what their history keeps."""
    path = f"{USERS}/{await _someone(ask, 'ada@preferences.example.com')}/preferences"
    for method, change in (
        ("PUT", {"push": False}),
        ("PATCH", {"push": False}),
        ("PUT", {}),
        ("PUT", {"quiet_hours_start": "22:00", "quiet_hours_end": "07:00"}),
        ("PATCH", {"quiet_hours_end": "22:00"}),
        ("PATCH", {"quiet_hours_start": None}),
        ("PATCH", {"quiet_hours_start": "7:00"}),
        ("PATCH", {"quiet_hours_start": None, "quiet_hours_end": None}),
        ("PATCH", {"timezone": "Europe/Warsaw"}),
        ("PATCH", {"timezone": "Mars/Olympus", "quiet_hours_start": "01:00"}),
        ("PATCH", {"timezone": None}),
        ("PATCH", {"muted_until": "2030-05-05T12:00:00+02:00"}),
        ("PATCH", {"muted_until": "2030-05-05T12:00:00"}),
        ("PATCH", {"muted_until": "0001-01-01T00:00:00Z"}),
        ("PATCH", {"muted_until": None}),
        ("PATCH", {"categories": {"a": {"email": False}, "b": {"push": False, "email": True}}}),
        ("PATCH", {"categories": {"a": {"push": True}, "b": {"push": None}}}),
        ("PATCH", {"categories": {"b": None}}),
        ("PATCH", {"categories": {"Not ok": {}}}),
        ("PATCH", {"categories": {f"c{number}": {"email": True} for number in range(101)}}),
        ("PATCH", {"categories": None}),
        ("PATCH", {"email": None, "push": "yes", "what": 1}),
        ("PATCH", {"consent": {"source": "page", "policy_version": "2026-05"}}),
        ("PATCH", {"email": False, "consent": {"source": "page"}}),
        ("PATCH", {"consent": {}}),
    ):
        await ask(method, path, json=change)
    await ask("GET", path)
    history = f"{path}/history"
    await ask("GET", history)
    page = await ask("GET", history, params={"limit": "3"})
    await ask("GET", history, params={"limit": "3", "cursor": page.json()["data"]["next_cursor"]})
    await ask("GET", history, params={"cursor": "zz"})
    await ask("GET", history, params={"limit": "0"})
    for user in (NOBODY, "x"):
        await ask("GET", f"{USERS}/{user}/preferences")
        await ask("GET", f"{USERS}/{user}/preferences/history")
        await ask("PUT", f"{USERS}/{user}/preferences", json={"push": True})


async def devices(ask: Ask) -> None:
    """How tokens come, move and go."""
    ada = f"{USERS}/{await _someone(ask, 'ada@devices.example.com')}"
    bob = f"{USERS}/{await _someone(ask, 'bob@devices.example.com')}"
    token = {"token": "t-1", "platform": "ios"}
    for path, fields in (
        (ada, {}),
        (ada, {}),
        (ada, {"app": "mail"}),
        (ada, {"active": False}),
        (ada, {"active": False}),
        (ada, {}),
        (ada, {"token": "t-2", "active": False}),
        (bob, {}),
        (bob, {"token": "t-3", "platform": "web"}),
        (bob, {"token": '{"endpoint":"https://push.example.com/1","keys":{"a":"1"}}'}),
        (bob, {"token": '{"keys":{"a":"2"},"endpoint":"https://push.example.com/1"}'}),
        (ada, {"token": "", "platform": "phone", "x": 1}),
        (ada, {"token": "t" * 4097}),
        (f"{USERS}/{NOBODY}", {}),
        (f"{USERS}/x", {}),
    ):
        await ask("POST", f"{path}/devices", json=token | fields)
        await ask("GET", ada)
        await ask("GET", bob)
    kept = (await ask("GET", f"{bob}/devices")).json()["data"]
    one = f"{bob}/devices/{kept[-1]['id']}"
    for active in (True, False, False, True, None):
        await ask("PATCH", one, json={"active": active})
        await ask("GET", f"{bob}/devices")
    for path in (one, one, f"{bob}/devices/x", f"{ada}/devices/{kept[0]['id']}"):
        await ask("DELETE", path)
        await ask("PATCH", path, json={"active": True})
    await ask("DELETE", f"{USERS}/{NOBODY}/devices/{NOBODY}")
    for number in range(22):
        await ask("POST", f"{ada}/devices", json=token | {"token": f"many-{number}"})
    await ask("POST", f"{ada}/devices", json=token | {"token": "many-0"})
    await ask("GET", f"{ada}/devices")
    await ask("GET", f"{USERS}/{NOBODY}/devices")


async def deliveries(ask: Ask) -> None:
    """What senders are answered, and what they must not ask."""
    said = {
        "quiet_hours_start": "22:00",
        "quiet_hours_end": "02:30",
        "timezone": "Europe/Warsaw",
        "categories": {"news": {"email": False}},
    }
    ada = await _someone(ask, "ada@deliveries.example.com", preferences=said)
    bob = await _someone(ask, "bob@deliveries.example.com", preferences={"push": False})
    for token in ({"token": "d-1", "platform": "ios", "app": "shop"}, {"token": "d-2"}):
        await ask("POST", f"{USERS}/{ada}/devices", json={"platform": "web"} | token)
    everybody = {"user_ids": [ada, NOBODY, bob, ada.upper()], "at": "2030-03-30T22:30:00Z"}
    fields: dict[str, Any]
    for channel in ("email", "push"):
        for fields in (
            {},
            {"explain": True},
            {"category": "news", "explain": True},
            {"category": "news", "priority": "critical", "explain": True},
            {"priority": "urgent", "app": "shop", "explain": True},
            {"app": "bank", "explain": True},
            {"at": "2030-03-30T12:00:00+05:30", "category": "sport", "app": " shop "},
            {"priority": "loud", "category": "Not a name", "app": "", "at": "x", "explain": 1},
            {"user_ids": []},
            {"user_ids": None},
            {"user_ids": ["x"] * 3},
            {"user_ids": [NOBODY] * 1001},
            {"more": 1},
        ):
            await ask("POST", RESOLVE, json={"channel": channel} | everybody | fields)
    for body in (b"{}", b"[]", b"{", b"", b'{"channel":"sms"}'):
        await ask("POST", f"{RESOLVE}/", content=body, headers=JSON)
    for method, path in (("GET", RESOLVE), ("POST", "/api/v1/deliveries"), ("PUT", FEEDBACK)):
        await ask(method, path)


async def catalogued(ask: Ask) -> None:
    """What a catalogue has to say."""
    said = {"categories": {"news": {"email": True}, "security": {"push": False}}}
    ada = await _someone(ask, "ada@catalogued.example.com", preferences=said)
    for change in (
        {"sport": {"push": True}},
        {"security": {"email": False}},
        {"security": {"email": True}, "news": {"email": None}},
        {"news": None},
        None,
    ):
        await ask("PATCH", f"{USERS}/{ada}/preferences", json={"categories": change})
        await ask("GET", f"{USERS}/{ada}")
        eve = {"name": "Eve", "email": "eve@catalogued.example.com", "password": PASSWORD}
        await ask("POST", USERS, json=eve | {"preferences": {"categories": change}, "phone": "1"})
    for fields in (
        {},
        {"category": "sport"},
        {"category": "Not a name"},
        {"category": "news"},
        {"category": "news", "priority": "critical"},
        {"category": "security", "priority": "critical"},
        {"priority": "critical"},
    ):
        asked = {"channel": "email", "user_ids": [ada, NOBODY], "explain": True}
        await ask("POST", RESOLVE, json=asked | fields | {"at": "2030-01-01T00:00:00Z"})


async def feedback(ask: Ask) -> None:
    """What reports do, and how an address is restored."""
    address = "ada@feedback.example.com"
    ada = f"{USERS}/{await _someone(ask, address)}"
    for token in ("f-1", "f-2", "f-3"):
        await ask("POST", f"{ada}/devices", json={"token": token, "platform": "ios"})
    late, early = "2030-01-01T00:00:00Z", "2020-01-01T00:00:00Z"
    push: dict[str, Any] = {"channel": "push", "token": "f-1", "reason": "unregistered", "at": late}
    mail: dict[str, Any] = {"channel": "email", "address": address, "at": late}
    bounce, complaint = mail | {"reason": "hard_bounce"}, mail | {"reason": "complaint"}
    for items in (
        [],
        [push | {"at": early}, push | {"reason": "rejected"}, push | {"token": "f-unknown"}],
        [push, push, push | {"token": "f-2", "reason": "expired"}],
        [push],
        [mail | {"reason": "soft_bounce"}, bounce | {"address": "nobody@feedback.example.com"}],
        [complaint, bounce, push | {"token": "f-3"}],
        [complaint, bounce],
        [complaint | {"address": "unknown@feedback.example.com"}],
        [push | {"reason": "nonsense", "at": "x", "token": ""}, {"channel": "fax"}, {}, 1],
        [bounce | {"address": "nonsense"}, bounce | {"address": "x@-"}, push | {"more": 1}],
        [bounce | {"address": "a@b..c"}],
        [push] * 1001,
    ):
        await ask("POST", FEEDBACK, json={"items": items})
        await ask("GET", ada)
        await ask("GET", f"{ada}/devices")
    await ask("GET", f"{ada}/preferences/history")
    await ask("PATCH", ada, json={"email": "anew@feedback.example.com"})
    await ask("PATCH", ada, json={"email": "ADA@feedback.example.com"})
    await ask("PATCH", f"{ada}/preferences", json={"email": True})
    await ask("POST", FEEDBACK, json={"items": [complaint | {"at": early}]})
    never = {"If-Match": '"x"'}
    for path, headers in (
        (f"{ada}/suppression", never),
        (f"{ada}/suppression", {"Idempotency-Key": "lift"}),
        (f"{ada}/suppression", {"Idempotency-Key": "lift"}),
        (f"{ada}/suppression/", {}),
        (f"{USERS}/{NOBODY}/suppression", {}),
        (f"{USERS}/x/suppression", never),
    ):
        await ask("DELETE", path, headers=headers)
        await ask("GET", ada)
    await ask("POST", FEEDBACK, json={"items": [bounce | {"at": early}]})
    await ask("GET", f"{ada}/suppression")
    await ask("DELETE", f"{USERS}/{await _someone(ask, 'nobody@feedback.example.com')}/suppression")
    for key in ("once", "once"):
        items = [bounce | {"address": "NOBODY@feedback.example.com"}]
        await ask("POST", FEEDBACK, json={"items": items}, headers={"Idempotency-Key": key})
    for body in (b"{}", b"[]", b"{", b"", b'{"items":{}}'):
        await ask("POST", FEEDBACK, content=body, headers=JSON)
    large = json.dumps({"items": [push] * 5000}).encode()
    await ask("POST", FEEDBACK, content=large * 3, headers=JSON)
    await ask("POST", FEEDBACK, content=large * 30, headers=JSON)


async def passwords(ask: Ask) -> None:
    """How a password is set."""
    path = f"{USERS}/{await _someone(ask, 'ada@passwords.example.com')}/password"
    for body in (
        {"password": "Another-Pass-1", "current_password": PASSWORD},
        {"password": "Another-Pass-2", "current_password": PASSWORD},
        {"password": "Another-Pass-3"},
        {"password": "password1", "current_password": "wrong"},
        {"password": "ada@passwords.example.com"},
        {"password": "short"},
        {},
    ):
        await ask("PUT", path, json=body)
    for email, password in (
        ("Ada@passwords.example.com", "Another-Pass-3"),
        ("ada@passwords.example.com", PASSWORD),
        ("ada@passwords.example.com", ""),
        ("nobody@passwords.example.com", PASSWORD),
        ("a@b", PASSWORD),
        ("no email", PASSWORD),
        ("ada@passwords.example.com", "x" * 1025),
        ("ada@passwords.example.com", None),
    ):
        await ask("POST", VERIFY, json={"email": email, "password": password})
    await ask("PUT", f"{USERS}/{NOBODY}/password", json={"password": "Another-Pass-1"})
    await ask("GET", path.removesuffix("/password"))


async def conditions(ask: Ask) -> None:
    """What `If-Match`, `If-None-Match`, `X-Min-Version` and `Idempotency-Key` do."""
    user = f"{USERS}/{await _someone(ask, 'ada@conditions.example.com')}"
    tag = (await ask("GET", user)).headers["etag"]
    epoch, shape, _ = tag.strip('"').split(".")
    for path in (user, f"{user}/preferences"):
        for held in (tag, f"W/{tag}", "*", f'"x", {tag}', '"nonsense"', f'"{epoch}.0.1"', ""):
            await ask("GET", path, headers={"If-None-Match": held})
        for least in ("0", "1", "99", "x", "-1", ""):
            await ask("GET", path, headers={"X-Min-Version": least})
    for number, match in enumerate(
        ("*", tag, '"x"', f'"{epoch}.0.2"', f'W/"{epoch}.{shape}.2"', f'"00000000.{shape}.3"', "")
    ):
        condition = {"If-Match": match}
        await ask("PATCH", user, json={"name": f"Ada {number}"}, headers=condition)
    never = {"If-Match": f'"{epoch}.0.99"'}
    await ask("PATCH", f"{user}/preferences", json={"push": False}, headers=never)
    device = {"token": "condition", "platform": "ios"}
    kept = (await ask("POST", f"{user}/devices", json=device)).json()["data"]["id"]
    await ask("POST", f"{user}/devices", json=device, headers=never)
    await ask("PATCH", f"{user}/devices/{kept}", json={"active": False}, headers=never)
    await ask("DELETE", f"{user}/devices/{kept}", headers=never)
    await ask("DELETE", f"{user}/devices/{NOBODY}", headers=never)
    await ask("PUT", f"{user}/password", json={"password": "Another-Pass-1"}, headers=never)
    await ask("DELETE", user, headers=never)
    await ask("DELETE", f"{USERS}/{NOBODY}", headers=never)

    for key in ("k", "k", " ", "", "x" * 256, "ключ".encode()):
        repeated = {"Idempotency-Key": key}
        await ask("PATCH", user, json={"name": "Repeated"}, headers=repeated)
    repeated = {"Idempotency-Key": "k"}
    await ask("PATCH", f"{user}/", json={"name": "Repeated"}, headers=repeated)
    await ask("PATCH", user, json={"name": "Other"}, headers=repeated)
    await ask("PUT", user, json={"name": "Repeated"}, headers=repeated)
    await ask("PATCH", user, json={"name": "Repeated"}, headers=repeated | {"If-Match": "*"})
    await ask("PATCH", user, json={"name": ""}, headers=repeated)
    newcomer = {"name": "New", "email": "new@conditions.example.com", "password": PASSWORD}
    for _ in range(2):
        await ask("POST", USERS, json=newcomer, headers={"Idempotency-Key": "new"})
        await ask("POST", f"{user}/devices", json=device, headers={"Idempotency-Key": "device"})
        # Refused at first, so not kept: the next time it is another's turn.
        await ask("PATCH", user, json={"name": "N"}, headers=never | {"Idempotency-Key": "late"})
        await ask("DELETE", user, headers={"Idempotency-Key": "gone"})
        await ask("PATCH", user, json={"name": "Repeated"}, headers=repeated)


async def surroundings(ask: Ask) -> None:
    """Routes, methods, bodies and errors, whatever they are about."""
    user = f"{USERS}/{await _someone(ask, 'ada@surroundings.example.com')}"
    for path in (
        "/",
        "/nope",
        "/api/v1",
        f"{user}/nothing",
        f"{user}/preferences/x",
        f"{USERS}/a/b/c/d",
    ):
        await ask("GET", path)
    for method, path in (
        ("GET", f"{USERS}/lookup"),
        ("PATCH", f"{USERS}/batch"),
        ("DELETE", USERS),
        ("POST", user),
        ("GET", f"{user}/password"),
        ("POST", f"{user}/preferences"),
        ("PUT", f"{user}/preferences/history"),
        ("PUT", f"{user}/devices"),
        ("GET", f"{user}/devices/{NOBODY}"),
        ("POST", "/api/v1/changes"),
        ("POST", "/api/v1/changes/stream"),
        ("POST", "/health"),
        ("BREW", USERS),
        ("HEAD", user),
        ("HEAD", f"{USERS}/x"),
        ("HEAD", f"{USERS}/batch"),
        ("GET", f"{user}/"),
        ("GET", f"/api/v1//users//{user.rpartition('/')[2]}//"),
        ("GET", f"{USERS}/%20"),
        ("GET", f"{USERS}/a%2Fb"),
        ("GET", "/health/ready/"),
        ("GET", "/health/live"),
        ("GET", "/health"),
    ):
        await ask(method, path)
    for limit in ("0", "-1", "201", "abc", "", "1.5", "+5", "1_0", " 5"):
        await ask("GET", USERS, params={"limit": limit, "cursor": "zz"})
        await ask("GET", f"{USERS}/x/preferences/history", params={"limit": limit, "cursor": "zz"})
    for query in (
        {"limit": "1001"},
        {"after": ""},
        {"after": "x"},
        {"after": "a.1"},
        {"after": "é.1"},
    ):
        await ask("GET", "/api/v1/changes", params=query)
    await ask("GET", "/api/v1/changes/stream", headers={"Last-Event-ID": "nonsense"})
    for kind in (None, "text/plain", "application/json; charset=utf-8", "APPLICATION/JSON"):
        for body in (b"", b"{}", b"{", b'"' + b"x" * 65536 + b'"'):
            headers = {} if kind is None else {"Content-Type": kind}
            await ask("PATCH", user, content=body, headers=headers)
    large = json.dumps({"ids": [NOBODY] * 2000}).encode()
    await ask("POST", f"{USERS}/batch", content=large, headers=JSON)
    await ask("POST", f"{USERS}/batch", content=large * 14, headers=JSON)
    for accept in (
        "application/problem+json",
        "application/problem+json, application/json",
        "application/problem+json;q=0.5, application/json",
        "text/html, application/problem+json;q=0.9",
        "application/*",
        "*/*",
        "text/html",
        "application/problem+json;q=x",
    ):
        await ask("GET", f"{USERS}/x", headers={"Accept": accept})
        await ask("PATCH", user, json={"name": ""}, headers={"Accept": accept})


CATALOGUE = '{"security":{"email":"required","push":"on"},"news":{"email":"off","push":"on"}}'
SCRIPTS = [
    *(registrations, profiles, preferences, devices, deliveries, feedback, passwords),
    *(conditions, surroundings),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.__name__ for script in SCRIPTS])
async def test_same_answers(
    script: Callable[[Ask], Awaitable[None]], http: httpx.AsyncClient
) -> None:
    await assert_same_answers(script, http, FakeUserService())


async def test_same_answers_with_a_catalogue(database_url: str, redis_url: str) -> None:
    app = create_app(settings_for(database_url, redis_url, CATEGORIES=CATALOGUE))
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # Litestar's ASGI types are narrower
    async with (
        app.lifespan(),
        httpx.AsyncClient(transport=transport, base_url="http://test") as http,
    ):
        await assert_same_answers(catalogued, http, FakeUserService(categories=CATALOGUE))


async def assert_same_answers(
    script: Callable[[Ask], Awaitable[None]], http: httpx.AsyncClient, fake: FakeUserService
) -> None:
    """Play a script to both, and compare what they answer."""
    by_server = Transcript(http)
    await script(by_server.ask)
    async with httpx.AsyncClient(transport=fake, base_url="http://test") as answered:
        by_fake = Transcript(answered)
        await script(by_fake.ask)
    different = [
        f"server {said}\n  fake {faked}"
        for said, faked in zip(by_server.lines, by_fake.lines, strict=True)
        if said != faked
    ]
    assert not different, "\n".join(different)
