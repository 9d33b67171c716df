"""The category catalogue: what is refused of it, what it shows, and what it lets a user change."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from user_service_schemas import (
    Catalogue,
    Choices,
    Preferences,
    PreferencesUpdate,
    RuleViolation,
    effective_preferences,
    merge_preferences,
)

from .strategies import category_names, choices, steadily, updates

CATALOGUE = Catalogue.parse(
    json.dumps(
        {
            "security": {"email": "required", "push": "on"},
            "marketing": {"email": "off", "push": "off"},
            "news": {"push": "on", "email": "off"},
        }
    )
)
catalogues = st.dictionaries(
    category_names,
    st.fixed_dictionaries(
        dict.fromkeys(("email", "push"), st.sampled_from(["on", "off", "required"]))
    ),
    min_size=1,
).map(lambda categories: Catalogue.parse(json.dumps(categories)))


def update(**said: Any) -> PreferencesUpdate:
    return msgspec.convert(said, PreferencesUpdate)


@pytest.mark.parametrize(
    ("text", "mistakes"),
    [
        ("", {"catalogue": "This is not JSON."}),
        ("[" * 100_000, {"catalogue": "This is not JSON."}),
        ("[]", {"catalogue": "Expected an object of categories."}),
        ("{}", {"catalogue": "Expected 1 to 100 categories."}),
        (
            json.dumps({f"c{i}": {"email": "on", "push": "on"} for i in range(101)}),
            {"catalogue": "Expected 1 to 100 categories."},
        ),
        (
            '{"News": {"email": "on", "push": "on"}}',
            {
                "News": "Expected a category name of 1 to 64 characters out of a-z, 0-9, _ . -",
            },
        ),
        ('{"news": "on"}', {"news": "Expected an object with email and push."}),
        ('{"news": {"email": "on"}}', {"news.push": "Expected one of on, off, required."}),
        (
            '{"news": {"email": true, "push": "yes", "sms": "on"}}',
            {
                "news.email": "Expected one of on, off, required.",
                "news.push": "Expected one of on, off, required.",
                "news.sms": "This channel is not known.",
            },
        ),
        (
            '{"news": {"email": "on", "push": "on"}, "news": {"email": "off", "push": "on"}}',
            {"news": "This is said twice."},
        ),
        (
            '{"news": {"email": "on", "push": "on", "email": "off"}}',
            {"email": "This is said twice."},
        ),
        ('{"news": {"email": ["on"], "push": "on"}}', {"news.email": "Expected one of"}),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_bad_catalogue_is_refused_with_everything_that_is_wrong(
    text: str, mistakes: dict[str, str]
) -> None:
    with pytest.raises(RuleViolation) as raised:
        Catalogue.parse(text)
    found = {detail.field: detail.message for detail in raised.value.details}
    assert found.keys() == mistakes.keys()
    assert all(found[field].startswith(message) for field, message in mistakes.items())


def test_a_catalogue_is_immutable_and_a_value() -> None:
    again = Catalogue.parse(msgspec.json.encode(CATALOGUE.categories))
    assert again == CATALOGUE
    assert hash(again) == hash(CATALOGUE)
    with pytest.raises(TypeError):
        CATALOGUE.categories["more"] = {}  # type: ignore[index]
    with pytest.raises(TypeError):
        CATALOGUE.categories["news"]["push"] = "off"  # type: ignore[index]


def test_the_document_shows_the_effective_switches_of_the_catalogue() -> None:
    said = Choices(
        categories={
            "security": {"email": False, "push": False},  # from before it was required
            "marketing": {"push": True},
            "gone": {"push": False},
        }
    )
    shown = effective_preferences(said, "UTC", CATALOGUE)
    assert json.loads(msgspec.json.encode(shown))["categories"] == {
        "security": {"email": True, "push": False, "required": ["email"]},
        "marketing": {"email": False, "push": True},
        "news": {"email": False, "push": True},
    }
    assert shown.catalogued
    assert list(shown.categories) == ["security", "marketing", "news"]


def test_without_a_catalogue_the_document_is_as_it_was() -> None:
    said = Choices(categories={"news": {"push": False}})
    shown = json.loads(msgspec.json.encode(effective_preferences(said, "UTC")))
    assert shown["categories"] == {"news": {"email": True, "push": False}}
    assert "catalogued" not in shown


@steadily
@given(choices, catalogues)
def test_a_document_with_a_catalogue_is_written_as_it_was_read(
    said: Choices, catalogue: Catalogue
) -> None:
    shown = effective_preferences(said, "UTC", catalogue)
    assert msgspec.json.decode(msgspec.json.encode(shown), type=Preferences) == shown
    for name, switches in shown.categories.items():
        for channel in ("email", "push"):
            mode = catalogue.categories[name][channel]
            is_on = getattr(switches, channel)
            kept = said.categories.get(name, {}).get(channel)
            assert (channel in switches.required) == (mode == "required")
            assert is_on == (
                True if mode == "required" else (mode == "on") if kept is None else kept
            )


@pytest.mark.parametrize(
    ("categories", "mistakes"),
    [
        ({"sport": {"push": True}}, ["categories.sport"]),
        ({"sport": {}}, ["categories.sport"]),
        ({"sport": None}, ["categories.sport"]),
        ({"gone": {"push": True}}, ["categories.gone"]),
        ({"security": {"email": False, "push": False}}, ["categories.security.email"]),
        (
            {"security": {"email": False}, "sport": {"push": True}, "news": {"push": False}},
            ["categories.security.email", "categories.sport"],
        ),
    ],
)
def test_what_the_catalogue_does_not_allow_is_refused_by_name(
    categories: dict[str, Any], mistakes: list[str]
) -> None:
    said = Choices(categories={"gone": {"push": False}})
    with pytest.raises(RuleViolation) as raised:
        merge_preferences(said, update(categories=categories), CATALOGUE)
    assert [detail.field for detail in raised.value.details] == mistakes


@pytest.mark.parametrize(
    "categories",
    [
        {"security": {"push": False}},
        {"security": {"email": True}},
        {"security": {"email": None}},
        {"security": None},
        {"gone": None},
        {"marketing": {"email": True, "push": True}},
        {},
        None,
    ],
)
def test_what_the_catalogue_allows_is_merged_as_without_it(
    categories: dict[str, Any] | None,
) -> None:
    said = Choices(categories={"gone": {"push": False}, "security": {"email": False}})
    change = update(categories=categories)
    assert merge_preferences(said, change, CATALOGUE) == merge_preferences(said, change)


def test_what_the_catalogue_dropped_stands_in_nobodys_way() -> None:
    said = Choices(categories={f"old{i}": {"push": False} for i in range(100)})
    merged = merge_preferences(said, update(categories={"news": {"push": False}}), CATALOGUE)
    assert len(merged.categories) == 101


@steadily
@given(choices, updates, catalogues)
def test_a_required_category_is_on_after_whatever_change(
    said: Choices, change: PreferencesUpdate, catalogue: Catalogue
) -> None:
    with suppress(RuleViolation):
        said = merge_preferences(said, change, catalogue)
    shown = effective_preferences(said, "UTC", catalogue)
    for switches in shown.categories.values():
        assert all(getattr(switches, channel) for channel in switches.required)
