"""The four keys that every JSON answer has."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from ._base import Response

T = TypeVar("T")


class FieldError(Response, frozen=True):
    """One bad field of a request: its path (`preferences.quiet_hours_start`) and what is wrong."""

    field: str
    message: str


class Error(Response, frozen=True):
    """Why a request failed. `code` is stable (`ErrorCode`), and may be of a newer server."""

    code: str
    details: tuple[FieldError, ...] = ()
    request_id: str | None = None


class Envelope(Response, Generic[T], frozen=True):
    """An answer: `data` on success, `error` on failure, `message` for people."""

    success: bool
    data: T | None
    message: str
    error: Error | None


class Problem(Response, frozen=True):
    """The same error for `Accept: application/problem+json` (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: tuple[FieldError, ...] = ()
    request_id: str | None = None
    data: Any = None


class Page(Response, Generic[T], frozen=True):
    """A page of a keyset listing; `next_cursor` is null on the last one."""

    items: tuple[T, ...]
    next_cursor: str | None
