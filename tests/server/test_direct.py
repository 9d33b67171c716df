"""A user by id is answered past Litestar: as Litestar answers what is written otherwise."""

from __future__ import annotations

from itertools import product

import httpx
import pytest
from user_service_schemas import Scope
from user_service_server.settings import Settings

from ..engines import settings_for
from ..keys import EVERYTHING, REQUIRED, authorized, make_key, showing
from .test_users import register

OF_EACH = {"x-request-id", "ratelimit"}
"""The headers that are different with each answer."""
NOBODY = "01a205c7-a743-7a16-a135-c839ba84936e"


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    return settings_for(database_url, redis_url, PASSWORD_REQUIRED="false", **REQUIRED)


def comparable(answer: httpx.Response) -> tuple[int, list[tuple[str, str]], bytes]:
    """Return what of an answer must be the same."""
    headers = [(name, value) for name, value in answer.headers.items() if name not in OF_EACH]
    request_id = answer.headers["x-request-id"].encode()
    return answer.status_code, sorted(headers), answer.content.replace(request_id, b"")


async def test_a_user_is_answered_alike_with_and_without_litestar(
    http: httpx.AsyncClient, settings: Settings
) -> None:
    """Capitals are Litestar's to read, so the same user by them is answered by its route."""
    key = await make_key(settings, "reader", *EVERYTHING)
    writer = await make_key(settings, "writer", Scope.USERS_WRITE)
    authorized(http, key)
    user = await register(http, password=None)
    etag = (await http.get(f"/api/v1/users/{user['id']}")).headers["etag"]
    variants = [
        {},
        {"Accept": "application/problem+json"},
        {"X-Min-Version": "1"},
        {"X-Min-Version": "one"},
        {"If-None-Match": etag},
        {"If-None-Match": f'"0.0.1", W/{etag}'},
        {"If-None-Match": '"0.0.1"'},
        {"X-Request-ID": "of-the-caller"},
        {"Authorization": ""},
        {"Authorization": "Bearer nobody"},
        {**showing(writer), "Accept": "application/problem+json"},
    ]
    statuses = set()
    for user_id, headers in product((user["id"], NOBODY), variants):
        path = f"/api/v1/users/{user_id}"
        direct, head = await http.get(path, headers=headers), await http.head(path, headers=headers)
        routed = await http.get(f"/api/v1/users/{user_id.upper()}", headers=headers)
        assert comparable(direct) == comparable(routed)
        assert comparable(head) == (*comparable(direct)[:2], b"")
        statuses.add(direct.status_code)
    assert statuses == {200, 304, 401, 403, 404, 422}
