"""Users, by the fake and by the server alike."""

from __future__ import annotations

from uuid import UUID

import httpx
import pytest
from user_service_client import (
    Conflict,
    ErrorCode,
    Invalid,
    NotFound,
    PreferencesUpdate,
    Unauthenticated,
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


async def test_registration_says_where_the_user_is(raw: httpx.AsyncClient) -> None:
    body = {"name": " Ada ", "email": "ADA@example.com", "password": PASSWORD, "locale": "pl-pl"}
    answer = await raw.post(f"{USERS}/", json=body)
    user = data_of(answer)
    assert answer.status_code == 201
    assert answer.headers["location"] == f"{USERS}/{user['id']}"
    assert version_of(answer) == user["version"] == 1
    assert (user["name"], user["email"], user["locale"]) == ("Ada", "ADA@example.com", "pl-PL")
    assert user["preferences"] == {
        "email": True,
        "push": True,
        "quiet_hours_start": None,
        "quiet_hours_end": None,
        "timezone": None,
        "effective_timezone": "UTC",
        "muted_until": None,
        "categories": {},
    }
    assert user["created_at"] == user["updated_at"]
    assert PASSWORD not in answer.text
    assert data_of(await raw.get(answer.headers["location"])) == user


async def test_ids_are_uuids_of_version_7_in_the_order_of_registration(
    raw: httpx.AsyncClient,
) -> None:
    ids = [(await register(raw))["id"] for _ in range(5)]
    assert {UUID(user_id).version for user_id in ids} == {7}
    assert {UUID(user_id).variant for user_id in ids} == {UUID(NOBODY).variant}
    assert ids == sorted(ids)


async def test_what_a_registration_lacks_is_named_at_once(client: UserServiceClient) -> None:
    with pytest.raises(Invalid) as refused:
        await client.users.create(
            name="",
            email="nobody@nowhere",
            password="password1",
            phone="+1",
            preferences=PreferencesUpdate(quiet_hours_start="22:00"),
        )
    assert {detail.field for detail in refused.value.details} == {
        "name",
        "email",
        "password",
        "phone",
        "preferences.quiet_hours_end",
    }


async def test_email_and_external_id_are_unique(client: UserServiceClient) -> None:
    email, external_id = new_email(), new_email()
    first = await client.users.create(
        name="Ada", email=email, password=PASSWORD, external_id=external_id
    )
    other = await client.users.create(name="Bob", email=new_email(), password=PASSWORD)
    for taken in (
        client.users.create(name="Eve", email=email.upper(), password=PASSWORD),
        client.users.update(other.id, email=email.upper()),
    ):
        with pytest.raises(Conflict) as refused:
            await taken
        assert refused.value.code == ErrorCode.EMAIL_TAKEN
    for taken in (
        client.users.create(
            name="Eve", email=new_email(), password=PASSWORD, external_id=external_id
        ),
        client.users.update(other.id, external_id=external_id),
    ):
        with pytest.raises(Conflict) as refused:
            await taken
        assert refused.value.code == ErrorCode.EXTERNAL_ID_TAKEN
    assert await client.users.get(other.id) == other
    # One's own is free, in whatever case, and so is what somebody has given up.
    assert (await client.users.update(first.id, email=email.upper())).version == 2
    await client.users.update(first.id, external_id=None)
    assert (await client.users.update(other.id, external_id=external_id)).version == 2


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_profile_updates_merge(raw: httpx.AsyncClient, method: str) -> None:
    user = await register(raw, phone="+48221234567")
    path = f"{USERS}/{user['id']}"
    answer = await raw.request(method, path, json={"name": "Bob"})
    changed = data_of(answer)
    assert changed == user | {"name": "Bob", "version": 2, "updated_at": changed["updated_at"]}
    assert changed["updated_at"] > user["updated_at"]
    assert version_of(answer) == 2
    cleared = data_of(await raw.request(method, path, json={"phone": None}))
    assert (cleared["phone"], cleared["name"], cleared["version"]) == (None, "Bob", 3)
    for nothing in ({}, {"name": "Bob"}, {"phone": None}):
        same = await raw.request(method, path, json=nothing)
        assert (data_of(same), version_of(same)) == (cleared, 3)
    assert_refused(
        await raw.request(method, path, json={"name": None, "age": 3}),
        422,
        "validation_failed",
        "name",
        "age",
    )
    assert data_of(await raw.get(path)) == cleared


async def test_batch_keeps_the_order_and_names_who_is_missing(client: UserServiceClient) -> None:
    users = [
        await client.users.create(name="Ada", email=new_email(), password=PASSWORD)
        for _ in range(3)
    ]
    batch = await client.users.get_many([users[2].id, NOBODY, users[0].id.upper(), users[2].id])
    assert batch.users == (users[2], users[0])
    assert batch.missing == (NOBODY,)


async def test_batch_refuses_what_is_no_id_and_too_many(raw: httpx.AsyncClient) -> None:
    answer = await raw.post(f"{USERS}/batch", json={"ids": [NOBODY, "x"]})
    assert_refused(answer, 422, "validation_failed", "ids[1]")
    answer = await raw.post(f"{USERS}/batch", json={"ids": [NOBODY] * 1001})
    assert_refused(answer, 422, "validation_failed", "ids")


async def test_lookup_finds_by_each_of_three(client: UserServiceClient) -> None:
    email, external_id = new_email(), new_email()
    ada = await client.users.create(
        name="Ada", email=email, password=PASSWORD, phone="+48223334455", external_id=external_id
    )
    bob = await client.users.create(
        name="Bob", email=new_email(), password=PASSWORD, phone="+48223334455"
    )
    assert await client.users.lookup(email=email.upper()) == (ada,)
    assert await client.users.lookup(external_id=external_id) == (ada,)
    assert await client.users.lookup(phone="+48223334455") == (ada, bob)
    assert await client.users.lookup(email=new_email()) == ()
    with pytest.raises(Invalid):
        await client.users.lookup(email="nobody@nowhere")


async def test_list_pages_through_all(client: UserServiceClient, raw: httpx.AsyncClient) -> None:
    made = [await client.users.create(name="A", email=new_email(), password=PASSWORD) for _ in "12"]
    listed = [user async for user in client.users.list(page_size=1)]
    assert [user for user in listed if user in made] == made
    assert [user.id for user in listed] == sorted({user.id for user in listed})
    whole = data_of(await raw.get(USERS))
    assert (len(whole["items"]), whole["next_cursor"]) == (len(listed), None)


@pytest.mark.parametrize("cursor", ["", "zz", "é", "dXNlcnM6eA"])
async def test_a_cursor_of_another_listing_is_refused(raw: httpx.AsyncClient, cursor: str) -> None:
    assert_refused(await raw.get(USERS, params={"cursor": cursor}), 400, "invalid_cursor")


@pytest.mark.parametrize("limit", ["0", "201", "abc"])
async def test_a_limit_out_of_range_is_refused(raw: httpx.AsyncClient, limit: str) -> None:
    answer = await raw.get(USERS, params={"limit": limit})
    assert_refused(answer, 422, "validation_failed", "limit")


async def test_an_erased_user_is_nobody(client: UserServiceClient) -> None:
    email = new_email()
    user = await client.users.create(name="Ada", email=email, password=PASSWORD)
    await client.devices.register(user.id, token=email, platform="ios")
    await client.users.delete(user.id)
    for gone in (
        client.users.get(user.id),
        client.users.update(user.id, name="Bob"),
        client.users.delete(user.id),
        client.users.set_password(user.id, "Another-Pass-1"),
        client.preferences.get(user.id),
        client.preferences.update(user.id, push=False),
        client.preferences.history(user.id).__anext__(),
        client.devices.list(user.id),
        client.devices.register(user.id, token=email, platform="ios"),
        client.devices.update(user.id, NOBODY, active=False),
        client.devices.remove(user.id, NOBODY),
    ):
        with pytest.raises(NotFound) as refused:
            await gone
        assert refused.value.code == ErrorCode.USER_NOT_FOUND
    assert await client.users.lookup(email=email) == ()
    assert user.id not in {user.id async for user in client.users.list()}
    anew = await client.users.create(name="Ada", email=email, password=PASSWORD)
    assert anew.id != user.id
    assert anew.devices == ()


async def test_a_password_is_set_if_the_current_one_is_right(client: UserServiceClient) -> None:
    user = await client.users.create(name="Ada", email=new_email(), password=PASSWORD)
    await client.users.set_password(user.id, "Another-Pass-1", current_password=PASSWORD)
    with pytest.raises(Unauthenticated) as wrong:
        await client.users.set_password(user.id, "Another-Pass-2", current_password=PASSWORD)
    assert wrong.value.code == ErrorCode.INVALID_CREDENTIALS
    await client.users.set_password(user.id, "Another-Pass-3")
    with pytest.raises(Invalid):
        await client.users.set_password(user.id, user.email)
    assert await client.users.get(user.id) == user, "it is no part of the document"


async def test_whose_a_password_is(client: UserServiceClient) -> None:
    user = await client.users.create(name="Ada", email=new_email(), password=PASSWORD)
    assert await client.credentials.verify(user.email.upper(), PASSWORD) == user.id
    for email, password in (
        (user.email, "Wrong-Pass-1"),
        (user.email, ""),
        (new_email(), PASSWORD),
    ):
        with pytest.raises(Unauthenticated) as wrong:
            await client.credentials.verify(email, password)
        assert wrong.value.code == ErrorCode.INVALID_CREDENTIALS
    await client.users.set_password(user.id, "Another-Pass-1")
    assert await client.credentials.verify(user.email, "Another-Pass-1") == user.id
    await client.users.delete(user.id)
    with pytest.raises(Unauthenticated):
        await client.credentials.verify(user.email, "Another-Pass-1")


async def test_ids_are_found_in_any_case_and_with_a_slash(raw: httpx.AsyncClient) -> None:
    user = await register(raw)
    for path in (f"{USERS}/{user['id'].upper()}", f"{USERS}/{user['id']}/"):
        assert data_of(await raw.get(path)) == user
    assert_refused(await raw.get(f"{USERS}/not-an-id"), 404, "user_not_found", "user_id")
    assert_refused(await raw.get(f"{USERS}/{NOBODY}"), 404, "user_not_found")


async def test_a_write_on_another_version_is_refused(client: UserServiceClient) -> None:
    user = await client.users.create(name="Ada", email=new_email(), password=PASSWORD)
    _, etag = await client.users.get_with_etag(user.id)
    assert (await client.users.update(user.id, name="Bob", if_version=etag)).version == 2
    with pytest.raises(VersionMismatch) as refused:
        await client.users.update(user.id, name="Eve", if_version=etag)
    _, current = await client.users.get_with_etag(user.id)
    assert refused.value.etag == current != etag
    assert (await client.users.get(user.id)).name == "Bob"
