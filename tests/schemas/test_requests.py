"""How bytes become requests: strictly, with every bad field named, and nothing of it shown."""

import json
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from user_service_schemas import (
    BatchUsers,
    CreateUser,
    DeviceUpdate,
    EmailFeedback,
    FieldError,
    LookupUsers,
    MalformedJSON,
    PasswordUpdate,
    PreferencesUpdate,
    RegisterDevice,
    ReportFeedback,
    Request,
    ResolveDeliveries,
    RuleViolation,
    UserUpdate,
    VerifyCredentials,
    convert_request,
    decode_request,
)

from .strategies import json_values, steadily, words

TYPES: list[type[Request]] = [
    BatchUsers,
    CreateUser,
    DeviceUpdate,
    LookupUsers,
    PasswordUpdate,
    PreferencesUpdate,
    RegisterDevice,
    ReportFeedback,
    ResolveDeliveries,
    UserUpdate,
    VerifyCredentials,
]
JANE = {"name": "Jane Roe", "email": "jane@example.com"}
MARK = "§§§"

types = st.sampled_from(TYPES)
marks = st.text(max_size=5).map(lambda text: f"{MARK}{text}")


def found(value: object, path: str) -> Iterator[object]:
    """Yield what a path of an error may mean in `value`; `...` for a field that is not there.

    Names may have dots in them, and `?` stands for one that is not shown.
    """
    if not path:
        yield value
    elif isinstance(value, list) and path.startswith("["):
        number, _, rest = path[1:].partition("]")
        if int(number) < len(value):
            yield from found(value[int(number)], rest.removeprefix("."))
    elif isinstance(value, dict):
        if path.isidentifier() and path not in value:
            yield ...
        for name, item in value.items():
            for shown in (name, "?"):
                rest = path.removeprefix(shown)
                if shown and path.startswith(shown) and (not rest or rest[0] in ".["):
                    yield from found(item, rest.removeprefix("."))


@steadily
@given(types, st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_a_request_or_one_of_two_errors(type_: type[Request], body: bytes) -> None:
    try:
        request = decode_request(body, type_)
    except MalformedJSON:
        with pytest.raises((ValueError, RecursionError)):
            json.loads(body.decode("utf-8"), parse_constant=int)
    except RuleViolation:
        assert judged(json.loads(body), type_)
    else:
        assert isinstance(request, type_)


def judged(value: object, type_: type[Request]) -> tuple[FieldError, ...]:
    """Return what is wrong with `value`; nothing if it is a `type_`."""
    try:
        convert_request(value, type_)
    except RuleViolation as violation:
        return violation.details
    return ()


@steadily
@given(types, json_values)
def test_every_error_names_a_part_of_the_request(type_: type[Request], value: Any) -> None:
    details = judged(value, type_)
    fields = [detail.field for detail in details]
    assert len(fields) == len(set(fields))
    for detail in details:
        if detail.field != "body":
            missing = detail.message == "This field is required."
            assert any((part is ...) == missing for part in found(value, detail.field)), detail


@steadily
@given(types, st.sets(st.sampled_from("abcdefgh"), min_size=1))
def test_every_unknown_field_is_named(type_: type[Request], names: set[str]) -> None:
    with pytest.raises(RuleViolation) as raised:
        convert_request(dict.fromkeys(names, 1), type_)
    assert names <= {detail.field for detail in raised.value.details}


@steadily
@given(types, st.recursive(marks, lambda inner: st.lists(inner) | st.dictionaries(words, inner)))
def test_no_error_shows_a_value(type_: type[Request], value: Any) -> None:
    fields = [field.encode_name for field in msgspec.structs.fields(type_)]
    for sent in (value, dict.fromkeys(fields, value)):
        assert MARK not in str(judged(sent, type_))


@steadily
@given(types, json_values)
def test_a_request_that_was_read_is_read_alike_again(type_: type[Request], value: Any) -> None:
    try:
        request = convert_request(value, type_)
    except RuleViolation:
        return
    assert decode_request(msgspec.json.encode(request), type_) == request


@steadily
@given(st.text(" \t\n\r\u00a0\u2003", max_size=3), words, st.text(" \t\n", max_size=3))
def test_strings_are_trimmed(before: str, name: str, after: str) -> None:
    request = convert_request({**JANE, "name": f"{before}{name}{after}"}, CreateUser)
    assert request.name == name


@steadily
@given(st.text(min_size=8, max_size=128))
def test_passwords_are_taken_verbatim(password: str) -> None:
    raw = {"password": password, "current_password": password}
    request = decode_request(json.dumps(raw).encode(), PasswordUpdate)
    assert (request.password, request.current_password) == (password, password)
    assert convert_request({**JANE, "password": password}, CreateUser).password == password


@steadily
@given(st.sampled_from([*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029]))
def test_control_characters_are_refused_by_the_name_of_their_field(code: int) -> None:
    with pytest.raises(RuleViolation) as raised:
        convert_request({**JANE, "name": f"Jane{chr(code)}Roe"}, CreateUser)
    assert [detail.field for detail in raised.value.details] == ["name"]


@pytest.mark.parametrize("name", ["news\n", "\x00news", "news\x85", "ne\u2028ws", "\n"])
def test_control_characters_in_names_are_refused(name: str) -> None:
    """Patterns do not do it: in Python `$` matches before a line break at the end."""
    with pytest.raises(RuleViolation) as raised:
        convert_request({"categories": {name: {"email": False}, "sport": None}}, PreferencesUpdate)
    assert [detail.field for detail in raised.value.details] == ["categories.?"]
    with pytest.raises(RuleViolation) as raised:
        convert_request({name: True, "email": False}, PreferencesUpdate)
    assert [detail.field for detail in raised.value.details] == ["?"]


@pytest.mark.parametrize("type_", [LookupUsers, VerifyCredentials])
def test_what_is_a_blank_in_other_dialects_of_patterns_is_none_of_an_email(
    type_: type[Request],
) -> None:
    """OpenAPI's `\\s` has U+FEFF, Python's has not: both are to say the same."""
    with pytest.raises(RuleViolation) as raised:
        convert_request({"email": "ja\ufeffne@example.com", "password": "x"}, type_)
    assert "email" in {detail.field for detail in raised.value.details}


@pytest.mark.parametrize(
    ("type_", "body"),
    [
        (PreferencesUpdate, {"categories": {f"{i:x}": {"a": 1} for i in range(4000)}}),
        (PreferencesUpdate, {"categories": {f"{i:x}": 1 for i in range(6000)}}),
        (CreateUser, {"preferences": {"categories": {f"{i:x}": {"a": 1} for i in range(4000)}}}),
        (CreateUser, {f"{i:x}": 1 for i in range(6000)}),
        (ReportFeedback, {"items": [{"channel": "push", "a": 1} for _ in range(1000)]}),
        (ReportFeedback, {"items": [{"channel": "email"} for _ in range(1000)]}),
    ],
)
def test_to_name_errors_takes_no_longer_than_to_read_the_body(
    type_: type[Request], body: dict[str, Any]
) -> None:
    """All that is not named is not looked for either: 64 KiB took the event loop 280 ms."""
    encoded = json.dumps(body, separators=(",", ":")).encode()
    took = []
    for _ in range(5):
        began = time.thread_time()
        with pytest.raises(RuleViolation):
            decode_request(encoded, type_)
        took.append(time.thread_time() - began)
    assert min(took) < 0.04


@pytest.mark.parametrize("many", ["[],", "{},", "1,", '"",', "[" * 500 + "]" * 500 + ","])
def test_more_values_than_anybody_sends_are_not_read(many: str) -> None:
    """Feedback may have 8 MiB: to read them as empty lists took the event loop 1.8 s."""
    body = f'{{"items":[{many * (8_000_000 // len(many))}1]}}'.encode()
    took = []
    for _ in range(5):
        began = time.thread_time()
        with pytest.raises(MalformedJSON):
            decode_request(body, ReportFeedback)
        took.append(time.thread_time() - began)
    assert min(took) < 0.1


def test_as_many_reports_as_may_be_sent_at_once_are_read() -> None:
    """The largest that gateways know: subscriptions of browsers, with all that is in them."""
    keys = {"p256dh": "B" * 87, "auth": "a" * 22}
    told = {"endpoint": "https://push.example/" + "x" * 3800, "expirationTime": None, "keys": keys}
    report = {
        "channel": "push",
        "token": json.dumps(told),
        "reason": "expired",
        "at": "2026-01-02T03:04:05Z",
    }
    body = json.dumps({"items": [report] * 1000}).encode()
    assert len(decode_request(body, ReportFeedback).items) == 1000


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("depth", [10, 100, 500, 900, 950, 1000, 1100, 2000, 10_000, 100_000])
@pytest.mark.parametrize("shape", [("[", "]"), ('{"name":', "}"), ('{"ids":[', "]}")], ids="lou")
def test_a_body_of_any_depth_gets_an_error_of_its_own(
    type_: type[Request], depth: int, shape: tuple[str, str]
) -> None:
    body = (shape[0] * depth + "1" + shape[1] * depth).encode()
    with pytest.raises((MalformedJSON, RuleViolation)):
        decode_request(body, type_)


@pytest.mark.parametrize(
    ("type_", "raw"),
    [
        (CreateUser, {**JANE, "password": MARK * 4, "external_id": MARK, "locale": "zz-ZZ"}),
        (UserUpdate, {"name": MARK, "email": f"{MARK}@example.com", "external_id": MARK}),
        (PasswordUpdate, {"password": MARK * 4, "current_password": MARK}),
        (LookupUsers, {"email": f"{MARK}@example.com"}),
        (RegisterDevice, {"token": MARK, "platform": "ios", "app": MARK}),
        (PreferencesUpdate, {"timezone": MARK, "consent": {"source": MARK}}),
        (
            ReportFeedback,
            {
                "items": [
                    {
                        "channel": "email",
                        "address": f"{MARK}@example.com",
                        "reason": "complaint",
                        "at": "2026-01-02T03:04:05Z",
                    }
                ]
            },
        ),
    ],
)
def test_the_repr_of_a_request_names_its_fields_and_shows_no_value(
    type_: type[Request], raw: dict[str, Any]
) -> None:
    request = convert_request(raw, type_)
    assert all(name in repr(request) for name in raw)
    for shown in (repr(request), str(request), f"{request}", repr([request])):
        assert not any(value in shown for value in (MARK, "jane@example.com", "Jane Roe", "zz-ZZ"))


def test_the_items_of_feedback_are_told_apart_by_their_channel() -> None:
    at = "2026-01-02T03:04:05Z"
    email = {"channel": "email", "address": "a@example.com", "reason": "hard_bounce", "at": at}
    read = convert_request({"items": [email]}, ReportFeedback)
    assert isinstance(read.items[0], EmailFeedback)
    bad = [
        email,
        {**email, "channel": "pigeon"},
        {**email, "reason": "expired"},
        {"channel": "push", "token": "", "reason": "expired", "at": "today"},
        "push",
    ]
    with pytest.raises(RuleViolation) as raised:
        convert_request({"items": bad}, ReportFeedback)
    assert {detail.field for detail in raised.value.details} == {
        "items[1].channel",
        "items[2].reason",
        "items[3].token",
        "items[3].at",
        "items[4]",
    }
