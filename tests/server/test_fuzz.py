"""Garbled bodies, cursors and headers: each is taken, or refused by name, and soon.

The long forms of these are in `tests/chaos/test_fuzz.py`.
"""

from __future__ import annotations

import json
import re
import time
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_type_hints

import jsonschema_rs
import msgspec
import pytest
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute
from user_service_schemas import FieldError, Request
from user_service_server.app import create_app
from user_service_server.errors import Invalid, MalformedBody, ServiceError
from user_service_server.http.bodies import MAX_BODY, StrictBody
from user_service_server.http.openapi import openapi_document
from user_service_server.settings import Settings

from ..private import leaves
from ..schemas.test_requests import found
from .garbling import Garbler, Seeds, search

CPU_SECONDS = 0.05
"""What the reading of a body of 64 KiB may take of the event loop, all errors named."""
BYTES_A_BYTE = 100
"""What a body may take of memory while it is read: of `[[],[],…` 20 for each, and 20 its copy."""
VERBATIM = {"password", "current_password"}
FEW: Seeds = range(4000)
"""Three seconds. All that the long search has found in the reader, these find, too."""


class Bodies:
    """The bodies of all operations, and the reader that the server reads them with."""

    def __init__(self, settings: Settings, cpu_seconds: float = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        app = create_app(settings)
        self.handlers = [
            handler for _, handler in sorted(routes_with_body(app), key=lambda r: r[0])
        ]
        self._document = openapi_document(app, "1")
        self._told = json.dumps(self._document)
        self._validators = {
            handler.operation_id: self._validator(handler) for handler in self.handlers
        }

    def _validator(self, handler: HTTPRouteHandler) -> Any:
        name = type_of(handler).__name__
        reference = {"$ref": f"#/components/schemas/{name}"}
        return jsonschema_rs.validator_for(
            {**reference, "components": self._document["components"]}
        )

    def check(self, seed: int) -> None:
        """Read one body, and see that it was read or refused as it must be."""
        garbler = Garbler(seed)
        handler = garbler.random.choice(self.handlers)
        self.check_body(handler, garbler.body(type_of(handler), MAX_BODY), sampled=seed % 20 == 0)

    def check_body(self, handler: HTTPRouteHandler, body: bytes, *, sampled: bool = False) -> None:
        outcome, seconds = timed(handler, body)
        said = (handler.operation_id, body[:300], len(body), outcome)
        assert seconds <= self._cpu_seconds, (seconds, said)
        if sampled:
            assert memory(handler, body) <= BYTES_A_BYTE * len(body) + 1024 * 1024, said
        if isinstance(outcome, Request):
            again = msgspec.json.encode(outcome)
            assert read(handler, again) == outcome, said
            raw = json.loads(again)
            self._validators[handler.operation_id].validate(raw)
            assert not list(_unclean(raw)), said
        elif isinstance(outcome, MalformedBody):
            assert not is_plain_json(body), said
        else:
            self._check_details(handler, body, outcome.details)

    def _check_details(
        self, handler: HTTPRouteHandler, body: bytes, details: tuple[FieldError, ...]
    ) -> None:
        value = json.loads(body)
        fields = [detail.field for detail in details]
        said = (handler.operation_id, body[:300], details)
        assert 1 <= len(fields) <= 200, said
        assert len(set(fields)) == len(fields), said
        declared = set(_declared(type_of(handler)))
        for field in fields:
            exists = field == "body" or re.sub(r"\[\d+\]", "[]", field) in declared
            assert exists or any(True for _ in found(value, field)), (field, said)
        shown = json.dumps([msgspec.to_builtins(detail) for detail in details], ensure_ascii=False)
        not_shown(value, shown, self._told)


def not_shown(value: object, shown: str, told: str) -> None:
    """See that no value is said back; names are, and what the document tells anyway."""
    for leaf in leaves(value, 7):
        if leaf in shown:
            assert leaf in told or any(leaf in key for key in _keys(value)), (leaf, shown)


def type_of(handler: HTTPRouteHandler) -> type[Request]:
    body: type[Request] = handler.opt["operation"].body
    return body


def routes_with_body(app: Litestar) -> Iterator[tuple[str, HTTPRouteHandler]]:
    """Yield the handlers that take a body, each with its path."""
    for route in app.routes:
        for handler in route.route_handlers if isinstance(route, HTTPRoute) else ():
            if "operation" in handler.opt and handler.opt["operation"].body:
                yield route.path, handler


def read(handler: HTTPRouteHandler, body: bytes) -> Request | ServiceError:
    """Read a body as the route does, or return why not."""
    connection = SimpleNamespace(content_type=("application/json", {}), route_handler=handler)
    try:
        request: Request = StrictBody(connection).decode_bytes(body)  # type: ignore[arg-type]
    except (Invalid, MalformedBody) as error:
        return error
    return request


def timed(handler: HTTPRouteHandler, body: bytes) -> tuple[Request | ServiceError, float]:
    """Read a body; returns the CPU time of that too, the least of some: others make it longer."""
    tries = 4
    while True:
        began = time.thread_time()
        outcome = read(handler, body)
        took = time.thread_time() - began
        if took <= CPU_SECONDS or not tries:
            return outcome, took
        tries -= 1


def memory(handler: HTTPRouteHandler, body: bytes) -> int:
    """Return how many bytes more there were at most while a body was read."""
    tracemalloc.start()
    try:
        read(handler, body)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def is_plain_json(body: bytes) -> bool:
    """Whether it is JSON that nobody could refuse: by another reader, and without extremes."""

    def refuse(text: str) -> float:
        raise ValueError(text)

    def number(text: str) -> float:
        if (value := float(text)) in (float("inf"), float("-inf")):
            raise ValueError(text)
        return value

    try:
        value = json.loads(body.decode(), parse_constant=refuse, parse_float=number)
        # Of names that are there twice the first values are lost: surrogates are looked for here.
        return _depth(value) < 200 and b"\\ud" not in body.lower()
    except (ValueError, RecursionError):
        return False


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _unclean(value: object, name: str = "") -> Iterator[object]:
    """Yield the strings, names too, that are not trimmed, or have control characters."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _unclean(key)
            yield from _unclean(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _unclean(item)
    elif isinstance(value, str) and name not in VERBATIM:
        if value != value.strip() or re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029]", value):
            yield value
        value.encode()


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


def _declared(type_: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of all fields that a body of this type may have."""
    for option in _structs(type_):
        hints = get_type_hints(option)
        for field in msgspec.structs.fields(option):
            name = f"{path}.{field.encode_name}" if path else field.encode_name
            yield name
            yield from _declared(hints[field.name], name)


def _structs(type_: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        yield type_
    for argument in getattr(type_, "__args__", ()):
        yield from _structs(argument)


@pytest.fixture(scope="module")
def bodies(settings: Settings) -> Bodies:
    return Bodies(settings)


def test_a_garbled_body_is_read_or_refused_by_name_and_soon(bodies: Bodies) -> None:
    """What was read is what is declared; what was not, is named without being shown."""
    search(bodies.check, FEW)
