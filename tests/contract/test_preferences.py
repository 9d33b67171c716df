"""Preferences, by the fake and by the server alike."""

from __future__ import annotations

from datetime import UTC, datetime

import httpx
import pytest
from user_service_client import (
    CategoryUpdate,
    Consent,
    Invalid,
    PreferencesUpdate,
    User,
    UserServiceClient,
    VersionMismatch,
)

from .people import (
    NOBODY,
    PASSWORD,
    USERS,
    assert_refused,
    data_of,
    new_email,
    register,
    version_of,
)


@pytest.fixture
async def ada(client: UserServiceClient) -> User:
    return await client.users.create(
        name="Ada",
        email=new_email(),
        password=PASSWORD,
        preferences=PreferencesUpdate(
            push=False,
            quiet_hours_start="22:00",
            quiet_hours_end="07:00",
            categories={"marketing": CategoryUpdate(email=False)},
        ),
    )


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_what_is_omitted_keeps_its_value(
    raw: httpx.AsyncClient, ada: User, method: str
) -> None:
    path = f"{USERS}/{ada.id}/preferences"
    before = data_of(await raw.get(path))
    answer = await raw.request(method, path, json={"email": False})
    assert data_of(answer) == before | {"email": False}
    assert version_of(answer) == 2
    again = await raw.request(method, path, json={"email": False})
    assert (data_of(again), version_of(again)) == (before | {"email": False}, 2)


async def test_categories_merge_per_channel(client: UserServiceClient, ada: User) -> None:
    merged = await client.preferences.update(
        ada.id,
        categories={"marketing": CategoryUpdate(push=False), "news": CategoryUpdate(email=False)},
    )
    assert {name: (said.email, said.push) for name, said in merged.categories.items()} == {
        "marketing": (False, False),
        "news": (False, True),
    }
    forgotten = await client.preferences.update(
        ada.id, categories={"marketing": CategoryUpdate(email=None), "news": None}
    )
    assert {name: (said.email, said.push) for name, said in forgotten.categories.items()} == {
        "marketing": (True, False)
    }
    assert (await client.preferences.update(ada.id, categories=None)).categories == {}


async def test_null_clears(client: UserServiceClient, ada: User) -> None:
    until = datetime(2030, 1, 1, tzinfo=UTC)
    said = await client.preferences.update(ada.id, timezone="Europe/Warsaw", muted_until=until)
    assert (said.effective_timezone, said.muted_until) == ("Europe/Warsaw", until)
    cleared = await client.preferences.update(
        ada.id, timezone=None, muted_until=None, quiet_hours_start=None, quiet_hours_end=None
    )
    assert (cleared.timezone, cleared.effective_timezone, cleared.muted_until) == (
        None,
        "UTC",
        None,
    )
    assert (cleared.quiet_hours_start, cleared.quiet_hours_end) == (None, None)


async def test_rules_across_fields_hold_for_the_result(
    client: UserServiceClient, ada: User
) -> None:
    for change, field in (
        (PreferencesUpdate(quiet_hours_end=None), "quiet_hours_end"),
        (PreferencesUpdate(quiet_hours_end="22:00"), "quiet_hours_end"),
        (PreferencesUpdate(timezone="Mars/Olympus"), "timezone"),
    ):
        with pytest.raises(Invalid) as refused:
            await client.preferences.update(
                ada.id, quiet_hours_end=change.quiet_hours_end, timezone=change.timezone
            )
        assert [detail.field for detail in refused.value.details] == [field]
    assert await client.users.get(ada.id) == ada


async def test_history_tells_each_change_newest_first(client: UserServiceClient, ada: User) -> None:
    await client.preferences.update(
        ada.id, push=True, consent=Consent(source="page", policy_version="2026-05")
    )
    await client.preferences.update(ada.id, push=True)
    await client.preferences.update(ada.id, push=True, consent=Consent(source="again"))
    history = [revision async for revision in client.preferences.history(ada.id, page_size=1)]
    assert [(entry.version, entry.source, entry.policy_version) for entry in history] == [
        (2, "again", None),
        (2, "page", "2026-05"),
        (1, None, None),
    ]
    assert [len(entry.changes) for entry in history] == [0, 1, 5]
    assert [(one.field, one.before, one.after) for one in history[1].changes] == [
        ("push", False, True)
    ]


async def test_preferences_are_conditional(client: UserServiceClient, ada: User) -> None:
    shown, etag = await client.preferences.get_with_etag(ada.id)
    assert shown == ada.preferences
    await client.users.update(ada.id, name="Bob")
    with pytest.raises(VersionMismatch):
        await client.preferences.update(ada.id, push=True, if_version=etag)
    assert await client.preferences.get(ada.id) == shown


async def test_nobodys_preferences(raw: httpx.AsyncClient) -> None:
    await register(raw)
    for rest in ("preferences", "preferences/history"):
        assert_refused(await raw.get(f"{USERS}/{NOBODY}/{rest}"), 404, "user_not_found")
