"""Owns what the property tests of the schemas draw: texts, preferences, documents, any JSON."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from msgspec import UNSET
from user_service_schemas import (
    CategoryUpdate,
    Choices,
    PreferencesUpdate,
    RuleViolation,
    merge_preferences,
)

steadily = settings(deadline=None, derandomize=True)
"""The same examples on each run: a shared machine is no reason to fail, and neither is luck."""

words = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
times_of_day = st.times().map(lambda time: f"{time:%H:%M}")
zones = st.sampled_from(["Europe/Warsaw", "America/New_York", "Asia/Kathmandu", "UTC"])
category_names = st.sampled_from(["news", "marketing", "security", "a.b", "x_1"])
offsets = st.integers(-14 * 60, 14 * 60).map(lambda m: timezone(timedelta(minutes=m)))
instants = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=offsets)  # noqa: DTZ001


def or_unset(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.just(UNSET) | strategy


def or_null(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return or_unset(st.none() | strategy)


updates = st.builds(
    PreferencesUpdate,
    email=or_unset(st.booleans()),
    push=or_unset(st.booleans()),
    quiet_hours_start=or_null(times_of_day),
    quiet_hours_end=or_null(times_of_day),
    timezone=or_null(zones),
    muted_until=or_null(instants),
    categories=or_null(
        st.dictionaries(
            category_names,
            st.none()
            | st.builds(CategoryUpdate, email=or_null(st.booleans()), push=or_null(st.booleans())),
        )
    ),
)


def _followed(history: list[PreferencesUpdate]) -> Choices:
    choices = Choices()
    for update in history:
        try:
            choices = merge_preferences(choices, update)
        except RuleViolation:
            continue
    return choices


choices = st.lists(updates, max_size=4).map(_followed)
"""What somebody can have said: any row of changes that were valid."""


FIELDS = [
    "name",
    "email",
    "phone",
    "external_id",
    "locale",
    "password",
    "current_password",
    "preferences",
    "ids",
    "items",
    "push",
    "categories",
    "consent",
    "quiet_hours_start",
    "timezone",
    "muted_until",
    "source",
    "token",
    "platform",
    "app",
    "active",
    "channel",
    "reason",
    "at",
    "address",
    "user_ids",
    "category",
    "priority",
    "explain",
]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(["22:00", "john@example.com", "+48221234567", "android", "push", "email"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(FIELDS) | st.text(max_size=5),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)

devices = st.fixed_dictionaries(
    {
        "id": st.uuids().map(str),
        "token": words,
        "platform": st.sampled_from(["web", "ios", "android", "watch of a newer server"]),
        "app": st.none() | words,
        "active": st.just(True),
        "registered_at": st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
    }
)
users = st.fixed_dictionaries(
    {
        "id": st.uuids().map(str),
        "external_id": st.none() | words,
        "name": words,
        "email": st.emails(),
        "phone": st.none() | st.just("+48221234567"),
        "locale": st.none() | st.just("pl-PL"),
        "email_deliverable": st.booleans(),
        "preferences": st.fixed_dictionaries(
            {
                "email": st.booleans(),
                "push": st.booleans(),
                "quiet_hours_start": st.none() | times_of_day,
                "quiet_hours_end": st.none() | times_of_day,
                "timezone": st.none() | zones,
                "effective_timezone": zones,
                "muted_until": st.none() | instants.map(datetime.isoformat),
                "categories": st.dictionaries(
                    category_names,
                    st.fixed_dictionaries({"email": st.booleans(), "push": st.booleans()}),
                ),
            }
        ),
        "devices": st.lists(devices, max_size=3),
        "version": st.integers(1, 2**53),
        "rules": st.integers(1, 9),
        "created_at": st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
        "updated_at": st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
    }
)
"""A user's document, as decoded JSON."""
