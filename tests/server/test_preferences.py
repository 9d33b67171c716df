"""Preferences over HTTP: how they merge, their rules, and the consent history."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from user_service_server.settings import Settings

from ..engines import settings_for
from .test_users import assert_failed, changes_of, fetch, register


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    """A service whose default zone is another than UTC."""
    return settings_for(
        database_url, redis_url, PASSWORD_REQUIRED="false", DEFAULT_TIMEZONE="Europe/Warsaw"
    )


async def someone(http: httpx.AsyncClient, **preferences: Any) -> str:
    """Register somebody with these preferences; returns the path of them."""
    user = await register(http, password=None, preferences=preferences)
    return f"/api/v1/users/{user['id']}/preferences"


async def merged(http: httpx.AsyncClient, path: str, **said: Any) -> dict[str, Any]:
    """Say something about preferences; returns them, as the write and a read show them."""
    answer = await http.patch(path, json=said)
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()["data"]
    got = await http.get(path)
    assert (got.json()["data"], got.headers["etag"]) == (shown, answer.headers["etag"])
    return shown


async def history(http: httpx.AsyncClient, path: str, **query: Any) -> dict[str, Any]:
    answer = await http.get(f"{path}/history", params=query)
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()["data"]
    return page


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_what_is_not_said_is_kept(http: httpx.AsyncClient, method: str) -> None:
    path = await someone(http, push=False, quiet_hours_start="22:00", quiet_hours_end="07:00")
    answer = await http.request(method, path, json={"email": False})
    assert answer.json()["data"] == {
        "email": False,
        "push": False,
        "quiet_hours_start": "22:00",
        "quiet_hours_end": "07:00",
        "timezone": None,
        "effective_timezone": "Europe/Warsaw",
        "muted_until": None,
        "categories": {},
    }


async def test_null_clears_one_and_switches_cannot_be_null(http: httpx.AsyncClient) -> None:
    path = await someone(
        http,
        quiet_hours_start="22:00",
        quiet_hours_end="07:00",
        timezone="Asia/Tokyo",
        muted_until="2030-01-01T00:00:00Z",
        categories={"news": {"push": False}},
    )
    shown = await merged(http, path, timezone=None)
    assert (shown["timezone"], shown["effective_timezone"]) == (None, "Europe/Warsaw")
    assert (shown["quiet_hours_start"], shown["muted_until"]) == ("22:00", "2030-01-01T00:00:00Z")
    shown = await merged(http, path, muted_until=None, quiet_hours_start=None, quiet_hours_end=None)
    assert [shown[f] for f in ("muted_until", "quiet_hours_start", "quiet_hours_end")] == [None] * 3
    assert (await merged(http, path, categories=None))["categories"] == {}
    for switch in ("email", "push"):
        refused = await http.patch(path, json={switch: None})
        assert_failed(refused, 422, "validation_failed", switch)


async def test_categories_merge_per_category_and_channel(http: httpx.AsyncClient) -> None:
    path = await someone(http, categories={"news": {"push": False}, "offers": {"email": False}})

    async def after(**said: Any) -> Any:
        return (await merged(http, path, categories=said))["categories"]

    both_off = {"email": False, "push": False}
    assert await after(news={"email": False}) == {
        "news": both_off,
        "offers": {"email": False, "push": True},
    }
    assert await after(offers=None) == {"news": both_off}
    assert await after(news={"push": None}) == {"news": {"email": False, "push": True}}
    assert await after(news={}) == {"news": {"email": False, "push": True}}
    assert await after(news={"email": None}) == {}
    assert await after(loud={"email": True}) == {"loud": {"email": True, "push": True}}


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        pytest.param({"quiet_hours_end": None}, ["quiet_hours_end"], id="end-taken-away"),
        pytest.param({"quiet_hours_start": None}, ["quiet_hours_start"], id="start-taken-away"),
        pytest.param({"quiet_hours_start": "07:00"}, ["quiet_hours_end"], id="start-at-the-end"),
        pytest.param({"timezone": "Mars/Olympus_Mons"}, ["timezone"], id="unknown-zone"),
        pytest.param({"timezone": "europe/warsaw"}, ["timezone"], id="zone-in-another-case"),
        pytest.param(
            {"categories": {f"more-{i}": {"push": False} for i in range(100)}},
            ["categories"],
            id="101-categories",
        ),
        pytest.param(
            {"quiet_hours_end": "22:00", "timezone": "Nowhere"},
            ["quiet_hours_end", "timezone"],
            id="two-rules",
        ),
        pytest.param(
            {"quiet_hours_start": "24:00", "quiet_hours_end": "7:00", "email": 1},
            ["email", "quiet_hours_start", "quiet_hours_end"],
            id="three-types",
        ),
        pytest.param({"muted_until": "2030-01-01T00:00:00"}, ["muted_until"], id="no-offset"),
        pytest.param(
            {"muted_until": "9999-12-31T23:59:59-01:00"}, ["muted_until"], id="after-all-time"
        ),
        pytest.param(
            {"muted_until": "0001-01-01T00:00:00+01:00"}, ["muted_until"], id="before-all-time"
        ),
        pytest.param({"consent": {}}, ["consent.source"], id="consent-of-nowhere"),
    ],
)
async def test_rules_hold_for_the_merged_result(
    http: httpx.AsyncClient, database_url: str, said: dict[str, Any], fields: list[str]
) -> None:
    path = await someone(
        http,
        quiet_hours_start="22:00",
        quiet_hours_end="07:00",
        categories={"news": {"push": False}},
    )
    before = (await http.get(path)).json()["data"]
    for method in ("PATCH", "PUT"):
        assert_failed(
            await http.request(method, path, json=said), 422, "validation_failed", *fields
        )
    assert (await http.get(path)).json()["data"] == before
    assert len((await history(http, path))["items"]) == 1
    assert await changes_of(database_url, path.split("/")[4]) == [(1, "user.created")]


async def test_a_hundred_categories_can_be_kept_and_exchanged(http: httpx.AsyncClient) -> None:
    path = await someone(http, categories={f"c{i}": {"push": False} for i in range(100)})
    exchanged = await merged(
        http, path, categories={"c0": None, "c100": {"push": False}, "c1": {"email": False}}
    )
    assert len(exchanged["categories"]) == 100
    assert exchanged["categories"]["c100"] == {"email": True, "push": False}


async def test_quiet_hours_can_be_completed_or_moved_by_one_end(http: httpx.AsyncClient) -> None:
    path = await someone(http, quiet_hours_start="22:00", quiet_hours_end="07:00")
    shown = await merged(http, path, quiet_hours_end="06:30")
    assert (shown["quiet_hours_start"], shown["quiet_hours_end"]) == ("22:00", "06:30")


async def test_an_instant_is_shown_in_utc_and_compared_as_an_instant(
    http: httpx.AsyncClient,
) -> None:
    path = await someone(http)
    shown = await merged(http, path, muted_until="2030-06-01T12:00:00+02:00")
    assert shown["muted_until"] == "2030-06-01T10:00:00Z"
    first = (await http.get(path)).headers["etag"]
    again = await http.patch(path, json={"muted_until": "2030-06-01T11:00:00+01:00"})
    assert again.headers["etag"] == first


async def test_the_document_shows_the_same_preferences(http: httpx.AsyncClient) -> None:
    path = await someone(http)
    shown = await merged(http, path, timezone="Asia/Kathmandu", categories={"a": {"push": False}})
    document = await fetch(http, path.split("/")[4])
    assert document["preferences"] == shown
    assert (document["version"], shown["effective_timezone"]) == (2, "Asia/Kathmandu")


async def test_the_history_tells_who_changed_what_through_which_source(
    http: httpx.AsyncClient,
) -> None:
    path = await someone(http, push=False, consent={"source": "signup", "policy_version": "1"})
    await merged(
        http,
        path,
        push=True,
        categories={"news": {"email": False}},
        muted_until="2030-01-01T01:00:00+01:00",
        consent={"source": "settings_page", "policy_version": "2026-05"},
    )
    await merged(http, path, categories={"news": None})
    third, second, first = (await history(http, path))["items"]
    assert first["changes"] == [
        {"field": "email", "before": None, "after": True},
        {"field": "push", "before": None, "after": False},
    ]
    assert (first["version"], first["source"], first["policy_version"]) == (1, "signup", "1")
    assert second["changes"] == [
        {"field": "push", "before": False, "after": True},
        {"field": "muted_until", "before": None, "after": "2030-01-01T00:00:00Z"},
        {"field": "categories.news.email", "before": None, "after": False},
    ]
    assert (second["version"], second["source"]) == (2, "settings_page")
    assert second["policy_version"] == "2026-05"
    assert third["changes"] == [{"field": "categories.news.email", "before": False, "after": None}]
    assert (third["version"], third["source"], third["policy_version"]) == (3, None, None)
    assert first["at"] < second["at"] < third["at"]


async def test_a_consent_that_changes_nothing_is_kept_without_a_version(
    http: httpx.AsyncClient, database_url: str
) -> None:
    path = await someone(http)
    before = await http.get(path)
    consent = {"source": "banner", "policy_version": "2"}
    agreed = await http.patch(path, json={"push": True, "consent": consent})
    assert (agreed.status_code, agreed.headers["etag"]) == (200, before.headers["etag"])
    newest, _registration = (await history(http, path))["items"]
    assert (newest["changes"], newest["source"], newest["version"]) == ([], "banner", 1)
    assert await changes_of(database_url, path.split("/")[4]) == [(1, "user.created")]
    await http.patch(path, json={"push": True})
    assert len((await history(http, path))["items"]) == 2, "nothing changed, nothing agreed to"


async def test_the_history_is_read_in_pages_newest_first_while_it_grows(
    http: httpx.AsyncClient,
) -> None:
    path = await someone(http)
    other = await someone(http)
    for i in range(6):
        await merged(http, path, push=bool(i % 2))
        await merged(http, other, push=bool(i % 2))
    page = await history(http, path, limit=3)
    versions = [item["version"] for item in page["items"]]
    await merged(http, path, email=False)
    while page["next_cursor"]:
        page = await history(http, path, limit=3, cursor=page["next_cursor"])
        versions += [item["version"] for item in page["items"]]
    assert versions == [7, 6, 5, 4, 3, 2, 1]
    assert page["items"][-1]["changes"][0] == {"field": "email", "before": None, "after": True}
