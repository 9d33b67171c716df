"""The OpenAPI document, made from the routes and from the structs that they really use.

msgspec writes the schemas: Litestar's own generator drops constraints (unknown fields, patterns
of keys) and fails on nested structs, and then server and documentation would not say the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from litestar import Litestar
from litestar.routes import HTTPRoute
from user_service_schemas import STATUS_OF, Error, ErrorCode, Problem

from .answers import JSON, PROBLEM_JSON
from .operations import Operation

_REFS = "#/components/schemas/{name}"
_NULL = {"type": "null"}
_ERROR = {"$ref": _REFS.format(name="Error")}
_ANYWHERE = (ErrorCode.INTERNAL_ERROR, ErrorCode.DEPENDENCY_UNAVAILABLE, ErrorCode.OVERLOADED)
_WITH_KEY = (ErrorCode.UNAUTHENTICATED, ErrorCode.FORBIDDEN, ErrorCode.RATE_LIMITED)
_WITH_BODY = (
    ErrorCode.MALFORMED_JSON,
    ErrorCode.REQUEST_TIMEOUT,
    ErrorCode.BODY_TOO_LARGE,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE,
    ErrorCode.VALIDATION_FAILED,
)
_ABOUT = """\
Who a user is, how to reach them, and whether they may be reached now.

Every answer has the four keys `success`, `data`, `message` and `error`. A user is one document
under one `version`; its `ETag` is `"<epoch>.<format>.<version>"`. Fields and values of enums may be
added at any time.
"""


def openapi_document(app: Litestar, version: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of all routes that were described with `operation`."""
    described = list(_described(app))
    used = [Error, Problem]
    for _, _, op in described:
        used += [*op.answers.values(), *([op.body] if op.body else [])]
    types = list({repr(t): t for t in used}.values())
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFS)
    schema_of = dict(zip(map(repr, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, method, op in described:
        paths[path][method] = _operation(path, op, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "User Service", "version": version, "description": _ABOUT},
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": components,
            "securitySchemes": {
                "serviceKey": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A service key, usk_…; needed unless the service runs with"
                    " AUTH=off. Each operation names the scope that the key needs.",
                }
            },
        },
    }


def _described(app: Litestar) -> Iterator[tuple[str, str, Operation]]:
    for route in app.routes:
        for handler in route.route_handlers if isinstance(route, HTTPRoute) else ():
            op = handler.opt.get("operation")
            if op is not None:
                path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path_format)
                for method in sorted(handler.http_methods):
                    # Ids are unique: where PUT merges like PATCH, PATCH has the plain one.
                    twin = method == "PUT" and "PATCH" in handler.http_methods
                    named = {"id": f"{op.id}_by_put", "summary": f"{op.summary} (merges, as PATCH)"}
                    yield path, method.lower(), msgspec.structs.replace(op, **named) if twin else op


def _operation(path: str, op: Operation, schema_of: Mapping[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": op.id,
        "summary": op.summary,
        "tags": [_tag(path)],
        "parameters": list(_parameters(path, op)),
        "responses": dict(_responses(op, schema_of)),
    }
    if op.description:
        described["description"] = op.description
    if op.scope is not None:
        # Roles of an HTTP scheme are named here since OpenAPI 3.1.
        described["security"] = [{"serviceKey": [op.scope.value]}]
    if op.body:
        content: dict[str, Any] = {"schema": schema_of[repr(op.body)]}
        if op.example is not None:
            content["example"] = op.example
        described["requestBody"] = {"required": True, "content": {JSON: content}}
    return described


def _tag(path: str) -> str:
    parts = path.removeprefix("/api/v1/").split("/")
    return next(
        (p for p in reversed(parts) if p in ("preferences", "devices")), parts[0] or "health"
    )


def _parameters(path: str, op: Operation) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"\{(\w+)\}", path):
        schema = {"type": "string", "format": "uuid"}
        yield {"name": name, "in": "path", "required": True, "schema": schema}
    if op.page:
        limit = {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}
        yield {"name": "limit", "in": "query", "schema": limit}
        yield {
            "name": "cursor",
            "in": "query",
            "schema": {"type": "string"},
            "description": "`next_cursor` of the page before.",
        }
    yield from map(dict, op.parameters)
    if op.reads_document:
        yield _header("If-None-Match", "An ETag; 304 if the document still has it.")
        yield _header(
            "X-Min-Version", "A cached copy below this version is passed over.", "integer"
        )
    if op.writes_document:
        yield _header("If-Match", "An ETag; 412 if the user has another version.")
    if op.is_write:
        yield _header("Idempotency-Key", "A repeat with the same key within 24 h changes nothing.")


def _header(name: str, description: str, type_: str = "string") -> dict[str, Any]:
    schema = {"type": type_} | ({"minimum": 0} if type_ == "integer" else {})
    return {"name": name, "in": "header", "schema": schema, "description": description}


def _responses(op: Operation, schema_of: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for status, type_ in op.answers.items():
        data = schema_of[repr(type_)]
        response: dict[str, Any] = {
            "description": op.summary,
            "content": {
                op.media_type: {
                    "schema": _envelope(status < 400, data, _NULL if status < 400 else _ERROR)
                    if op.media_type == JSON
                    else {"type": "string"}
                }
            },
        }
        if op.etag:
            response["headers"] = {"ETag": {"schema": {"type": "string"}}}
        yield str(status), response
    if op.reads_document:
        yield "304", {"description": "The caller's copy is still right."}
    codes = [*op.errors, *_ANYWHERE]
    if op.scope is not None:
        codes += _WITH_KEY
    if op.body:
        codes += _WITH_BODY
    if op.page:
        codes.append(ErrorCode.INVALID_CURSOR)
    if op.page or any(parameter["in"] == "query" for parameter in op.parameters):
        codes.append(ErrorCode.VALIDATION_FAILED)
    if op.reads_document:
        codes.append(ErrorCode.VALIDATION_FAILED)
    if op.writes_document:
        codes.append(ErrorCode.VERSION_MISMATCH)
    if op.is_write:
        codes += [
            ErrorCode.IDEMPOTENCY_IN_PROGRESS,
            ErrorCode.IDEMPOTENCY_KEY_REUSED,
            ErrorCode.VALIDATION_FAILED,
        ]
    by_status: dict[int, list[ErrorCode]] = defaultdict(list)
    for code in dict.fromkeys(codes):
        by_status[STATUS_OF[code]].append(code)
    for status, same in sorted(by_status.items()):
        if status in op.answers:
            continue
        yield (
            str(status),
            {
                "description": ", ".join(f"`{code}`" for code in same),
                "content": {
                    JSON: {"schema": _envelope(False, _NULL, _ERROR)},
                    PROBLEM_JSON: {"schema": {"$ref": _REFS.format(name="Problem")}},
                },
            },
        )


def _envelope(success: bool, data: Any, error: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["success", "data", "message", "error"],
        "properties": {
            "success": {"const": success},
            "data": data,
            "message": {"type": "string"},
            "error": error,
        },
    }
