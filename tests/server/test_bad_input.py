"""Bad input: each wrong field, body, header, id and route, and the one answer it has to get.

What is right is decided by the contract (api.md, sections 2 to 5), not by the server.
"""

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from ..private import leaves

STATUS = {
    "malformed_json": 400,
    "invalid_cursor": 400,
    "invalid_credentials": 401,
    "user_not_found": 404,
    "device_not_found": 404,
    "route_not_found": 404,
    "method_not_allowed": 405,
    "version_mismatch": 412,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "validation_failed": 422,
}
KIB = 1024
NOBODY = "01a205c7-a743-7a16-a135-c839ba84936e"
JSON = {"Content-Type": "application/json"}
PROBLEM = {"Accept": "application/problem+json"}

USERS = "/api/v1/users/"
USER = "/api/v1/users/{user}"
LOOKUP = "/api/v1/users/lookup"
BATCH = "/api/v1/users/batch"
PREFERENCES = "/api/v1/users/{user}/preferences"
HISTORY = "/api/v1/users/{user}/preferences/history"
DEVICES = "/api/v1/users/{user}/devices"
DEVICE = "/api/v1/users/{user}/devices/{device}"
SUPPRESSION = "/api/v1/users/{user}/suppression"
FEEDBACK = "/api/v1/feedback"
PASSWORD = "/api/v1/users/{user}/password"

JANE = {"name": "Jane Roe", "email": "jane@example.com", "password": "Strong-Pass-123!"}
PHONE = {"token": "fcm_token_of_jane", "platform": "android"}


@dataclass(frozen=True)
class Bad:
    """A request, and the code and the names of the fields that its answer has to have."""

    method: str
    path: str
    what: str
    code: str
    fields: frozenset[str] = frozenset()
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    chunked: bool = False

    def __str__(self) -> str:
        return f"{self.method} {self.path}: {self.what}"

    def values(self) -> Iterator[str]:
        """Yield what the caller sent as values, as far as it would be recognised again."""
        try:
            yield from leaves(json.loads(self.body or b"null"), 6)
        except (ValueError, RecursionError):
            return


def invalid(
    method: str, path: str, base: Mapping[str, Any], *rows: tuple[str, dict[str, Any], set[str]]
) -> Iterator[Bad]:
    """Each row: what is wrong, the fields that make it so (`...`: left out), and what is named."""
    for what, wrong, fields in rows:
        sent = {name: value for name, value in {**base, **wrong}.items() if value is not ...}
        yield Bad(
            method,
            path,
            what,
            "validation_failed",
            frozenset(fields),
            json.dumps(sent).encode(),
            JSON,
        )


def registrations() -> Iterable[Bad]:
    one = {**JANE, "email": "other@example.com"}
    yield from invalid(
        "POST",
        USERS,
        one,
        ("name left out", {"name": ...}, {"name"}),
        ("name null", {"name": None}, {"name"}),
        ("name empty", {"name": ""}, {"name"}),
        ("name of blanks", {"name": " \t\n "}, {"name"}),
        ("name too long", {"name": "Ferdinand" * 23}, {"name"}),
        ("name a number", {"name": 4711123}, {"name"}),
        ("name a list", {"name": ["Ferdinand"]}, {"name"}),
        ("name with NUL", {"name": "Ferdi\x00nand"}, {"name"}),
        ("name with a line break", {"name": "Ferdi\nnand"}, {"name"}),
        ("name with a C1 control", {"name": "Ferdi\x9bnand"}, {"name"}),
        ("email left out", {"email": ...}, {"email"}),
        ("email null", {"email": None}, {"email"}),
        ("email empty", {"email": ""}, {"email"}),
        ("email without at", {"email": "ferdinand.example.com"}, {"email"}),
        ("email with two ats", {"email": "ferdi@nand@example.com"}, {"email"}),
        ("email without local part", {"email": "@example.com"}, {"email"}),
        ("email with a blank", {"email": "ferdi nand@example.com"}, {"email"}),
        ("email with an empty label", {"email": "ferdinand@example..com"}, {"email"}),
        ("email with a dot in front", {"email": ".ferdinand@example.com"}, {"email"}),
        ("email at a host without a dot", {"email": "ferdinand@localhost"}, {"email"}),
        ("email with NUL", {"email": "ferdi\x00nand@example.com"}, {"email"}),
        ("email too long", {"email": "f" * 61 + "@" + "ferdinand." * 19 + "com"}, {"email"}),
        ("email a number", {"email": 4711123}, {"email"}),
        ("password left out", {"password": ...}, {"password"}),
        ("password null", {"password": None}, {"password"}),
        ("password too short", {"password": "aX3$bbb"}, {"password"}),
        ("password too long", {"password": "aX3$bbbb" * 16 + "c"}, {"password"}),
        ("password common", {"password": "Password1"}, {"password"}),
        ("password is the email", {"password": "Other@example.com"}, {"password"}),
        ("password is the name", {"password": "jane roe"}, {"password"}),
        ("password a number", {"password": 1234567890}, {"password"}),
        ("phone without plus", {"phone": "48229876543"}, {"phone"}),
        ("phone empty", {"phone": ""}, {"phone"}),
        ("phone with letters", {"phone": "+4822ABCDEFG"}, {"phone"}),
        ("phone too long", {"phone": "+4822123456789012"}, {"phone"}),
        ("phone that is not possible", {"phone": "+4812"}, {"phone"}),
        ("phone a number", {"phone": 48229876543}, {"phone"}),
        ("external_id empty", {"external_id": ""}, {"external_id"}),
        ("external_id too long", {"external_id": "crm-4711" * 17}, {"external_id"}),
        ("external_id a number", {"external_id": 4711123}, {"external_id"}),
        ("external_id with NUL", {"external_id": "crm\x00-4711"}, {"external_id"}),
        ("locale with an underscore", {"locale": "pl_PL_x"}, {"locale"}),
        ("locale unknown", {"locale": "zzzzzz-qqqqqq"}, {"locale"}),
        ("locale too long", {"locale": "en-" + "-".join(["abcdefgh"] * 4)}, {"locale"}),
        ("locale an object", {"locale": {"tag": "pl-PL-x"}}, {"locale"}),
        ("preferences null", {"preferences": None}, {"preferences"}),
        ("preferences a list", {"preferences": []}, {"preferences"}),
        ("preferences.email text", {"preferences": {"email": "certainly"}}, {"preferences.email"}),
        (
            "one end of the quiet hours",
            {"preferences": {"quiet_hours_start": "22:00"}},
            {"preferences.quiet_hours_end"},
        ),
        ("preferences unknown field", {"preferences": {"sms": True}}, {"preferences.sms"}),
        ("unknown field", {"is_admin": True}, {"is_admin"}),
        ("unknown field that cannot be shown", {"<script>": True}, {"?"}),
        ("id chosen by the caller", {"id": NOBODY}, {"id"}),
        (
            "every field of a wrong type",
            {
                "name": 1,
                "email": 1,
                "password": 1,
                "phone": 1,
                "external_id": 1,
                "locale": 1,
                "preferences": {"push": 1, "timezone": 1, "categories": {"news": {"email": 1}}},
            },
            {
                "name",
                "email",
                "password",
                "phone",
                "external_id",
                "locale",
                "preferences.push",
                "preferences.timezone",
                "preferences.categories.news.email",
            },
        ),
        (
            "every field breaks a rule",
            {
                "email": "ferdinand@example..com",
                "password": "Password1",
                "phone": "+4812",
                "locale": "zzzzzz-qqqqqq",
                "preferences": {"quiet_hours_end": "07:00", "timezone": "Mars/Olympus_Mons"},
            },
            {
                "email",
                "password",
                "phone",
                "locale",
                "preferences.quiet_hours_start",
                "preferences.timezone",
            },
        ),
        (
            "types and rules at once",
            {
                "name": "",
                "email": "ferdinand@example..com",
                "password": "Password1",
                "preferences": {"push": "certainly", "quiet_hours_end": "07:00"},
            },
            {"name", "email", "password", "preferences.push", "preferences.quiet_hours_start"},
        ),
        (
            "control characters and types at once",
            {"name": "Ferdi\x00nand", "phone": 4711123, "is_admin": True},
            {"name", "phone", "is_admin"},
        ),
    )


def updates() -> Iterable[Bad]:
    yield from invalid(
        "PATCH",
        USER,
        {},
        ("name null", {"name": None}, {"name"}),
        ("name empty", {"name": "  "}, {"name"}),
        ("email null", {"email": None}, {"email"}),
        ("email not one", {"email": "ferdinand"}, {"email"}),
        ("phone not E.164", {"phone": "0048 22 123 45 67"}, {"phone"}),
        ("external_id too long", {"external_id": "x" * 129}, {"external_id"}),
        ("locale false", {"locale": False}, {"locale"}),
        ("password has its own route", {"password": "Another-Pass-456"}, {"password"}),
        ("preferences have their own route", {"preferences": {"email": False}}, {"preferences"}),
        ("version is not for callers", {"version": 4711123}, {"version"}),
        (
            "several",
            {"name": "", "email": "", "phone": "", "x": 1},
            {"name", "email", "phone", "x"},
        ),
    )
    yield from invalid("PUT", USER, {}, ("name too long", {"name": "x" * 201}, {"name"}))


def lookups() -> Iterable[Bad]:
    yield from invalid(
        "POST",
        LOOKUP,
        {},
        ("nothing to find", {}, {"body"}),
        ("two at once", {"email": "jane@example.com", "phone": "+48221234567"}, {"body"}),
        ("email null", {"email": None}, {"email"}),
        ("email not one", {"email": "ferdinand@example..com"}, {"email"}),
        ("phone not one", {"phone": "ferdinand"}, {"phone"}),
        ("external_id empty", {"external_id": ""}, {"external_id"}),
        ("unknown field", {"name": "Ferdinand"}, {"name"}),
    )


def batches() -> Iterable[Bad]:
    yield from invalid(
        "POST",
        BATCH,
        {},
        ("ids left out", {}, {"ids"}),
        ("ids null", {"ids": None}, {"ids"}),
        ("ids text", {"ids": NOBODY}, {"ids"}),
        ("ids too many", {"ids": [NOBODY] * 1001}, {"ids"}),
        ("an id that is none", {"ids": [NOBODY, NOBODY, NOBODY, "ferdinand"]}, {"ids[3]"}),
        ("several that are none", {"ids": [NOBODY[:-1], NOBODY, 4711123]}, {"ids[0]", "ids[2]"}),
        ("a nested list", {"ids": [[NOBODY]]}, {"ids[0]"}),
        ("an id with a line break", {"ids": [NOBODY + "\n" + NOBODY]}, {"ids[0]"}),
        ("too many, and one that is none", {"ids": ["x", *[NOBODY] * 1000]}, {"ids"}),
        ("unknown field", {"ids": [], "fields": "name"}, {"fields"}),
    )


def preferences() -> Iterable[Bad]:
    yield from invalid(
        "PATCH",
        PREFERENCES,
        {},
        ("email text", {"email": "true"}, {"email"}),
        ("email null", {"email": None}, {"email"}),
        ("push a number", {"push": 1}, {"push"}),
        ("quiet hours at 24", {"quiet_hours_start": "24:00"}, {"quiet_hours_start"}),
        ("quiet hours without zero", {"quiet_hours_start": "7:00"}, {"quiet_hours_start"}),
        ("quiet hours with seconds", {"quiet_hours_end": "07:00:00"}, {"quiet_hours_end"}),
        ("quiet hours in other digits", {"quiet_hours_end": "٠٧:٠٠"}, {"quiet_hours_end"}),  # noqa: RUF001
        ("quiet hours a number", {"quiet_hours_end": 7}, {"quiet_hours_end"}),
        ("quiet hours without end", {"quiet_hours_start": "22:00"}, {"quiet_hours_end"}),
        ("quiet hours without start", {"quiet_hours_end": "07:00"}, {"quiet_hours_start"}),
        (
            "quiet hours of no length",
            {"quiet_hours_start": "07:00", "quiet_hours_end": "07:00"},
            {"quiet_hours_end"},
        ),
        ("zone unknown", {"timezone": "Mars/Olympus_Mons"}, {"timezone"}),
        ("zone a path", {"timezone": "../../etc/passwd"}, {"timezone"}),
        ("zone an offset", {"timezone": "+02:00x"}, {"timezone"}),
        ("zone empty", {"timezone": ""}, {"timezone"}),
        ("zone too long", {"timezone": "Europe/" + "x" * 58}, {"timezone"}),
        ("mute without offset", {"muted_until": "2030-01-01T00:00:00"}, {"muted_until"}),
        ("mute of a day that is none", {"muted_until": "2030-02-30T00:00:00Z"}, {"muted_until"}),
        ("mute in words", {"muted_until": "tomorrow"}, {"muted_until"}),
        ("mute a number", {"muted_until": 1893456000}, {"muted_until"}),
        (
            "mute before the first year",
            {"muted_until": "0001-01-01T00:00:00+14:00"},
            {"muted_until"},
        ),
        ("mute after the last year", {"muted_until": "9999-12-31T23:59:59-14:00"}, {"muted_until"}),
        (
            "mute before the first year, and more",
            {
                "muted_until": "0001-01-01T00:00:00Z",
                "timezone": "Mars/Olympus_Mons",
                "quiet_hours_end": "07:00",
            },
            {"muted_until", "timezone", "quiet_hours_start"},
        ),
        ("categories a list", {"categories": ["news"]}, {"categories"}),
        ("category in capitals", {"categories": {"News": {}}}, {"categories.News"}),
        ("category with a blank", {"categories": {"the news": {}}}, {"categories.?"}),
        ("category with markup", {"categories": {"<b>": {}}}, {"categories.?"}),
        ("category with NUL", {"categories": {"ne\x00ws": {}}}, {"categories.?"}),
        ("category with a line break", {"categories": {"news\n": {}}}, {"categories.?"}),
        ("category without name", {"categories": {"": {}}}, {"categories.?"}),
        ("category with a long name", {"categories": {"x" * 65: {}}}, {"categories.?"}),
        ("category a switch", {"categories": {"news": True}}, {"categories.news"}),
        ("channel unknown", {"categories": {"news": {"sms": True}}}, {"categories.news.sms"}),
        ("channel text", {"categories": {"news": {"push": "off"}}}, {"categories.news.push"}),
        (
            "too many categories",
            {"categories": {f"c{i}": {"email": False} for i in range(101)}},
            {"categories"},
        ),
        ("consent null", {"consent": None}, {"consent"}),
        ("consent without source", {"consent": {}}, {"consent.source"}),
        ("consent from nowhere", {"consent": {"source": ""}}, {"consent.source"}),
        ("consent with more", {"consent": {"source": "page", "ip": "192.0.2.1"}}, {"consent.ip"}),
        (
            "consent version too long",
            {"consent": {"source": "page", "policy_version": "x" * 129}},
            {"consent.policy_version"},
        ),
        ("effective zone is derived", {"effective_timezone": "UTC"}, {"effective_timezone"}),
        (
            "several",
            {
                "email": "certainly",
                "quiet_hours_start": "evening",
                "timezone": 4711123,
                "categories": {"news": {"push": "certainly"}, "<b>": {}},
                "consent": {},
            },
            {
                "email",
                "quiet_hours_start",
                "timezone",
                "categories.news.push",
                "categories.?",
                "consent.source",
            },
        ),
        (
            "several rules",
            {"quiet_hours_start": "22:00", "timezone": "Mars/Olympus_Mons"},
            {"quiet_hours_end", "timezone"},
        ),
    )
    yield from invalid("PUT", PREFERENCES, {}, ("unknown field", {"sms": True}, {"sms"}))


def devices() -> Iterable[Bad]:
    yield from invalid(
        "POST",
        DEVICES,
        PHONE,
        ("token left out", {"token": ...}, {"token"}),
        ("token null", {"token": None}, {"token"}),
        ("token of blanks", {"token": "   "}, {"token"}),
        ("token too long", {"token": "fcm_" * 1024 + "x"}, {"token"}),
        ("token an object", {"token": {"endpoint": "https://push.example"}}, {"token"}),
        ("token with NUL", {"token": "fcm_\x00token"}, {"token"}),
        ("platform left out", {"platform": ...}, {"platform"}),
        ("platform null", {"platform": None}, {"platform"}),
        ("platform unknown", {"platform": "windows"}, {"platform"}),
        ("platform in capitals", {"platform": "ANDROID"}, {"platform"}),
        ("app empty", {"app": ""}, {"app"}),
        ("app too long", {"app": "com.example." + "x" * 117}, {"app"}),
        ("active text", {"active": "certainly"}, {"active"}),
        ("active null", {"active": None}, {"active"}),
        ("unknown field", {"last_seen_at": "2030-01-01T00:00:00Z"}, {"last_seen_at"}),
        ("several", {"token": 1, "platform": 1, "app": 1}, {"token", "platform", "app"}),
    )
    yield from invalid(
        "PATCH",
        DEVICE,
        {},
        ("active left out", {}, {"active"}),
        ("active null", {"active": None}, {"active"}),
        ("active a number", {"active": 0}, {"active"}),
        ("token cannot be changed", {"active": True, "token": "fcm_other"}, {"token"}),
    )


def reports() -> Iterable[Bad]:
    at = "2026-05-06T07:08:09Z"
    push = {"channel": "push", "token": "fcm_token_of_nobody", "reason": "unregistered", "at": at}
    email = {
        "channel": "email",
        "address": "ferdinand@example.com",
        "reason": "hard_bounce",
        "at": at,
    }
    yield from invalid(
        "POST",
        FEEDBACK,
        {},
        ("items left out", {}, {"items"}),
        ("items null", {"items": None}, {"items"}),
        ("items an object", {"items": push}, {"items"}),
        ("items too many", {"items": [push] * 1001}, {"items"}),
        ("item null", {"items": [push, None]}, {"items[1]"}),
        ("unknown field", {"items": [], "caller": "Ferdinand"}, {"caller"}),
    )
    # Beside an item of the other channel, which is right.
    for right, sent, rows in (
        (
            email,
            push,
            (
                ("channel left out", {"channel": ...}, {"channel"}),
                ("channel unknown", {"channel": "carrier pigeon"}, {"channel"}),
                ("token left out", {"token": ...}, {"token"}),
                ("token empty", {"token": ""}, {"token"}),
                ("token too long", {"token": "fcm_" * 1024 + "x"}, {"token"}),
                ("token with NUL", {"token": "fcm_\x00token"}, {"token"}),
                ("reason left out", {"reason": ...}, {"reason"}),
                ("reason of the other channel", {"reason": "hard_bounce"}, {"reason"}),
                ("reason a provider's", {"reason": "UNREGISTERED"}, {"reason"}),
                ("time left out", {"at": ...}, {"at"}),
                ("time without offset", {"at": "2026-05-06T07:08:09"}, {"at"}),
                ("time a number", {"at": 1767323045}, {"at"}),
                ("address of a token", {"address": "ferdinand@example.com"}, {"address"}),
                ("several", {"token": 1, "reason": 1, "at": 1}, {"token", "reason", "at"}),
            ),
        ),
        (
            push,
            email,
            (
                ("address left out", {"address": ...}, {"address"}),
                ("address without at", {"address": "ferdinand.example.com"}, {"address"}),
                ("address with two ats", {"address": "ferdi@nand@example.com"}, {"address"}),
                ("address too long", {"address": "f" * 250 + "@example.com"}, {"address"}),
                ("address with NUL", {"address": "ferdi\x00nand@example.com"}, {"address"}),
                ("address no domain", {"address": "ferdinand@example..com"}, {"address"}),
                ("mail reason unknown", {"reason": "unregistered"}, {"reason"}),
            ),
        ),
    ):
        for what, wrong, fields in rows:
            merged: dict[str, Any] = {**sent, **wrong}
            item = {name: value for name, value in merged.items() if value is not ...}
            named = {f"items[1].{name}" for name in fields}
            yield from invalid("POST", FEEDBACK, {}, (what, {"items": [right, item]}, named))


def passwords() -> Iterable[Bad]:
    good = "Another-Pass-456"
    yield from invalid(
        "PUT",
        PASSWORD,
        {"password": good},
        ("left out", {"password": ...}, {"password"}),
        ("null", {"password": None}, {"password"}),
        ("too short", {"password": "aX3$bbb"}, {"password"}),
        ("too long", {"password": "aX3$bbbb" * 16 + "c"}, {"password"}),
        ("common", {"password": "password123"}, {"password"}),
        ("is the email", {"password": "JANE@example.com"}, {"password"}),
        ("is the name", {"password": "Jane Roe"}, {"password"}),
        ("current one a number", {"current_password": 1234567}, {"current_password"}),
        ("current one too long", {"current_password": "x" * 1025}, {"current_password"}),
        ("unknown field", {"hash": "$argon2id$v=19$m=8"}, {"hash"}),
        ("several", {"password": 1, "current_password": 1}, {"password", "current_password"}),
    )
    wrong = json.dumps({"password": good, "current_password": "Wrong-Pass-789"}).encode()
    yield Bad("PUT", PASSWORD, "current one wrong", "invalid_credentials", body=wrong, headers=JSON)


WRITES = (
    ("POST", USERS),
    ("PATCH", USER),
    ("PUT", USER),
    ("POST", LOOKUP),
    ("POST", BATCH),
    ("PUT", PREFERENCES),
    ("PATCH", PREFERENCES),
    ("POST", DEVICES),
    ("PATCH", DEVICE),
    ("PUT", PASSWORD),
    ("POST", FEEDBACK),
)
MALFORMED = {
    "no JSON": b"name=Ferdinand",
    "cut off": b'{"name": "Ferdi',
    "two values": b"{} {}",
    "trailing comma": b'{"name": "Ferdinand",}',
    "NaN": b'{"name": NaN}',
    "a comment": b'{} // "name"',
    "invalid UTF-8": b'{"name": "Ferdi\xffnand"}',
    "a surrogate in UTF-8": b'{"name": "\xed\xa0\x80"}',
    "a lone surrogate": b'{"name": "\\ud800"}',
    "a lone surrogate in a key": b'{"\\udfff": 1}',
    "a raw control character": b'{"name": "Ferdi\x01nand"}',
    "a byte order mark": b'\xef\xbb\xbf{"name": "Ferdinand"}',
    "UTF-16": '{"name": "Ferdinand"}'.encode("utf-16"),
    "NUL behind it": b"{}\x00",
    "compressed": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    "lists 30,000 deep": b"[" * 30_000 + b"]" * 30_000,
    "objects 8,000 deep": b'{"a":' * 8_000 + b"1" + b"}" * 8_000,
    "a field 30,000 deep": b'{"name":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
}
MEDIA_TYPES = {
    "text": {"Content-Type": "text/plain"},
    "a form": {"Content-Type": "application/x-www-form-urlencoded"},
    "a multipart form": {"Content-Type": "multipart/form-data; boundary=x"},
    "MessagePack": {"Content-Type": "application/x-msgpack"},
    "almost JSON": {"Content-Type": "application/jsonp"},
    "junk as content type": {"Content-Type": ";;;"},
}


def bodies() -> Iterable[Bad]:
    for method, path in WRITES:
        yield Bad(method, path, "empty body", "malformed_json", body=b"", headers=JSON)
        for what, body in (
            ("a body of null", b"null"),
            ("a body of a list", b"[]"),
            ("a body of text", b'"Ferdinand"'),
        ):
            yield Bad(
                method, path, what, "validation_failed", frozenset({"body"}), body, headers=JSON
            )
        yield Bad(
            method, path, "a body that ends early", "malformed_json", body=b'{"a": ', headers=JSON
        )
        yield Bad(method, path, "a body of no type", "unsupported_media_type", body=b"{}")
        limit = {BATCH: 1024 * KIB, FEEDBACK: 8192 * KIB}.get(path, 64 * KIB)
        huge = b'{"a": "%b"}' % (b"x" * (limit - 8))
        assert len(huge) == limit + 1
        yield Bad(method, path, "one byte too large", "body_too_large", body=huge, headers=JSON)
        yield Bad(
            method,
            path,
            "one byte too large, in chunks",
            "body_too_large",
            body=huge,
            headers=JSON,
            chunked=True,
        )
        just = huge[:-3] + huge[-2:]
        yield Bad(
            method,
            path,
            "as large as may be",
            "validation_failed",
            frozenset({"a"} | REQUIRED.get((method, path), set())),
            just,
            JSON,
        )
    for what, body in MALFORMED.items():
        yield Bad("POST", USERS, what, "malformed_json", body=body, headers=JSON)
    for what, headers in MEDIA_TYPES.items():
        body = json.dumps(JANE).encode()
        yield Bad("POST", USERS, what, "unsupported_media_type", body=body, headers=headers)
    deep = b"[" * 100_000 + b"]" * 100_000
    yield Bad("POST", BATCH, "100,000 deep", "malformed_json", body=deep, headers=JSON)
    yield Bad("POST", USERS, "100,000 deep", "body_too_large", body=deep, headers=JSON)
    within = b'{"ids": %b}' % deep
    yield Bad("POST", BATCH, "ids 100,000 deep", "malformed_json", body=within, headers=JSON)


REQUIRED = {
    ("POST", USERS): {"name", "email", "password"},
    ("POST", BATCH): {"ids"},
    ("POST", DEVICES): {"token", "platform"},
    ("PATCH", DEVICE): {"active"},
    ("PUT", PASSWORD): {"password"},
    ("POST", FEEDBACK): {"items"},
}
OF_A_USER: tuple[tuple[str, str, bytes | None], ...] = (
    ("GET", USER, None),
    ("PATCH", USER, b"{}"),
    ("PUT", USER, b"{}"),
    ("DELETE", USER, None),
    ("GET", PREFERENCES, None),
    ("PUT", PREFERENCES, b"{}"),
    ("PATCH", PREFERENCES, b"{}"),
    ("GET", HISTORY, None),
    ("GET", DEVICES, None),
    ("POST", DEVICES, json.dumps(PHONE).encode()),
    ("PATCH", DEVICE, b'{"active": true}'),
    ("DELETE", DEVICE, None),
    ("PUT", PASSWORD, b'{"password": "Another-Pass-456"}'),
    ("DELETE", SUPPRESSION, None),
)


def ids() -> Iterable[Bad]:
    user, device = frozenset({"user_id"}), frozenset({"device_id"})
    for method, path, body in OF_A_USER:
        bad, nobodys = path.replace("{user}", "ferdinand"), path.replace("{user}", NOBODY)
        yield Bad(method, bad, "no id", "user_not_found", user, body, JSON)
        yield Bad(method, nobodys, "nobody", "user_not_found", body=body, headers=JSON)
        if path == DEVICE:
            bad, others = path.replace("{device}", "phone"), path.replace("{device}", "{others}")
            yield Bad(method, bad, "no device's id", "device_not_found", device, body, JSON)
            nobodys = path.replace("{device}", NOBODY)
            yield Bad(method, nobodys, "no device", "device_not_found", body=body, headers=JSON)
            yield Bad(method, others, "another's", "device_not_found", body=body, headers=JSON)
    for what, text in {
        "NUL": "%00",
        "an id with NUL": NOBODY + "%00",
        "an id with a line break": NOBODY + "%0A",
        "an id without hyphens": NOBODY.replace("-", ""),
        "an id in braces": "%7B" + NOBODY + "%7D",
        "an id as a URN": "urn:uuid:" + NOBODY,
        "a number": "4711",
        "SQL": "'%20OR%201=1--",
        "other digits": NOBODY.replace("0", "%D9%A0"),
        "invalid UTF-8": "%FF%FE",
        "very long": "x" * 5000,
    }.items():
        yield Bad("GET", USERS + text, what, "user_not_found", user)


def queries() -> Iterable[Bad]:
    limit = frozenset({"limit"})
    for path in (USERS, HISTORY):
        for value in ("0", "201", "-1", "abc", "1.5", "", "9" * 30, "%00", "%FF", "null"):
            yield Bad("GET", f"{path}?limit={value}", "limit", "validation_failed", limit)
        for what, cursor in {
            "no base64": "!!!",
            "junk": "ferdinand",
            "empty": "",
            "NUL": "%00",
            "invalid UTF-8": "%FF",
            "not ASCII": "%C3%A4%C3%A4",
            "of no listing": "bm9wZToxMg",  # nope:12
            "of the other": "dXNlcnM6MTI" if path == HISTORY else "aGlzdG9yeToxMg",
            "no user's place": "dXNlcnM6"
            + "LS0t" * 12,  # users:------------------------------------
            "no entry's place": "aGlzdG9yeTotMQ",  # history:-1
            "very long": "QUFB" * 2000,
        }.items():
            yield Bad("GET", f"{path}?cursor={cursor}", what, "invalid_cursor")


def conditions() -> Iterable[Bad]:
    version = frozenset({"X-Min-Version"})
    for path in (USER, PREFERENCES):
        for value in ("abc", "-1", "1.5", "", "9" * 19, "\xff", "\xd9\xa3"):
            headers = {"X-Min-Version": value}
            what = f"version {value!r}"
            yield Bad("GET", path, what, "validation_failed", version, None, headers)
    for method, path, body in OF_A_USER:
        if method != "GET":
            for tag in ("junk", '"0.0.0"', "1", '""', ""):
                headers = {**JSON, "If-Match": tag}
                what = f"If-Match {tag!r}"
                yield Bad(method, path, what, "version_mismatch", frozenset(), body, headers)


def routes() -> Iterable[Bad]:
    for path in (
        "/nope",
        "/api",
        "/api/v1",
        "/api/v2/users/",
        "/API/v1/users/",
        "/api/v1/user",
        USER + "/nope",
        PREFERENCES + "/nope",
        DEVICE + "/nope",
        "/docs/nope.js",
        "/docs/..%2Fapp.py",
        "/openapi.yaml",
        "/%00",
        "/%FF",
        "/api/v1/users/../../../etc/passwd%00",
    ):
        yield Bad("GET", path, "unknown route", "route_not_found")
    for method in ("POST", "DELETE", "BREW"):
        yield Bad(method, "/nope", "unknown route", "route_not_found")
    for path, methods in {
        USERS: ("PUT", "PATCH", "DELETE", "TRACE", "BREW"),
        USER: ("POST", "TRACE"),
        LOOKUP: ("GET", "PUT", "DELETE"),
        BATCH: ("GET", "PATCH", "DELETE"),
        PREFERENCES: ("POST", "DELETE"),
        HISTORY: ("POST", "PUT", "DELETE"),
        DEVICES: ("PUT", "PATCH", "DELETE"),
        DEVICE: ("GET", "POST", "PUT"),
        PASSWORD: ("GET", "POST", "PATCH", "DELETE"),
        "/health": ("POST",),
        "/metrics": ("DELETE",),
        "/docs": ("POST",),
        "/openapi.json": ("PUT",),
    }.items():
        for method in methods:
            yield Bad(method, path, "wrong method", "method_not_allowed", body=b"{}", headers=JSON)


TABLE = [
    bad
    for part in (
        registrations,
        updates,
        lookups,
        batches,
        preferences,
        devices,
        reports,
        passwords,
        bodies,
        ids,
        queries,
        conditions,
        routes,
    )
    for bad in part()
]


@pytest.fixture(scope="module")
async def places(http: httpx.AsyncClient) -> AsyncIterator[dict[str, str]]:
    """The ids of a user with a device, and of another user's device; unchanged in the end."""
    jane = (await http.post(USERS, json=JANE)).json()["data"]["id"]
    jim = (await http.post(USERS, json={**JANE, "email": "jim@example.com"})).json()["data"]["id"]
    device = await http.post(f"{USERS}{jane}/devices", json=PHONE)
    others = await http.post(f"{USERS}{jim}/devices", json={**PHONE, "token": "fcm_token_of_jim"})
    before = (await http.get(USERS)).json()["data"]
    yield {
        "user": jane,
        "device": device.json()["data"]["id"],
        "others": others.json()["data"]["id"],
    }
    assert (await http.get(USERS)).json()["data"] == before


async def send(
    http: httpx.AsyncClient, bad: Bad, places: Mapping[str, str], **headers: str
) -> httpx.Response:
    path = bad.path
    for name, value in places.items():
        path = path.replace("{" + name + "}", value)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(bad.body or b""), 16 * KIB):
            yield (bad.body or b"")[start : start + 16 * KIB]

    return await http.request(
        bad.method,
        path,
        content=chunks() if bad.chunked else bad.body,
        headers=httpx.Headers({**bad.headers, **headers}, encoding="latin-1"),
    )


@pytest.mark.parametrize("bad", [pytest.param(bad, id=str(bad)[:90]) for bad in TABLE])
async def test_bad_input_gets_its_one_answer(
    http: httpx.AsyncClient, places: dict[str, str], bad: Bad
) -> None:
    answer = await send(http, bad, places)

    envelope = answer.json()
    error = envelope["error"]
    assert (answer.status_code, error["code"]) == (STATUS[bad.code], bad.code), envelope
    named = [detail["field"] for detail in error["details"]]
    assert set(named) == bad.fields, envelope
    assert len(named) == len(set(named))
    assert answer.headers["content-type"] == "application/json"
    assert envelope.keys() == {"success", "data", "message", "error"}
    assert envelope["success"] is False
    assert envelope["data"] is None
    assert envelope["message"]
    assert all(detail["message"] for detail in error["details"])
    assert error.keys() == {"code", "details", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    shown = json.dumps(envelope, ensure_ascii=False)
    assert not [value for value in bad.values() if value in shown]
    if bad.code == "method_not_allowed":
        assert bad.method not in answer.headers["allow"].split(", ")
    if bad.code == "version_mismatch":
        assert answer.headers["etag"]

    problem = await send(http, bad, places, **PROBLEM)

    assert problem.status_code == answer.status_code
    assert problem.headers["content-type"] == "application/problem+json"
    said = problem.json()
    assert said.keys() >= {"type", "title", "status", "detail", "code", "errors", "request_id"}
    assert not said.keys() & {"success", "message", "error"}
    assert said["status"] == problem.status_code
    assert said["code"] == bad.code
    assert said["type"].endswith(bad.code)
    assert said["detail"] == envelope["message"]
    assert said["errors"] == error["details"]
    assert said["request_id"] == problem.headers["x-request-id"]


@pytest.mark.parametrize("at", ["9999-12-31T23:59:59.999999Z", "0001-01-01T00:00:00Z"])
async def test_the_ends_of_the_calendar_are_refused_or_kept_as_they_are(
    http: httpx.AsyncClient, at: str
) -> None:
    """The driver takes these two for the infinities, and gives them back without an offset."""
    jim = {**JANE, "email": f"jim.{at[:4]}@example.com"}
    user = (await http.post(USERS, json=jim)).json()["data"]["id"]
    answer = await http.patch(f"{USERS}{user}/preferences", json={"muted_until": at})
    await http.delete(f"{USERS}{user}")
    if answer.status_code == 422:
        assert [bad["field"] for bad in answer.json()["error"]["details"]] == ["muted_until"]
    else:
        assert answer.json()["data"]["muted_until"] == at


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param(BATCH, {"ids": [1] * 50_000}, id="ids of a wrong type"),
        pytest.param(BATCH, {"ids": ["\x00"] * 50_000}, id="ids of control characters"),
        pytest.param(FEEDBACK, {"items": [1] * 50_000}, id="items of a wrong type"),
        pytest.param(FEEDBACK, {"items": [{"channel": "push"}] * 900}, id="items without fields"),
        pytest.param(USERS, {f"f{i}": 1 for i in range(5_000)}, id="unknown fields"),
    ],
)
async def test_a_body_full_of_errors_does_not_multiply(
    http: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    """Naming 500,000 errors takes the event loop 12 s, and 35 MB; a batch can have 1000."""
    answer = await http.post(path, json=body)
    assert answer.status_code == 422
    assert 1 <= len(answer.json()["error"]["details"]) <= 1000
