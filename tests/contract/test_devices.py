"""Devices, by the fake and by the server alike."""

from __future__ import annotations

import httpx
import pytest
from user_service_client import NotFound, User, UserServiceClient, VersionMismatch

from .people import (
    NOBODY,
    PASSWORD,
    USERS,
    assert_refused,
    data_of,
    new_email,
    new_token,
    version_of,
)


@pytest.fixture
async def ada(client: UserServiceClient) -> User:
    return await client.users.create(name="Ada", email=new_email(), password=PASSWORD)


@pytest.fixture
async def bob(client: UserServiceClient) -> User:
    return await client.users.create(name="Bob", email=new_email(), password=PASSWORD)


async def test_a_new_token_is_201_and_a_known_one_200(raw: httpx.AsyncClient, ada: User) -> None:
    path, body = f"{USERS}/{ada.id}/devices", {"token": new_token(), "platform": "ios"}
    first = await raw.post(path, json=body)
    assert (first.status_code, version_of(first)) == (201, 2)
    assert data_of(first) | body == data_of(first)
    again = await raw.post(path, json=body)
    assert (again.status_code, version_of(again)) == (200, 2), "it was seen, and no more"
    assert data_of(again)["id"] == data_of(first)["id"]
    assert data_of(again)["last_seen_at"] > data_of(first)["last_seen_at"]
    changed = await raw.post(path, json=body | {"app": "mail"})
    assert (changed.status_code, version_of(changed)) == (200, 3)
    assert data_of(changed)["registered_at"] == data_of(first)["registered_at"]


async def test_the_document_shows_active_devices_newest_first(
    client: UserServiceClient, ada: User
) -> None:
    old = await client.devices.register(ada.id, token=new_token(), platform="ios")
    off = await client.devices.register(ada.id, token=new_token(), platform="web", active=False)
    new = await client.devices.register(ada.id, token=new_token(), platform="android")
    assert [one.id for one in (await client.users.get(ada.id)).devices] == [new.id, old.id]
    listed = await client.devices.list(ada.id)
    assert [one.id for one in listed] == [new.id, off.id, old.id]
    assert [one.inactive_reason for one in listed] == [None, "deactivated", None]
    # Switched on again, it is the newest.
    await client.devices.update(ada.id, old.id, active=False)
    await client.devices.update(ada.id, old.id, active=True)
    assert [one.id for one in (await client.users.get(ada.id)).devices] == [old.id, new.id]


async def test_a_token_moves_to_who_logged_in_last(
    client: UserServiceClient, raw: httpx.AsyncClient, ada: User, bob: User
) -> None:
    token = new_token()
    before = await client.devices.register(ada.id, token=token, platform="ios")
    after = await client.devices.register(bob.id, token=token, platform="ios")
    assert after.id != before.id
    assert await client.devices.list(ada.id) == ()
    # Not through the client, which cannot know of the other user and may have a copy.
    versions = [version_of(await raw.get(f"{USERS}/{user.id}")) for user in (ada, bob)]
    assert versions == [3, 2]
    with pytest.raises(NotFound):
        await client.devices.remove(ada.id, before.id)


async def test_one_subscription_is_one_device(client: UserServiceClient, ada: User) -> None:
    endpoint = f"https://push.example.com/{new_token()}"
    first = await client.devices.register(
        ada.id, token=f'{{"endpoint":"{endpoint}","keys":{{"a":"1"}}}}', platform="web"
    )
    renewed = await client.devices.register(
        ada.id, token=f'{{"keys":{{"a":"2"}},"endpoint":"{endpoint}"}}', platform="web"
    )
    assert renewed.id == first.id
    assert (await client.users.get(ada.id)).version == 3


async def test_the_least_recently_seen_of_21_is_evicted(
    client: UserServiceClient, ada: User
) -> None:
    tokens = [new_token() for _ in range(21)]
    for token in tokens[:20]:
        await client.devices.register(ada.id, token=token, platform="ios")
    await client.devices.register(ada.id, token=tokens[0], platform="ios")
    await client.devices.register(ada.id, token=tokens[20], platform="ios")
    listed = {one.token: one for one in await client.devices.list(ada.id)}
    off = {token: one.inactive_reason for token, one in listed.items() if not one.active}
    assert off == {tokens[1]: "evicted"}
    assert (await client.users.get(ada.id)).version == 22


async def test_switching_off_and_removing(client: UserServiceClient, ada: User) -> None:
    device = await client.devices.register(ada.id, token=new_token(), platform="ios")
    off = await client.devices.update(ada.id, device.id, active=False)
    assert (off.active, off.inactive_reason) == (False, "deactivated")
    assert await client.devices.update(ada.id, device.id, active=False) == off
    assert (await client.users.get(ada.id)).version == 3
    await client.devices.remove(ada.id, device.id)
    assert (await client.users.get(ada.id)).version == 4
    for gone in (
        client.devices.remove(ada.id, device.id),
        client.devices.update(ada.id, device.id, active=True),
    ):
        with pytest.raises(NotFound) as refused:
            await gone
        assert refused.value.code == "device_not_found"


async def test_devices_are_conditional(client: UserServiceClient, ada: User) -> None:
    _, etag = await client.users.get_with_etag(ada.id)
    token = new_token()
    device = await client.devices.register(ada.id, token=token, platform="ios", if_version=etag)
    for late in (
        client.devices.register(ada.id, token=token, platform="web", if_version=etag),
        client.devices.update(ada.id, device.id, active=False, if_version=etag),
        client.devices.remove(ada.id, device.id, if_version=etag),
    ):
        with pytest.raises(VersionMismatch):
            await late
    assert await client.devices.list(ada.id) == (device,)


async def test_what_is_wrong_with_a_device_is_named(raw: httpx.AsyncClient, ada: User) -> None:
    path = f"{USERS}/{ada.id}/devices"
    answer = await raw.post(path, json={"token": "", "platform": "phone", "x": 1})
    assert_refused(answer, 422, "validation_failed", "token", "platform", "x")
    assert_refused(await raw.delete(f"{path}/x"), 404, "device_not_found", "device_id")
    assert_refused(await raw.delete(f"{path}/{NOBODY}"), 404, "device_not_found")
    assert_refused(await raw.get(f"{USERS}/{NOBODY}/devices"), 404, "user_not_found")
