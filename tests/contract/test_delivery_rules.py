"""The table of a delivery's rules, through the endpoint and through the client."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import httpx
import msgspec
import pytest
from user_service_client import Decision, Invalid, UserServiceClient
from user_service_client.testing import FakeUserService
from user_service_schemas import Catalogue
from user_service_server.app import create_app

from ..delivery_rules import CATALOGUES, NIGHT, STATES, UNTIL, VERDICTS, reason_on, table
from ..engines import settings_for
from .conftest import PATIENCE
from .people import (
    FEEDBACK,
    NOBODY,
    PASSWORD,
    RESOLVE,
    USERS,
    assert_refused,
    data_of,
    new_email,
    new_token,
)


class Catalogued(httpx.AsyncBaseTransport):
    """The fake, as it is with a catalogue."""

    def __init__(self, fake: FakeUserService, catalogue: Catalogue | None) -> None:
        self._fake = fake
        self._catalogue = catalogue

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._fake.use_categories(self._catalogue)
        return await self._fake.handle_async_request(request)


class Watched(httpx.AsyncBaseTransport):
    """Keeps what was asked; `rules` are those of a newer service, which documents are of."""

    def __init__(self, service: httpx.AsyncBaseTransport, rules: int = 1) -> None:
        self._service = service
        self._rules = rules
        self.asked: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.path)
        answer = await self._service.handle_async_request(request)
        body = (await answer.aread()).replace(b'"rules":1', b'"rules":%d' % self._rules)
        headers = {name: said for name, said in answer.headers.items() if name != "content-length"}
        return httpx.Response(answer.status_code, headers=headers, content=body)


@pytest.fixture(scope="module", params=["fake", "server"])
def engines_of_it(request: pytest.FixtureRequest) -> tuple[str, str] | None:
    """The database and the Redis of a real server; None: the fake has neither."""
    if request.param == "fake":
        return None
    return request.getfixturevalue("database_url"), request.getfixturevalue("redis_url")


@pytest.fixture(scope="module")
async def services(
    engines_of_it: tuple[str, str] | None,
) -> AsyncIterator[Mapping[str, httpx.AsyncBaseTransport]]:
    """One service, as it is with each of the catalogues: what users said is the same."""
    if engines_of_it is None:
        fake = FakeUserService()
        yield {name: Catalogued(fake, catalogue) for name, catalogue in CATALOGUES.items()}
        return
    async with AsyncExitStack() as stack:
        started: dict[str, httpx.AsyncBaseTransport] = {}
        for name, catalogue in CATALOGUES.items():
            said = catalogue and {"CATEGORIES": msgspec.json.encode(catalogue.categories).decode()}
            app = create_app(settings_for(*engines_of_it, **(said or {})))
            await stack.enter_async_context(app.lifespan())
            started[name] = httpx.ASGITransport(app)  # type: ignore[arg-type]  # Litestar's ASGI types are narrower
        yield started


@pytest.fixture(scope="module")
async def people(services: Mapping[str, httpx.AsyncBaseTransport]) -> dict[str, str]:
    """Somebody in each state, who got there before there was a catalogue."""
    ids = {"unknown": NOBODY}
    async with httpx.AsyncClient(
        transport=services["none"], base_url="http://test", timeout=PATIENCE
    ) as raw:
        for state, said in STATES.items():
            if state == "unknown":
                continue
            body = {
                "name": "Ada",
                "email": new_email(),
                "password": PASSWORD,
                "preferences": json.loads(msgspec.json.encode(said)),
            }
            user = data_of(await raw.post(f"{USERS}/", json=body))
            ids[state] = user["id"]
            if state.startswith("unreachable"):
                bounced = {"channel": "email", "address": user["email"], "reason": "hard_bounce"}
                items = [bounced | {"at": "2100-01-01T00:00:00Z"}]
                assert data_of(await raw.post(FEEDBACK, json={"items": items}))
            else:
                device = {"token": new_token(), "platform": "ios"}
                assert data_of(await raw.post(f"{USERS}/{user['id']}/devices", json=device))
    return ids


def client_of(transport: httpx.AsyncBaseTransport) -> UserServiceClient:
    return UserServiceClient(
        "http://test", transport=transport, timeout=PATIENCE, attempt_timeout=PATIENCE
    )


@pytest.mark.parametrize(("channel", "state", "catalogue", "priority", "reason"), table())
async def test_the_first_rule_that_holds_decides(
    services: Mapping[str, httpx.AsyncBaseTransport],
    people: dict[str, str],
    *,
    channel: Any,
    state: str,
    catalogue: str,
    priority: Any,
    reason: str,
) -> None:
    user_id, service = people[state], services[catalogue]
    said: dict[str, Any] = {"channel": channel, "category": "news", "priority": priority}
    by_endpoint = await decided_by_endpoint(service, user_id, said)
    if by_endpoint is None:
        assert reason == "refused"
    else:
        reason = reason_on(channel, reason)
        assert by_endpoint.reason == reason
        assert by_endpoint.decision == VERDICTS.get(reason, "suppress")
        assert by_endpoint.deferred_until == UNTIL.get(reason)
        assert (by_endpoint.user_id, by_endpoint.version is None) == (user_id, state == "unknown")
        allowed = by_endpoint.decision == "allow"
        assert (by_endpoint.email is not None) == (allowed and channel == "email")
        assert len(by_endpoint.devices) == (allowed and channel == "push")
        assert len(by_endpoint.explanation) == 7

    # Of a newer service the client knows the documents, and not what to make of them.
    for rules in (1, 2):
        watched = Watched(service, rules)
        async with client_of(watched) as client:
            await client.users.get_many([user_id])
            watched.asked.clear()
            resolving = client.deliveries.resolve(user_id, at=NIGHT, explain=True, **said)
            if state == "unknown" and by_endpoint is None:
                # Who has no document cannot know of a catalogue.
                assert (await resolving).reason == "user_not_found"
            elif by_endpoint is None:
                with pytest.raises(Invalid) as refused:
                    await resolving
                assert [detail.field for detail in refused.value.details] == ["priority"]
            else:
                assert await resolving == by_endpoint
        assert watched.asked.count(RESOLVE) == (rules == 2 and state != "unknown")
        if priority != "critical":
            assert len(watched.asked) == watched.asked.count(RESOLVE), "it has a copy"


async def decided_by_endpoint(
    service: httpx.AsyncBaseTransport, user_id: str, said: dict[str, Any]
) -> Decision | None:
    """Return what the endpoint decides; None: it refuses the priority."""
    body = {**said, "user_ids": [user_id], "at": NIGHT.isoformat(), "explain": True}
    async with httpx.AsyncClient(
        transport=service, base_url="http://test", timeout=PATIENCE
    ) as raw:
        answer = await raw.post(RESOLVE, json=body)
    if answer.status_code == 422:
        assert_refused(answer, 422, "validation_failed", "priority")
        return None
    (decision,) = msgspec.convert(data_of(answer), list[Decision])
    return decision


def test_no_state_is_forgotten() -> None:
    cases = {tuple(param.values[:4]) for param in table()}
    wanted = itertools.product(
        ("email", "push"), STATES, CATALOGUES, ("normal", "urgent", "critical")
    )
    assert cases == set(wanted)
