"""The OpenAPI document: valid, complete, and what the server really does.

The long form of this is in `tests/chaos/test_openapi_long.py`.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import httpx
import hypothesis
import pytest
import requests
import schemathesis
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from litestar import Litestar
from litestar.routes import HTTPRoute
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from user_service_server.app import create_app
from user_service_server.settings import Settings

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    allow_header_conformance,
]
bounded = hypothesis.settings(
    max_examples=10,  # of each operation
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

pytestmark = pytest.mark.usefixtures("cheap_passwords")

UNDESCRIBED = {"/docs", "/docs/{name}", "/openapi.json", "/metrics"}
JANE = {"name": "Jane Roe", "email": "jane@example.com", "password": "Strong-Pass-123!"}
_NUMBERS = itertools.count()

AnyOperation = APIOperation[Any, Any, Any, Any]
AnyCase = schemathesis.Case[Any]
Operations = dict[tuple[str, str], dict[str, Any]]


class Caller:
    """Calls an app from code that is not asynchronous, as schemathesis' is."""

    def __init__(
        self, portal: BlockingPortal, client: httpx.AsyncClient, headers: Mapping[str, str] = {}
    ) -> None:
        self._portal = portal
        self._client = client
        self._headers = headers

    def __call__(
        self, method: str, url: str, *, headers: Mapping[str, Any] = {}, **options: Any
    ) -> httpx.Response:
        # What the caller always says goes before what is made up.
        said = httpx.Headers(headers)
        said.update(self._headers)
        ask = partial(self._client.request, method, url, headers=said, **options)
        return self._portal.call(ask)


@pytest.fixture(scope="module")
def served(settings: Settings) -> Litestar:
    return create_app(settings)


@pytest.fixture(scope="module")
def call(served: Litestar) -> Iterator[Caller]:
    transport = httpx.ASGITransport(served)  # type: ignore[arg-type]  # as in conftest.py
    client = httpx.AsyncClient(transport=transport, base_url="http://test")
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(served.lifespan()),
        portal.wrap_async_context_manager(client),
    ):
        yield Caller(portal, client)


@pytest.fixture(scope="module")
def document(call: Caller) -> dict[str, Any]:
    answer = call("GET", "/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    return dict(answer.json())


@pytest.fixture(scope="module")
def described(document: dict[str, Any]) -> BaseSchema:
    return schemathesis.openapi.from_dict(document)


@pytest.fixture(scope="module")
def operations(document: dict[str, Any]) -> Operations:
    return {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def someone(call: Caller) -> dict[str, str]:
    """Return the ids of a new user and of their device."""
    number = next(_NUMBERS)
    jane = {**JANE, "email": f"jane.{number}@example.com"}
    answer = call("POST", "/api/v1/users/", json=jane)
    assert answer.is_success, answer.text
    user = answer.json()["data"]["id"]
    phone = {"token": f"fcm_token_of_jane_{number}", "platform": "android"}
    device = call("POST", f"/api/v1/users/{user}/devices", json=phone).json()["data"]["id"]
    return {"user_id": user, "device_id": device}


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    assert not list(OpenAPIV31SpecValidator(document).iter_errors())


def test_every_route_is_described(served: Litestar, operations: Operations) -> None:
    routes = {
        (method.lower(), path)
        for route in served.routes
        if isinstance(route, HTTPRoute)
        for method in route.methods
        if (path := re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path_format)) not in UNDESCRIBED
        and method != "OPTIONS"
    }
    assert {(method, path.rstrip("/")) for method, path in operations} == routes


def test_every_operation_has_an_id_of_its_own_and_a_summary(operations: Operations) -> None:
    ids = [operation["operationId"] for operation in operations.values()]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch("[a-z]+(_[a-z]+)+", name) for name in ids)
    assert all(operation["summary"] for operation in operations.values())
    assert all(operation["tags"] for operation in operations.values())


def test_every_operation_names_its_error_answers(operations: Operations) -> None:
    for (method, path), operation in operations.items():
        if not path.startswith("/api/v1/"):
            continue
        expected = {"500", "503"}
        if "{user_id}" in path:
            expected.add("404")
            if method != "get":
                expected.add("412")
        if "requestBody" in operation:
            expected |= {"400", "413", "415", "422"}
        if any(parameter["name"] == "cursor" for parameter in operation["parameters"]):
            expected |= {"400", "422"}
        assert expected <= operation["responses"].keys(), (method, path)


def test_every_error_answer_is_offered_as_envelope_and_as_problem(operations: Operations) -> None:
    for operation in operations.values():
        for status, response in operation["responses"].items():
            if status >= "400" and operation["operationId"] != "get_health":
                assert response["content"].keys() == {
                    "application/json",
                    "application/problem+json",
                }


def test_every_body_has_a_schema_that_refuses_unknown_fields(
    document: dict[str, Any], operations: Operations
) -> None:
    for operation in operations.values():
        if "requestBody" in operation:
            body = operation["requestBody"]["content"]["application/json"]
            name = body["schema"]["$ref"].rpartition("/")[2]
            assert document["components"]["schemas"][name]["additionalProperties"] is False


def test_the_example_of_every_body_works(call: Caller, operations: Operations) -> None:
    ids = someone(call)
    tried = 0
    # A password can be verified once there is somebody who has it.
    for (method, path), operation in sorted(operations.items(), key=lambda o: "verify" in o[0][1]):
        if "requestBody" in operation:
            example = operation["requestBody"]["content"]["application/json"]["example"]
            answer = call(method, path.format(**ids), json=example)
            assert answer.is_success, (method, path, answer.text)
            assert str(answer.status_code) in operation["responses"]
            tried += 1
    assert tried >= 10


def exercise(
    call: Caller,
    operation: AnyOperation,
    mode: GenerationMode,
    *,
    search: hypothesis.settings = bounded,
    check: Callable[[httpx.Response], None] = lambda _answer: None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Send an operation what its schema allows (or, in negative mode, does not)."""
    ids = known or someone(call)

    @search
    @given(
        case=operation.as_strategy(generation_mode=mode),
        exists=st.sampled_from([True, True, True, False]),
    )
    def conforms(case: AnyCase, exists: bool) -> None:
        if exists:
            known = {name: ids[name] for name in case.path_parameters if name in ids}
            case.path_parameters.update(known)
        sent = requests.Request(**case.as_transport_kwargs(base_url="http://test")).prepare()
        assert sent.method is not None
        assert sent.url is not None
        # Latin-1 as in HTTP: a made-up Authorization may have any of it.
        headers = {
            name: value if isinstance(value, bytes) else value.encode("latin-1")
            for name, value in sent.headers.items()
            if name.lower() != "host"  # of whom it is asked is no part of what is asked
        }
        answer = call(sent.method, sent.url, headers=headers, content=sent.body)
        case.validate_response(answer, checks=CHECKS)
        check(answer)

    conforms()


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.name.lower())
def test_no_answer_is_outside_of_the_contract(
    described: BaseSchema, call: Caller, mode: GenerationMode, subtests: pytest.Subtests
) -> None:
    for result in described.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        if operation.path.endswith("/stream"):
            continue  # does not end by itself: tests of its own
        takes_input = operation.body or operation.query or operation.path_parameters
        if mode is GenerationMode.POSITIVE or takes_input:
            with subtests.test(operation.label):
                exercise(call, operation, mode)
