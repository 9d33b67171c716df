"""How a route says what it takes and answers, so that the documentation can be made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from msgspec import Struct
from user_service_schemas import ErrorCode, FieldError, Scope

from .answers import JSON

Judge = Callable[[Any], Iterable[FieldError]]


class Traffic(StrEnum):
    """The classes of requests, each of which has a limit of its own."""

    READ = "read"
    WRITE = "write"
    CREDENTIALS = "credentials"


class Operation(Struct, frozen=True, kw_only=True):
    """What OpenAPI tells of a route."""

    id: str
    summary: str
    description: str
    answers: Mapping[int, Any]
    """The type of `data` of each success."""
    body: Any
    judge: Judge | None
    """Names what is wrong with a body's fields beyond their types, as far as they are valid."""
    errors: Sequence[ErrorCode]
    example: Any
    """A body that works in "Try it out"."""
    reads_document: bool
    """Takes `If-None-Match` and `X-Min-Version`."""
    writes_document: bool
    """Takes `If-Match`."""
    etag: bool
    """Gives `ETag`."""
    is_write: bool
    """Takes `Idempotency-Key`."""
    page: bool
    """Takes `limit` and `cursor`."""
    parameters: Sequence[Mapping[str, Any]]
    """Other parameters, as OpenAPI has them."""
    media_type: str
    """Of a success: JSON is in the envelope, anything else is not."""
    scope: Scope | None
    """What the caller's key needs; None for what everybody may ask."""
    traffic: Traffic
    """The limit that it counts against."""

    def __deepcopy__(self, _memo: object) -> Operation:
        """Stay what it is: Litestar copies handlers, and `judge` may belong to a service."""
        return self


def operation(
    operation_id: str,
    summary: str,
    answers: Mapping[int, Any] | Any,
    *errors: ErrorCode,
    description: str = "",
    body: Any = None,
    judge: Judge | None = None,
    example: Any = None,
    reads_document: bool = False,
    writes_document: bool = False,
    is_write: bool = False,
    page: bool = False,
    etag: bool | None = None,
    parameters: Sequence[Mapping[str, Any]] = (),
    media_type: str = JSON,
    scope: Scope | None = None,
    traffic: Traffic | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments of a route's decorator."""
    by_status = answers if isinstance(answers, Mapping) else {200: answers}
    described = Operation(
        id=operation_id,
        summary=summary,
        description=description,
        answers=by_status,
        body=body,
        judge=judge,
        errors=errors,
        example=example,
        reads_document=reads_document,
        writes_document=writes_document,
        is_write=is_write or writes_document,
        page=page,
        etag=reads_document or writes_document if etag is None else etag,
        parameters=parameters,
        media_type=media_type,
        scope=scope,
        traffic=traffic or (Traffic.WRITE if is_write or writes_document else Traffic.READ),
    )
    return {
        "operation_id": operation_id,
        "status_code": min(by_status),
        "opt": {"operation": described},
    }
