"""Versions as conditions: `If-Match`, `If-None-Match`, and writes that change nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from user_service_server.settings import Settings

from ..engines import settings_for
from .test_users import assert_failed, changes_of, fetch, register

NEW_PASSWORD = "Another-Pass-456"


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    """Without passwords, which take most of a registration's time, and with patience with Redis.

    A machine that is busy is not the trouble that is tested here.
    """
    return settings_for(database_url, redis_url, PASSWORD_REQUIRED="false", REDIS_TIMEOUT_MS="5000")


@dataclass(frozen=True)
class Call:
    """A write to a user, at a path below the user's.

    `{device}` in the path is the id of the user's device, `{token}` in the body its token.
    """

    method: str
    path: str = ""
    body: dict[str, Any] | None = None

    async def send(
        self, http: httpx.AsyncClient, user: dict[str, Any], **headers: str
    ) -> httpx.Response:
        (device,) = user["devices"]
        return await http.request(
            self.method,
            f"/api/v1/users/{user['id']}{self.path.format(device=device['id'])}",
            json=self.body
            and {
                name: value.format(token=device["token"]) if isinstance(value, str) else value
                for name, value in self.body.items()
            },
            headers={name.replace("_", "-"): value for name, value in headers.items()},
        )


WRITES = {
    "patch-user": Call("PATCH", "", {"name": "Changed"}),
    "put-user": Call("PUT", "", {"name": "Changed"}),
    "delete-user": Call("DELETE"),
    "patch-preferences": Call("PATCH", "/preferences", {"push": False}),
    "put-preferences": Call("PUT", "/preferences", {"push": False}),
    "register-device": Call("POST", "/devices", {"token": "new-{token}", "platform": "ios"}),
    "register-known-device": Call("POST", "/devices", {"token": "{token}", "platform": "web"}),
    "patch-device": Call("PATCH", "/devices/{device}", {"active": False}),
    "delete-device": Call("DELETE", "/devices/{device}"),
    "set-password": Call("PUT", "/password", {"password": NEW_PASSWORD}),
}
every_write = pytest.mark.parametrize(
    "write", [pytest.param(write, id=name) for name, write in WRITES.items()]
)


async def with_device(http: httpx.AsyncClient) -> tuple[dict[str, Any], str]:
    """Register somebody with one device; returns the document and its entity tag."""
    user = await register(http, password=None)
    path = f"/api/v1/users/{user['id']}"
    device = {"token": f"of-{user['id']}", "platform": "ios"}
    await http.post(f"{path}/devices", json=device)
    answer = await http.get(path)
    return answer.json()["data"], answer.headers["etag"]


@every_write
async def test_a_write_on_another_version_is_refused_and_changes_nothing(
    http: httpx.AsyncClient, database_url: str, write: Call
) -> None:
    user, etag = await with_device(http)
    before = await changes_of(database_url, user["id"])
    stale = etag.replace(f'.{user["version"]}"', f'.{user["version"] - 1}"')
    assert stale != etag
    answer = await write.send(http, user, If_Match=stale)
    assert_failed(answer, 412, "version_mismatch")
    assert answer.headers["etag"] == etag
    assert await fetch(http, user["id"]) == user
    assert await changes_of(database_url, user["id"]) == before


@every_write
async def test_a_write_on_the_current_version_is_done(
    http: httpx.AsyncClient, database_url: str, write: Call
) -> None:
    user, etag = await with_device(http)
    before = await changes_of(database_url, user["id"])
    answer = await write.send(http, user, If_Match=etag)
    assert answer.is_success, answer.text
    assert len(await changes_of(database_url, user["id"])) == len(before) + 1


@pytest.mark.parametrize(
    ("condition", "status"),
    [
        pytest.param("{etag}", 200, id="exact"),
        pytest.param("W/{etag}", 200, id="weakened-by-a-proxy"),
        pytest.param('"0.0.1", {etag}', 200, id="one-of-several"),
        pytest.param("*", 200, id="any"),
        pytest.param('"{epoch}.0000.{version}"', 200, id="another-format"),
        pytest.param('"00000000.{format}.{version}"', 412, id="another-epoch"),
        pytest.param('"{version}"', 412, id="not-a-tag-of-ours"),
        pytest.param("", 412, id="empty"),
    ],
)
async def test_if_match_compares_epoch_and_version(
    http: httpx.AsyncClient, condition: str, status: int
) -> None:
    user, etag = await with_device(http)
    epoch, shape, version = etag.strip('"').split(".")
    header = condition.format(etag=etag, epoch=epoch, format=shape, version=version)
    answer = await WRITES["patch-user"].send(http, user, If_Match=header)
    assert answer.status_code == status, answer.text


async def test_of_ten_writes_on_one_version_one_is_done(http: httpx.AsyncClient) -> None:
    user, etag = await with_device(http)
    kinds = ("patch-user", "patch-preferences", "patch-device", "delete-device", "put-user")
    answers = await asyncio.gather(
        *(WRITES[kind].send(http, user, If_Match=etag) for kind in kinds * 2)
    )
    assert Counter(answer.status_code for answer in answers) == {200: 1, 412: 9}
    (done,) = (answer.headers["etag"] for answer in answers if answer.is_success)
    assert {answer.headers["etag"] for answer in answers} == {done}
    assert (await fetch(http, user["id"]))["version"] == user["version"] + 1


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(Call("PATCH", "", {"name": "Jane Roe"}), id="same-name"),
        pytest.param(Call("PUT", "", {"phone": None, "locale": None}), id="still-null"),
        pytest.param(Call("PATCH", "", {}), id="nothing-said"),
        pytest.param(Call("PUT", "/preferences", {}), id="no-preference-said"),
        pytest.param(
            Call("PATCH", "/preferences", {"email": True, "push": True, "timezone": None}),
            id="same-preferences",
        ),
        pytest.param(
            Call("PATCH", "/preferences", {"categories": {"unheard": None}}), id="null-of-nothing"
        ),
        pytest.param(
            Call("POST", "/devices", {"token": "{token}", "platform": "ios"}), id="own-device"
        ),
        pytest.param(Call("PATCH", "/devices/{device}", {"active": True}), id="active-device"),
    ],
)
@pytest.mark.parametrize("conditional", [False, True], ids=["plain", "if-match"])
async def test_a_write_that_changes_nothing_keeps_the_version(
    http: httpx.AsyncClient, database_url: str, write: Call, conditional: bool
) -> None:
    user, etag = await with_device(http)
    before = await changes_of(database_url, user["id"])
    answer = await write.send(http, user, **({"If_Match": etag} if conditional else {}))
    assert answer.status_code == 200, answer.text
    assert answer.headers["etag"] == etag
    assert await fetch(http, user["id"]) == user
    assert await changes_of(database_url, user["id"]) == before


async def test_each_version_has_one_row_of_the_right_kind(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user, _ = await with_device(http)
    moved = {"token": user["devices"][0]["token"], "platform": "ios"}
    other = await register(http, password=None)
    await http.post(f"/api/v1/users/{other['id']}/devices", json=moved)
    other = await fetch(http, other["id"])
    for kind in (
        *("patch-user", "set-password", "put-preferences", "register-known-device"),
        *("patch-device", "delete-device", "delete-user"),
    ):
        assert (await WRITES[kind].send(http, other)).is_success
    assert await changes_of(database_url, user["id"]) == [
        *((1, "user.created"), (2, "device.registered"), (3, "device.moved")),
    ]
    assert await changes_of(database_url, other["id"]) == [
        *((1, "user.created"), (2, "device.moved"), (3, "user.updated")),
        *((3, "password.updated"), (4, "preferences.updated"), (5, "device.updated")),
        *((6, "device.updated"), (7, "device.removed"), (8, "user.deleted")),
    ]


async def test_a_new_password_is_logged_and_raises_no_version(
    http: httpx.AsyncClient, database_url: str
) -> None:
    user, etag = await with_device(http)
    before = await changes_of(database_url, user["id"])
    answer = await WRITES["set-password"].send(http, user, If_Match=etag)
    assert (answer.status_code, answer.json()["data"]) == (200, None)
    assert await fetch(http, user["id"]) == user
    after = await changes_of(database_url, user["id"])
    assert after == [*before, (user["version"], "password.updated")]


async def test_every_answer_that_shows_the_user_has_the_same_tag(http: httpx.AsyncClient) -> None:
    user, _ = await with_device(http)
    path = f"/api/v1/users/{user['id']}"
    patched = await http.patch(path, json={"name": "Tagged"})
    same = [
        patched,
        await http.get(path),
        await http.head(path),
        await http.put(path, json={"name": "Tagged"}),
        await http.get(f"{path}/preferences"),
        await http.put(f"{path}/preferences", json={}),
        await http.get(f"{path}/devices"),
    ]
    assert {answer.headers["etag"] for answer in same} == {patched.headers["etag"]}
    version = patched.json()["data"]["version"]
    assert patched.headers["etag"].endswith(f'.{version}"')


@pytest.mark.parametrize("rest", ["", "/preferences"], ids=["user", "preferences"])
async def test_a_copy_that_is_still_right_is_not_sent_again(
    http: httpx.AsyncClient, rest: str
) -> None:
    user, etag = await with_device(http)
    path = f"/api/v1/users/{user['id']}{rest}"
    for held in (etag, f"W/{etag}", f'"0.0.0", {etag}', "*"):
        answer = await http.get(path, headers={"If-None-Match": held})
        assert (answer.status_code, answer.content) == (304, b""), held
        assert answer.headers["etag"] == etag
    epoch, shape, version = etag.strip('"').split(".")
    for other in (
        f'"{epoch}.{shape}.{int(version) - 1}"',
        f'"{epoch}.00000000.{version}"',
        f'"00000000.{shape}.{version}"',
        f'"{version}"',
    ):
        answer = await http.get(path, headers={"If-None-Match": other})
        assert answer.status_code == 200, other
        assert answer.json()["data"] is not None
    await http.patch(f"/api/v1/users/{user['id']}", json={"name": "Newer"})
    assert (await http.get(path, headers={"If-None-Match": etag})).status_code == 200
