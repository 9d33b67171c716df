"""The pure rules: what makes two emails one, two tokens one, and how preferences merge."""

import hashlib
import json
import unicodedata
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from user_service_schemas import (
    MAX_CATEGORIES,
    CategoryUpdate,
    Choices,
    PreferencesUpdate,
    RuleViolation,
    canonical_email,
    effective_preferences,
    merge_preferences,
    preference_changes,
    token_digest,
)

from .strategies import choices, steadily, updates, words

locals_ = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="@"), min_size=1)
ascii_locals = st.from_regex(r"[a-z0-9.+_-]{1,20}", fullmatch=True)
domains = st.sampled_from(
    ["example.com", "sub.example.co.uk", "bücher.example", "faß.example", "例え.example"]
)
cased = st.randoms(use_true_random=False)


def in_any_case(text: str, random: Any) -> str:
    return "".join(random.choice((c.upper(), c.lower())) for c in text)


@steadily
@given(ascii_locals, st.sampled_from(["example.com", "xn--bcher-kva.example"]), cased)
def test_an_email_is_one_in_any_case(local: str, domain: str, random: Any) -> None:
    written = in_any_case(f"{local}@{domain}", random)
    assert canonical_email(written) == f"{local}@{domain}"


@steadily
@given(locals_)
def test_the_local_part_is_compared_by_the_one_function(local: str) -> None:
    expected = unicodedata.normalize("NFC", local).lower()
    assert canonical_email(f"{local}@Example.COM") == f"{expected}@example.com"


@steadily
@given(locals_, domains)
def test_the_canonical_email_is_its_own(local: str, domain: str) -> None:
    once = canonical_email(f"{local}@{domain}")
    assert canonical_email(once) == once


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("faß@example.com", "fass@example.com"),
        ("joſe@example.com", "jose@example.com"),  # noqa: RUF001
        ("ﬁona@example.com", "fiona@example.com"),
        ("jo²@example.com", "jo2@example.com"),
        ("jane@faß.example", "jane@fass.example"),
        ("jane+a@example.com", "jane@example.com"),
        ("j.ane@example.com", "jane@example.com"),
    ],
)
def test_different_people_stay_different(one: str, other: str) -> None:
    assert canonical_email(one) != canonical_email(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ZOË@example.com", "zoe\u0308@example.com"),
        ("jane@Bücher.example", "jane@xn--bcher-kva.example"),
        ("jane@BU\u0308CHER.example", "jane@bücher.example"),
        ("jane@bücher。example", "jane@bücher.example"),
    ],
)
def test_spellings_of_one_address_are_one(one: str, other: str) -> None:
    assert canonical_email(one) == canonical_email(other)


@pytest.mark.parametrize("email", ["", "@", "jane", "jane@", "@example.com", "jane@-a.example"])
def test_what_is_no_address_has_no_canonical_form(email: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the promise is the type
        canonical_email(email)


@steadily
@given(st.text(min_size=1).filter(lambda text: not text.startswith("{")))
def test_a_plain_token_is_digested_as_it_is(token: str) -> None:
    assert token_digest(token) == hashlib.sha256(token.encode()).digest()


@steadily
@given(st.text(), st.dictionaries(words, words), st.booleans(), st.sampled_from([None, 0, 2]))
def test_of_a_subscription_the_endpoint_decides(
    endpoint: str, rest: dict[str, str], first: bool, indent: int | None
) -> None:
    named = {"endpoint": endpoint}
    subscription = {**named, **rest, **named} if first else {**rest, **named}
    assert token_digest(json.dumps(subscription, indent=indent)) == token_digest(
        json.dumps({"endpoint": endpoint, "keys": {"p256dh": "renewed", "auth": "renewed"}})
    )


@steadily
@given(st.text(), st.text())
def test_two_subscriptions_are_one_only_by_their_endpoint(one: str, other: str) -> None:
    digests = [token_digest(json.dumps({"endpoint": end, "keys": {}})) for end in (one, other)]
    assert (digests[0] == digests[1]) == (one == other)


@pytest.mark.parametrize(
    "token",
    [
        "{",
        "{}",
        '{"endpoint": 1}',
        '{"endpoint": null}',
        '{"keys": {}}',
        '{"endpoint": "https://push.example"} and more',
        '{"endpoint": "\\ud800"}',
        '{"a":' * 2000,
        '{"a":' + "[" * 2000,
    ],
    ids=lambda token: token[:30],
)
def test_json_that_is_no_subscription_is_a_token_as_it_stands(token: str) -> None:
    assert token_digest(token) == hashlib.sha256(token.encode()).digest()


def naively_merged(current: Choices, update: PreferencesUpdate) -> dict[str, Any]:
    """The merge as one would write it on dictionaries; the oracle of `merge_preferences`."""
    merged: dict[str, Any] = json.loads(msgspec.json.encode(current))
    change: dict[str, Any] = json.loads(msgspec.json.encode(update))
    categories = change.pop("categories", {})
    merged.update(change)
    if categories is None:
        merged["categories"] = {}
    else:
        for name, channels in categories.items():
            kept = merged["categories"].setdefault(name, {})
            kept.update(channels if channels is not None else {"email": None, "push": None})
    merged["categories"] = {
        name: said
        for name, channels in merged["categories"].items()
        if (said := {channel: value for channel, value in channels.items() if value is not None})
    }
    return merged


@steadily
@given(choices, updates)
def test_a_change_merges_as_dictionaries_do(current: Choices, update: PreferencesUpdate) -> None:
    expected = naively_merged(current, update)
    start, end = expected["quiet_hours_start"], expected["quiet_hours_end"]
    if (start is None) != (end is None) or (start is not None and start == end):
        with pytest.raises(RuleViolation) as raised:
            merge_preferences(current, update)
        assert {d.field for d in raised.value.details} <= {"quiet_hours_start", "quiet_hours_end"}
    else:
        merged = merge_preferences(current, update)
        assert merged == msgspec.convert(expected, Choices)
        assert merged.muted_until is None or not merged.muted_until.utcoffset()


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({"news": {"email": None}}, {"news": {"push": False}, "security": {"email": False}}),
        ({"security": {"email": None}}, {"news": {"email": False, "push": False}}),
        ({"news": None}, {"security": {"email": False}}),
        (None, {}),
    ],
    ids=["a channel", "the last channel", "a category", "all"],
)
def test_null_forgets_what_was_said_of_categories(change: Any, left: dict[str, Any]) -> None:
    said = {"news": {"email": False, "push": False}, "security": {"email": False}}
    update = msgspec.convert({"categories": change}, PreferencesUpdate)
    assert merge_preferences(Choices(categories=said), update).categories == left


@steadily
@given(choices)
def test_nothing_said_changes_nothing(current: Choices) -> None:
    for nothing in (
        PreferencesUpdate(),
        PreferencesUpdate(categories={}),
        PreferencesUpdate(categories={name: CategoryUpdate() for name in current.categories}),
    ):
        assert merge_preferences(current, nothing) == current


@steadily
@given(choices, updates)
def test_a_forgotten_field_never_opts_anybody_back_in(
    current: Choices, update: PreferencesUpdate
) -> None:
    try:
        after = effective_preferences(merge_preferences(current, update), "UTC")
    except RuleViolation:
        return
    before = effective_preferences(current, "UTC")
    for channel in ("email", "push"):
        if getattr(update, channel) is msgspec.UNSET:
            assert getattr(after, channel) == getattr(before, channel)
        for name, channels in before.categories.items():
            said = update.categories.get(name) if update.categories else update.categories
            named = said is None or (
                said is not msgspec.UNSET and getattr(said, channel) is not msgspec.UNSET
            )
            forgotten = name not in (update.categories or {}) and update.categories is not None
            if forgotten or not named:
                kept = after.categories.get(name)
                assert (kept is None or getattr(kept, channel)) == getattr(channels, channel)


@steadily
@given(choices, updates)
def test_a_merge_leaves_what_it_was_given(current: Choices, update: PreferencesUpdate) -> None:
    before = msgspec.json.encode([current, update])
    with suppress(RuleViolation):
        merge_preferences(current, update)
    assert msgspec.json.encode([current, update]) == before


@steadily
@given(choices, updates)
def test_the_history_tells_exactly_what_changed(
    current: Choices, update: PreferencesUpdate
) -> None:
    try:
        after = merge_preferences(current, update)
    except RuleViolation:
        return
    changes = preference_changes(current, after)
    assert bool(changes) == (after != current)
    assert all(change.before != change.after for change in changes)
    fields = [change.field for change in changes]
    assert len(fields) == len(set(fields))


@pytest.mark.parametrize(
    ("count", "allowed"), [(MAX_CATEGORIES, True), (MAX_CATEGORIES + 1, False)]
)
def test_the_number_of_categories_is_judged_after_the_merge(count: int, allowed: bool) -> None:
    off = CategoryUpdate(email=False)
    half = merge_preferences(
        Choices(), PreferencesUpdate(categories={f"a{i}": off for i in range(50)})
    )
    rest = PreferencesUpdate(categories={f"b{i}": off for i in range(count - 50)})
    if allowed:
        assert len(merge_preferences(half, rest).categories) == count
    else:
        with pytest.raises(RuleViolation) as raised:
            merge_preferences(half, rest)
        assert [detail.field for detail in raised.value.details] == ["categories"]


@pytest.mark.parametrize(
    "at", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"], ids=["first", "last"]
)
def test_an_instant_outside_of_the_calendar_is_a_violation(at: str) -> None:
    with pytest.raises(RuleViolation) as raised:
        merge_preferences(Choices(), msgspec.convert({"muted_until": at}, PreferencesUpdate))
    assert [detail.field for detail in raised.value.details] == ["muted_until"]
