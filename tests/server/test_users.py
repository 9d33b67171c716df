"""Users over HTTP: registration, uniqueness, profiles, lookup, batch, listing, erasure."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
import redis.asyncio
from user_service_server.embedded import EmbeddedPostgres

PASSWORD = "Correct-Horse-1!"


async def register(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """Register somebody, by default with an email of their own; returns the document."""
    wanted = {
        "name": "Jane Roe",
        "email": f"{uuid4().hex}@example.com",
        "password": PASSWORD,
        **fields,
    }
    answer = await http.post("/api/v1/users/", json=wanted)
    assert answer.status_code == 201, answer.text
    document: dict[str, Any] = answer.json()["data"]
    return document


async def fetch(http: httpx.AsyncClient, user_id: str) -> dict[str, Any]:
    """Return the user's document as a plain GET shows it."""
    answer = await http.get(f"/api/v1/users/{user_id}")
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()["data"]
    return document


async def rows(database_url: str, query: str, *arguments: object) -> list[tuple[Any, ...]]:
    """Run SQL beside the server, on a connection of its own."""
    connection = await asyncpg.connect(database_url.replace("+asyncpg", ""))
    try:
        return [tuple(row) for row in await connection.fetch(query, *arguments)]
    finally:
        await connection.close()


async def is_waiting(database_url: str, part: str) -> bool:
    """Whether a statement waits for a lock in this database; `part` is of its first kilobyte."""
    waiting = (
        "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND datname = current_database() AND query LIKE $1"
    )
    return bool(await rows(database_url, waiting, f"%{part}%"))


async def changes_of(database_url: str, user_id: str) -> list[tuple[Any, ...]]:
    """Return what the change log says of a user: (version, kind), in its order."""
    return await rows(
        database_url, "SELECT version, kind FROM changes WHERE user_id = $1 ORDER BY id", user_id
    )


def assert_failed(answer: httpx.Response, status: int, code: str, *fields: str) -> None:
    """Assert the envelope of an error, and the fields that it names."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"success", "data", "message", "error"}
    assert body["success"] is False
    assert body["error"]["code"] == code
    assert [detail["field"] for detail in body["error"]["details"]] == list(fields)


async def test_of_ten_who_register_one_email_at_once_one_gets_it(
    http: httpx.AsyncClient, database_url: str
) -> None:
    spellings = ["ten.clients@example.com", "Ten.Clients@Example.COM"] * 5
    body = {"name": "Ten Clients", "password": PASSWORD}
    answers = await asyncio.gather(
        *(http.post("/api/v1/users/", json={**body, "email": email}) for email in spellings)
    )
    assert Counter(answer.status_code for answer in answers) == {201: 1, 409: 9}
    for answer in answers:
        if answer.status_code == 409:
            assert_failed(answer, 409, "email_taken", "email")
    (created,) = (a.json()["data"] for a in answers if a.status_code == 201)
    assert await fetch(http, created["id"]) == created
    same = "SELECT count(*) FROM users WHERE lower(email) = 'ten.clients@example.com'"
    assert await rows(database_url, same) == [(1,)]
    orphans = "SELECT count(*) FROM preferences WHERE user_id NOT IN (SELECT id FROM users)"
    assert await rows(database_url, orphans) == [(0,)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("jo\u017fe@example.com", "jose@example.com", id="long-s"),
        pytest.param("faß@example.com", "fass@example.com", id="sharp-s"),
    ],
)
async def test_people_whose_emails_only_look_alike_stay_different(
    http: httpx.AsyncClient, one: str, other: str
) -> None:
    first, second = await register(http, email=one), await register(http, email=other)
    assert (first["email"], second["email"]) == (one, other)
    for email, user in ((one, first), (other, second)):
        found = await http.post("/api/v1/users/lookup", json={"email": email})
        assert found.json()["data"]["users"] == [user]


async def test_two_normal_forms_of_an_email_are_one_person(http: httpx.AsyncClient) -> None:
    user = await register(http, email="zoe\u0308@example.com")
    taken = await http.post(
        "/api/v1/users/",
        json={"name": "Zoë", "email": "ZO\u00cb@EXAMPLE.com", "password": PASSWORD},
    )
    assert_failed(taken, 409, "email_taken", "email")
    found = await http.post("/api/v1/users/lookup", json={"email": "zo\u00eb@example.com"})
    assert found.json()["data"]["users"] == [user]


async def test_of_ten_who_register_one_external_id_at_once_one_gets_it(
    http: httpx.AsyncClient,
) -> None:
    answers = await asyncio.gather(
        *(
            http.post(
                "/api/v1/users/",
                json={
                    "name": "Ten",
                    "email": f"external.{i}@example.com",
                    "password": PASSWORD,
                    "external_id": "crm-1",
                },
            )
            for i in range(10)
        )
    )
    assert Counter(answer.status_code for answer in answers) == {201: 1, 409: 9}
    for answer in answers:
        if answer.status_code == 409:
            assert_failed(answer, 409, "external_id_taken", "external_id")
    again = await register(http, external_id="CRM-1")
    assert again["external_id"] == "CRM-1", "external ids are somebody else's: case counts"


async def test_what_is_taken_cannot_be_changed_to(
    http: httpx.AsyncClient, database_url: str
) -> None:
    await register(http, email="owner@example.com", external_id="owner")
    user = await register(http, email="wants@example.com")
    path = f"/api/v1/users/{user['id']}"
    taken = await http.patch(path, json={"email": "OWNER@example.com", "name": "Other"})
    assert_failed(taken, 409, "email_taken", "email")
    taken = await http.patch(path, json={"external_id": "owner", "name": "Other"})
    assert_failed(taken, 409, "external_id_taken", "external_id")
    assert await fetch(http, user["id"]) == user
    assert await changes_of(database_url, user["id"]) == [(1, "user.created")]


async def test_the_spelling_of_ones_own_email_can_be_changed(http: httpx.AsyncClient) -> None:
    user = await register(http, email="spelling@example.com")
    changed = await http.patch(
        f"/api/v1/users/{user['id']}", json={"email": "Spelling@Example.com"}
    )
    assert changed.status_code == 200
    assert changed.json()["data"]["email"] == "Spelling@Example.com"
    assert changed.json()["data"]["version"] == 2


async def test_registrations_and_changes_that_race_for_an_email_have_one_winner(
    http: httpx.AsyncClient,
) -> None:
    users = await asyncio.gather(*(register(http) for _ in range(3)))
    for attempt in range(4):
        email = f"race.{attempt}@example.com"
        body = {"name": "Racer", "email": email, "password": PASSWORD}
        answers = await asyncio.gather(
            *(http.patch(f"/api/v1/users/{user['id']}", json={"email": email}) for user in users),
            *(http.post("/api/v1/users/", json=body) for _ in range(3)),
        )
        won = [answer for answer in answers if answer.is_success]
        assert len(won) == 1, [answer.text for answer in answers]
        for answer in answers:
            if not answer.is_success:
                assert_failed(answer, 409, "email_taken", "email")
        found = await http.post("/api/v1/users/lookup", json={"email": email})
        assert found.json()["data"]["users"] == [won[0].json()["data"]]


async def test_an_email_that_is_given_up_is_free(http: httpx.AsyncClient) -> None:
    user = await register(http, email="given.up@example.com", external_id="given-up")
    given_up = {"email": "kept@example.com", "external_id": None}
    assert (await http.patch(f"/api/v1/users/{user['id']}", json=given_up)).status_code == 200
    heir = await register(http, email="given.up@example.com", external_id="given-up")
    assert heir["id"] != user["id"]


async def test_the_log_of_postgres_holds_no_personal_data(
    http: httpx.AsyncClient, postgres: EmbeddedPostgres
) -> None:
    email, name, phone = "Logged.Person@example.com", "Loggedname Surname", "+48221234599"
    external_id, token, category = "logged-external", "logged-device-token", "logged-category"
    body = {
        "name": name,
        "email": email,
        "phone": phone,
        "external_id": external_id,
        "password": "Logged-Password-1",
    }
    await asyncio.gather(*(http.post("/api/v1/users/", json=body) for _ in range(5)))
    found = await http.post("/api/v1/users/lookup", json={"email": email})
    (owner,) = found.json()["data"]["users"]
    other = await register(http, name=name)
    mine, theirs = f"/api/v1/users/{owner['id']}", f"/api/v1/users/{other['id']}"
    calls = [
        http.patch(theirs, json={"email": email.upper()}),
        http.patch(theirs, json={"external_id": external_id, "phone": phone}),
        *(http.post(f"{path}/devices", json={"token": token, "platform": "ios"})
          for path in (mine, theirs) * 5),
        http.patch(f"{mine}/preferences", json={"categories": {category: {"push": False}}}),
    ]  # fmt: skip
    answers = await asyncio.gather(*calls)
    assert {answer.status_code for answer in answers} <= {200, 201, 409}

    log = postgres.log_path.read_text(errors="replace")
    assert "database system is ready" in log, "this is the log that the statements would be in"
    personal = (email, name, phone, external_id, token, category, "Logged-Password-1")
    assert [value for value in personal if value.lower() in log.lower()] == []
    assert "Key (email" not in log
    assert "duplicate key" not in log
    assert "argon2id" not in log


async def test_a_registration_shows_what_was_said_and_the_defaults(
    http: httpx.AsyncClient,
) -> None:
    answer = await http.post(
        "/api/v1/users",
        json={
            "name": "  Zażółć Gęślą  ",
            "email": " Written.As@Example.com ",
            "password": PASSWORD,
            "phone": " +4402079460958 ",
            "external_id": " crm 7 ",
            "locale": "pl-pl",
            "preferences": {"push": False},
        },
    )
    assert answer.status_code == 201
    user = answer.json()["data"]
    assert set(user) == {
        *("id", "external_id", "name", "email", "phone", "locale", "email_deliverable"),
        *("preferences", "devices", "version", "rules", "created_at", "updated_at"),
    }
    assert (user["name"], user["email"]) == ("Zażółć Gęślą", "Written.As@Example.com")
    assert (user["phone"], user["external_id"]) == ("+442079460958", "crm 7")
    assert (user["locale"], user["version"], user["devices"]) == ("pl-PL", 1, [])
    assert user["email_deliverable"] is True
    assert user["created_at"] == user["updated_at"]
    assert user["created_at"].endswith("Z")
    assert user["id"][14] == "7", "UUIDv7"
    assert user["preferences"] == {
        "email": True,
        "push": False,
        "quiet_hours_start": None,
        "quiet_hours_end": None,
        "timezone": None,
        "effective_timezone": "UTC",
        "muted_until": None,
        "categories": {},
    }


async def test_a_registration_names_every_bad_field(http: httpx.AsyncClient) -> None:
    answer = await http.post(
        "/api/v1/users/",
        json={
            "name": "A",
            "email": "a@b@c",
            "password": "password",
            "phone": "+1000000000",
            "locale": "xx-nonsense-",
            "preferences": {"quiet_hours_start": "22:00"},
            "nick": "A",
        },
    )
    named = {detail["field"] for detail in answer.json()["error"]["details"]}
    assert answer.status_code == 422
    assert {"email", "locale", "nick"} <= named
    judged = await http.post(
        "/api/v1/users/",
        json={
            "name": "A",
            "email": "a@-.example",
            "password": "password",
            "phone": "+1000",
            "locale": "xx-nonsense0",
            "preferences": {"quiet_hours_start": "22:00", "timezone": "Mars/Base"},
        },
    )
    assert_failed(
        judged,
        *(422, "validation_failed", "email", "phone", "locale"),
        *("preferences.quiet_hours_end", "preferences.timezone", "password"),
    )


async def test_an_update_changes_what_is_said_and_null_clears(http: httpx.AsyncClient) -> None:
    user = await register(http, phone="+48221234567", locale="pl", external_id="clear-me")
    path = f"/api/v1/users/{user['id']}"
    renamed = (await http.patch(path, json={"name": " New  Name "})).json()["data"]
    assert renamed == {
        **user,
        "name": "New  Name",
        "version": 2,
        "updated_at": renamed["updated_at"],
    }
    assert renamed["updated_at"] > user["updated_at"]
    cleared = await http.put(path, json={"phone": None, "locale": None, "external_id": None})
    assert cleared.status_code == 200
    document = cleared.json()["data"]
    assert (document["phone"], document["locale"], document["external_id"]) == (None, None, None)
    assert (document["name"], document["version"]) == ("New  Name", 3)
    assert await fetch(http, user["id"]) == document
    assert_failed(await http.patch(path, json={"name": None}), 422, "validation_failed", "name")
    assert_failed(await http.patch(path, json={"email": None}), 422, "validation_failed", "email")


async def test_users_are_found_by_email_phone_or_external_id(http: httpx.AsyncClient) -> None:
    phone = "+48221234000"
    one = await register(http, email="Find.Me@example.com", phone=phone, external_id="find-me")
    two = await register(http, phone=phone)

    async def found(**by: str) -> list[dict[str, Any]]:
        answer = await http.post("/api/v1/users/lookup", json=by)
        assert answer.status_code == 200, answer.text
        users: list[dict[str, Any]] = answer.json()["data"]["users"]
        return users

    assert await found(email="find.ME@EXAMPLE.COM") == [one]
    assert await found(external_id="find-me") == [one]
    assert await found(phone=phone) == [one, two]
    assert await found(email="nobody@example.com") == []
    both = await http.post("/api/v1/users/lookup", json={"email": "a@example.com", "phone": phone})
    assert both.status_code == 422
    assert (await http.post("/api/v1/users/lookup", json={})).status_code == 422


async def test_a_user_is_found_by_the_phone_that_was_registered(http: httpx.AsyncClient) -> None:
    written = "+4402079460123"
    user = await register(http, phone=written)
    assert user["phone"] == "+442079460123"
    for phone in (written, user["phone"]):
        answer = await http.post("/api/v1/users/lookup", json={"phone": phone})
        assert answer.json()["data"]["users"] == [user], phone


async def test_a_batch_keeps_the_order_and_names_who_is_missing(http: httpx.AsyncClient) -> None:
    users = [await register(http) for _ in range(4)]
    first, second, third, erased = (user["id"] for user in users)
    await http.delete(f"/api/v1/users/{erased}")
    nobody = str(uuid4())
    ids = [third, nobody, first.upper(), third, erased, second]
    answer = await http.post("/api/v1/users/batch", json={"ids": ids})
    assert answer.status_code == 200
    assert answer.json()["data"] == {
        "users": [users[2], users[0], users[1]],
        "missing": [nobody, erased],
    }
    assert (await http.post("/api/v1/users/batch", json={"ids": []})).json()["data"] == {
        "users": [],
        "missing": [],
    }


async def test_a_batch_takes_a_thousand_ids_and_not_one_more(http: httpx.AsyncClient) -> None:
    user = await register(http)
    ids = [str(uuid4()) for _ in range(999)]
    answer = await http.post("/api/v1/users/batch", json={"ids": [*ids, user["id"]]})
    assert answer.json()["data"] == {"users": [user], "missing": ids}
    too_many = await http.post("/api/v1/users/batch", json={"ids": [*ids, user["id"], ids[0]]})
    assert_failed(too_many, 422, "validation_failed", "ids")


async def test_a_listing_shows_each_user_once_while_others_register(
    http: httpx.AsyncClient,
) -> None:
    before = [(await register(http))["id"] for _ in range(7)]
    seen: list[str] = []
    cursor = None
    for page in range(1000):
        query = {"limit": "5"} | ({"cursor": cursor} if cursor else {})
        answer = await http.get("/api/v1/users", params=query)
        data = answer.json()["data"]
        seen += [user["id"] for user in data["items"]]
        cursor = data["next_cursor"]
        if cursor is None:
            break
        assert len(data["items"]) == 5
        if page < 3:
            await register(http)
    assert cursor is None
    assert seen == sorted(set(seen)), "oldest first, each once"
    assert set(before) <= set(seen)


async def test_a_listing_is_complete_where_its_end_is_the_end_of_a_page(
    http: httpx.AsyncClient, database_url: str
) -> None:
    [(count,)] = await rows(
        database_url, "SELECT count(*)::int FROM users WHERE deleted_at IS NULL"
    )
    assert 0 < count <= 200
    page = (await http.get("/api/v1/users/", params={"limit": count})).json()["data"]
    assert len(page["items"]) == count
    assert page["next_cursor"] is None


@pytest.mark.parametrize(
    "cursor",
    [
        pytest.param("nonsense", id="no-base64"),
        pytest.param("dXNlcnM6", id="no-position"),
        pytest.param("aGlzdG9yeTox", id="of-another-listing"),
        # `users:` and 36 dashes: has the length of an id, and its characters.
        pytest.param("dXNlcnM6" + "LS0t" * 12, id="no-uuid"),
    ],
)
async def test_a_cursor_that_was_not_issued_is_refused(
    http: httpx.AsyncClient, cursor: str
) -> None:
    answer = await http.get("/api/v1/users", params={"cursor": cursor})
    assert_failed(answer, 400, "invalid_cursor")


async def test_erasure_leaves_nothing_of_the_person_anywhere(
    http: httpx.AsyncClient, database_url: str, redis_url: str
) -> None:
    personal = {
        "name": "Erasmus Wiped",
        "email": "Wiped.Away@example.com",
        "phone": "+48221239999",
        "external_id": "wiped-external",
        "locale": "rm-sursilv",
    }
    user = await register(http, **personal)
    path = f"/api/v1/users/{user['id']}"
    device = {"token": "wiped-token", "platform": "web", "app": "wiped-app"}
    await http.post(f"{path}/devices", json=device)
    said = {
        "timezone": "America/Scoresbysund",
        "categories": {"wiped-category": {"push": False}},
        "consent": {"source": "wiped-source", "policy_version": "wiped-policy"},
    }
    assert (await http.patch(f"{path}/preferences", json=said)).status_code == 200
    await fetch(http, user["id"])

    erased = await http.delete(path)
    assert erased.status_code == 200
    assert (erased.json()["success"], erased.json()["data"]) == (True, None)
    values = [
        *(*personal.values(), "wiped.away@example.com", "wiped-token", "wiped-app"),
        *("America/Scoresbysund", "wiped-category", "wiped-source", "wiped-policy"),
    ]
    tables = await rows(database_url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert {"users", "preferences", "devices", "changes", "preference_history"} <= {
        name for (name,) in tables
    }
    for (table,) in tables:
        content = str(await rows(database_url, f'SELECT t::text FROM "{table}" t'))  # noqa: S608
        assert [value for value in values if value.lower() in content.lower()] == [], table
    kept = "SELECT version, password_hash, deleted_at IS NOT NULL FROM users WHERE id = $1"
    assert await rows(database_url, kept, user["id"]) == [(4, None, True)]
    assert (await changes_of(database_url, user["id"]))[-1] == (4, "user.deleted")
    async with redis.asyncio.Redis.from_url(redis_url) as connection:
        assert await connection.keys(f"*{user['id']}*") == []


async def test_who_was_erased_is_nobody_and_the_email_is_free(http: httpx.AsyncClient) -> None:
    user = await register(http, email="gone@example.com", external_id="gone")
    path = f"/api/v1/users/{user['id']}"
    device = await http.post(f"{path}/devices", json={"token": "gone", "platform": "ios"})
    device_path = f"{path}/devices/{device.json()['data']['id']}"
    assert (await http.delete(path)).status_code == 200
    for answer in (
        await http.get(path),
        await http.get(path, headers={"X-Min-Version": "1"}),
        await http.head(path),
        await http.patch(path, json={"name": "Back"}),
        await http.delete(path),
        await http.put(f"{path}/password", json={"password": PASSWORD}),
        await http.get(f"{path}/preferences"),
        await http.patch(f"{path}/preferences", json={"push": False}),
        await http.get(f"{path}/preferences/history"),
        await http.get(f"{path}/devices"),
        await http.post(f"{path}/devices", json={"token": "gone", "platform": "ios"}),
        await http.patch(device_path, json={"active": False}),
        await http.delete(device_path),
    ):
        assert answer.status_code == 404, answer.request
        if answer.request.method != "HEAD":
            assert_failed(answer, 404, "user_not_found")
    batch = await http.post("/api/v1/users/batch", json={"ids": [user["id"]]})
    assert batch.json()["data"] == {"users": [], "missing": [user["id"]]}
    found = await http.post("/api/v1/users/lookup", json={"email": "gone@example.com"})
    assert found.json()["data"]["users"] == []
    heir = await register(http, email="gone@example.com", external_id="gone")
    assert heir["id"] != user["id"]


async def test_an_id_that_is_nobodys_is_not_found(http: httpx.AsyncClient) -> None:
    assert_failed(await http.get(f"/api/v1/users/{uuid4()}"), 404, "user_not_found")
    assert_failed(await http.get("/api/v1/users/me"), 404, "user_not_found", "user_id")


async def test_ids_are_taken_in_capitals_and_paths_with_a_slash(http: httpx.AsyncClient) -> None:
    user = await register(http)
    shouted = f"/api/v1/users/{user['id'].upper()}"
    for path in (shouted, f"{shouted}/"):
        assert (await http.get(path)).json()["data"] == user
    for rest in ("preferences", "preferences/history", "devices"):
        for slash in ("", "/"):
            assert (await http.get(f"{shouted}/{rest}{slash}")).status_code == 200
    renamed = await http.patch(f"{shouted}/", json={"name": "Louder"})
    assert (await fetch(http, user["id"])) == renamed.json()["data"]


async def test_head_answers_as_get_does_without_a_body(http: httpx.AsyncClient) -> None:
    user = await register(http)
    path = f"/api/v1/users/{user['id']}"
    got, head = await http.get(path), await http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "content-type", "content-length", "cache-control"):
        assert head.headers[name] == got.headers[name]
    missing = await http.head(f"/api/v1/users/{uuid4()}")
    assert (missing.status_code, missing.content) == (404, b"")


async def test_a_request_id_is_taken_or_made_and_always_returned(http: httpx.AsyncClient) -> None:
    path = f"/api/v1/users/{uuid4()}"
    named = await http.get(path, headers={"X-Request-ID": "checkout-7:a.b_c"})
    assert named.headers["x-request-id"] == "checkout-7:a.b_c"
    assert named.json()["error"]["request_id"] == "checkout-7:a.b_c"
    made = {(await http.get(path)).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    forged = await http.get(path, headers={"X-Request-ID": 'x" level=error'})
    assert forged.headers["x-request-id"] != 'x" level=error'
