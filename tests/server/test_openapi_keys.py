"""The OpenAPI document with keys: what is described is what a caller gets, by what it may do.

The long form of this is in `tests/chaos/test_openapi_long.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import httpx
import hypothesis
import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, Phase
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from user_service_schemas import Scope
from user_service_server.app import create_app
from user_service_server.settings import Settings

from ..engines import settings_for
from ..keys import EVERYTHING, REQUIRED, make_key, showing
from .test_openapi import AnyOperation, Caller, exercise, someone

pytestmark = pytest.mark.usefixtures("cheap_passwords")

MARK = "zqxjkvzqxjkv"
"""In all that is known of somebody whom no caller asks for."""
few = hypothesis.settings(
    max_examples=3,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class Patient(Caller):
    """Asks again where there was no time: a busy machine is late, and says so with a 503."""

    def __call__(self, method: str, url: str, **options: Any) -> httpx.Response:
        tries = 2
        while (answer := super().__call__(method, url, **options)).status_code == 503 and tries:
            tries -= 1
        return answer


class Keyed:
    """An app that wants keys, a caller for each scope and one for all, and somebody marked."""

    def __init__(self, call: Callable[[str], Caller], keys: dict[str, str]) -> None:
        self.callers = {name: call(key) for name, key in keys.items()}
        everything = self.callers["everything"]
        jane = {
            "name": f"Jane {MARK}",
            "email": f"{MARK}@example.com",
            "password": "Strong-Pass-123!",
            "external_id": f"crm {MARK}",
        }
        user = everything("POST", "/api/v1/users/", json=jane).json()["data"]["id"]
        phone = {"token": MARK, "platform": "ios"}
        everything("POST", f"/api/v1/users/{user}/devices", json=phone)
        schema = schemathesis.openapi.from_dict(everything("GET", "/openapi.json").json())
        found = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
        self.operations = [
            o for o in found if o.path.startswith("/api/") and "stream" not in o.path
        ]

    def exercise(
        self, name: str, operation: AnyOperation, mode: GenerationMode, search: hypothesis.settings
    ) -> None:
        """Call an operation with one of the keys, and see that it gets what that may."""
        (requirement,) = operation.definition.raw["security"]
        is_allowed = name in {"everything", *requirement["serviceKey"]}

        def check(answer: httpx.Response) -> None:
            assert answer.status_code < 500, answer.text
            if not is_allowed:
                # What is no path of the operation is refused before anybody asks who calls.
                expected = {403: "forbidden", 404: "route_not_found", 405: "method_not_allowed"}
                assert answer.json()["error"]["code"] == expected.get(answer.status_code)
            elif operation.definition.raw["operationId"] != "list_users":
                assert MARK not in answer.text
            if not answer.is_success:
                assert MARK not in answer.text

        ids = someone(self.callers["everything"])
        exercise(self.callers[name], operation, mode, search=search, check=check, known=ids)


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    unlimited = {f"RATE_LIMIT_{name}": "1000000" for name in ("READ", "WRITE", "CREDENTIALS")}
    return settings_for(database_url, redis_url, **REQUIRED, **unlimited)


async def make_keys(settings: Settings) -> dict[str, str]:
    made = {str(scope): await make_key(settings, f"only-{scope.name}", scope) for scope in Scope}
    return {**made, "everything": await make_key(settings, "everything", *EVERYTHING)}


@pytest.fixture(scope="module")
def keyed(settings: Settings) -> Iterator[Keyed]:
    app = create_app(settings)
    keys = anyio.run(make_keys, settings)
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # as in conftest.py
    client = httpx.AsyncClient(transport=transport, base_url="http://test")
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(app.lifespan()),
        portal.wrap_async_context_manager(client),
    ):
        yield Keyed(lambda key: Patient(portal, client, showing(key)), keys)


# The app draws its jitter in a thread of its own, while here a strategy draws.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
def test_no_answer_to_a_key_is_outside_of_the_contract(
    keyed: Keyed, subtests: pytest.Subtests
) -> None:
    """Nor does a key that may not get anything of what is there."""
    single = itertools.cycle(sorted(keyed.callers.keys() - {"everything"}))
    modes = list(GenerationMode)
    for operation in keyed.operations:
        modes.reverse()
        for name, mode in zip(("everything", next(single)), modes, strict=True):
            with subtests.test(f"{operation.label} with {name}"):
                keyed.exercise(name, operation, mode, few)
