"""A user's whole life through the typed client, against a live server."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from user_service_client import (
    CategoryUpdate,
    Conflict,
    Consent,
    ErrorCode,
    Invalid,
    NotFound,
    NotSent,
    PreferencesUpdate,
    ServerError,
    Unauthenticated,
    UserServiceClient,
    VersionMismatch,
)
from user_service_server.embedded import EmbeddedPostgres

from ..servers import Server, free_port
from .trouble import stopped

PASSWORD = "StrongPass123!"


@pytest.fixture
async def client(server: Server) -> AsyncIterator[UserServiceClient]:
    async with UserServiceClient(server.url, timeout=5) as made:
        yield made


async def test_life_of_a_user(client: UserServiceClient) -> None:
    user = await client.users.create(
        name="John Doe",
        email="John@example.com",
        password=PASSWORD,
        phone="+48221234567",
        external_id="crm-1",
        locale="pl-pl",
        preferences=PreferencesUpdate(push=False),
    )
    assert (user.version, user.email, user.phone) == (1, "John@example.com", "+48221234567")
    assert (user.locale, user.preferences.email, user.preferences.push) == ("pl-PL", True, False)
    assert user.devices == ()
    assert await client.users.get(user.id) == user
    read, etag = await client.users.get_with_etag(user.id)
    assert read == user

    renamed = await client.users.update(user.id, name="John Roe", phone=None, if_version=etag)
    assert (renamed.version, renamed.name, renamed.phone) == (2, "John Roe", None)
    with pytest.raises(VersionMismatch) as mismatch:
        await client.users.update(user.id, name="Too late", if_version=etag)
    assert (mismatch.value.status, mismatch.value.code) == (412, ErrorCode.VERSION_MISMATCH)
    _, current = await client.users.get_with_etag(user.id)
    assert mismatch.value.etag == current != etag
    assert (await client.users.update(user.id, name="John Roe")).version == 2

    preferences = await client.preferences.update(
        user.id,
        quiet_hours_start="22:00",
        quiet_hours_end="07:00",
        timezone="Europe/Warsaw",
        muted_until=datetime(2030, 1, 1, tzinfo=UTC),
        categories={"marketing": CategoryUpdate(email=False)},
        consent=Consent(source="settings_page", policy_version="2026-05"),
        if_version=current,
    )
    assert preferences.effective_timezone == "Europe/Warsaw"
    assert preferences.categories["marketing"].email is False
    assert preferences.push is False, "what was not named keeps its value"
    shown, etag_of_preferences = await client.preferences.get_with_etag(user.id)
    assert shown == preferences == await client.preferences.get(user.id)
    with pytest.raises(VersionMismatch):
        await client.preferences.update(user.id, push=True, if_version=current)
    assert (await client.preferences.update(user.id, muted_until=None)).muted_until is None

    history = [revision async for revision in client.preferences.history(user.id, page_size=2)]
    assert [revision.version for revision in history] == [4, 3, 1]
    assert (history[1].source, history[1].policy_version) == ("settings_page", "2026-05")
    assert "categories.marketing.email" in {change.field for change in history[1].changes}

    phone = await client.devices.register(user.id, token="token-1", platform="ios", app="mail")
    tablet = await client.devices.register(user.id, token="token-2", platform="android")
    again = await client.devices.register(user.id, token="token-1", platform="ios", app="mail")
    assert again.id == phone.id
    assert [device.id for device in (await client.users.get(user.id)).devices] == [
        tablet.id,
        phone.id,
    ]
    assert (await client.devices.update(user.id, tablet.id, active=False)).active is False
    assert {device.id for device in await client.devices.list(user.id)} == {tablet.id, phone.id}
    assert [device.id for device in (await client.users.get(user.id)).devices] == [phone.id]
    with pytest.raises(VersionMismatch):
        await client.devices.remove(user.id, phone.id, if_version=etag_of_preferences)
    await client.devices.remove(user.id, phone.id)
    with pytest.raises(NotFound) as no_device:
        await client.devices.remove(user.id, phone.id)
    assert no_device.value.code == ErrorCode.DEVICE_NOT_FOUND

    before = await client.users.get(user.id)
    await client.users.set_password(user.id, "AnotherPass456!", current_password=PASSWORD)
    with pytest.raises(Unauthenticated) as wrong:
        await client.users.set_password(user.id, "ThirdPass789!", current_password=PASSWORD)
    assert wrong.value.code == ErrorCode.INVALID_CREDENTIALS
    assert await client.users.get(user.id) == before, "a password is no part of the document"

    await client.users.delete(user.id)
    for gone in (
        client.users.get(user.id),
        client.users.update(user.id, name="Nobody"),
        client.users.delete(user.id),
        client.preferences.get(user.id),
        client.devices.list(user.id),
        client.users.set_password(user.id, "FourthPass012!"),
    ):
        with pytest.raises(NotFound) as not_found:
            await gone
        assert (not_found.value.status, not_found.value.code) == (404, ErrorCode.USER_NOT_FOUND)
    with pytest.raises(NotFound):
        [revision async for revision in client.preferences.history(user.id)]
    assert await client.users.lookup(email="john@example.com") == ()
    anew = await client.users.create(name="John", email="john@example.com", password=PASSWORD)
    assert anew.id != user.id


async def test_many_users(client: UserServiceClient) -> None:
    users = [
        await client.users.create(
            name=f"Number {number}",
            email=f"number{number}@example.com",
            password=PASSWORD,
            phone="+48221112233",
            external_id=f"number-{number}",
        )
        for number in range(5)
    ]
    nobody = str(uuid4())
    batch = await client.users.get_many([users[3].id, nobody, users[1].id, users[3].id.upper()])
    assert batch.users == (users[3], users[1])
    assert batch.missing == (nobody,)
    # From the cache now, and the same.
    assert (await client.users.get_many([users[3].id, users[1].id])).users == batch.users

    assert await client.users.lookup(email="NUMBER2@example.com") == (users[2],)
    assert await client.users.lookup(external_id="number-4") == (users[4],)
    assert set(await client.users.lookup(phone="+48221112233")) == set(users)
    assert await client.users.lookup(email="nobody@example.com") == ()

    listed = [user async for user in client.users.list(page_size=2)]
    assert [user for user in listed if user.name.startswith("Number")] == users
    assert len({user.id for user in listed}) == len(listed)


async def test_refusals_have_their_classes(client: UserServiceClient) -> None:
    await client.users.create(
        name="First", email="first@example.com", password=PASSWORD, external_id="first"
    )
    with pytest.raises(Conflict) as email_taken:
        await client.users.create(name="2nd", email="FIRST@example.com", password=PASSWORD)
    assert email_taken.value.code == ErrorCode.EMAIL_TAKEN
    with pytest.raises(Conflict) as id_taken:
        await client.users.create(
            name="3rd", email="third@example.com", password=PASSWORD, external_id="first"
        )
    assert id_taken.value.code == ErrorCode.EXTERNAL_ID_TAKEN
    with pytest.raises(Invalid) as invalid:
        await client.users.create(name="", email="nonsense", password="short", phone="12")
    assert {detail.field for detail in invalid.value.details} == {
        "name",
        "email",
        "password",
        "phone",
    }
    for error in (email_taken.value, id_taken.value, invalid.value):
        assert error.request_id
        assert "first@example.com" not in f"{error!s}{error!r}".lower()
    with pytest.raises(NotFound):
        await client.users.get("not-an-id")


async def test_health(client: UserServiceClient) -> None:
    health = await client.health()
    assert health.status == "healthy"
    assert {name: probe.status for name, probe in health.dependencies.items()} == {
        "postgres": "up",
        "redis": "up",
    }


async def test_server_without_postgres(
    client: UserServiceClient, postgres: EmbeddedPostgres
) -> None:
    user = await client.users.create(name="A", email="cached@example.com", password=PASSWORD)
    async with stopped(postgres):
        assert await client.users.get(user.id) == user
        with pytest.raises(ServerError) as refused:
            await client.users.update(user.id, name="B")
        assert (await client.health()).status == "unhealthy"
    assert refused.value.code == ErrorCode.DEPENDENCY_UNAVAILABLE
    assert refused.value.retry_after is not None


async def test_nobody_listens() -> None:
    async with UserServiceClient(f"http://127.0.0.1:{free_port()}") as client:
        with pytest.raises(NotSent):
            await client.health()
