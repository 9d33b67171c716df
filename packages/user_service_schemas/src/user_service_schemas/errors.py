"""The error codes of the API, the status each is answered with, and what a broken rule raises."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from .envelope import FieldError


class ErrorCode(StrEnum):
    """The stable `error.code` of an answer. A newer server may send one that is not here."""

    MALFORMED_JSON = "malformed_json"
    INVALID_CURSOR = "invalid_cursor"
    UNAUTHENTICATED = "unauthenticated"
    INVALID_CREDENTIALS = "invalid_credentials"
    FORBIDDEN = "forbidden"
    USER_NOT_FOUND = "user_not_found"
    DEVICE_NOT_FOUND = "device_not_found"
    ROUTE_NOT_FOUND = "route_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    REQUEST_TIMEOUT = "request_timeout"
    EMAIL_TAKEN = "email_taken"
    EXTERNAL_ID_TAKEN = "external_id_taken"
    IDEMPOTENCY_IN_PROGRESS = "idempotency_in_progress"
    VERSION_MISMATCH = "version_mismatch"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    VALIDATION_FAILED = "validation_failed"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    RATE_LIMITED = "rate_limited"
    INTERNAL_ERROR = "internal_error"
    DEPENDENCY_UNAVAILABLE = "dependency_unavailable"
    OVERLOADED = "overloaded"


STATUS_OF: Mapping[ErrorCode, int] = MappingProxyType(
    {
        ErrorCode.MALFORMED_JSON: 400,
        ErrorCode.INVALID_CURSOR: 400,
        ErrorCode.UNAUTHENTICATED: 401,
        ErrorCode.INVALID_CREDENTIALS: 401,
        ErrorCode.FORBIDDEN: 403,
        ErrorCode.USER_NOT_FOUND: 404,
        ErrorCode.DEVICE_NOT_FOUND: 404,
        ErrorCode.ROUTE_NOT_FOUND: 404,
        ErrorCode.METHOD_NOT_ALLOWED: 405,
        ErrorCode.REQUEST_TIMEOUT: 408,
        ErrorCode.EMAIL_TAKEN: 409,
        ErrorCode.EXTERNAL_ID_TAKEN: 409,
        ErrorCode.IDEMPOTENCY_IN_PROGRESS: 409,
        ErrorCode.VERSION_MISMATCH: 412,
        ErrorCode.BODY_TOO_LARGE: 413,
        ErrorCode.UNSUPPORTED_MEDIA_TYPE: 415,
        ErrorCode.VALIDATION_FAILED: 422,
        ErrorCode.IDEMPOTENCY_KEY_REUSED: 422,
        ErrorCode.RATE_LIMITED: 429,
        ErrorCode.INTERNAL_ERROR: 500,
        ErrorCode.DEPENDENCY_UNAVAILABLE: 503,
        ErrorCode.OVERLOADED: 503,
    }
)
"""The HTTP status of each code."""


class RuleViolation(ValueError):
    """A request breaks a rule; `details` names every bad field.

    `valid`, where the request does not even fit its type, has the fields that do as attributes, and
    `UNSET` for the others: so that rules can be judged all the same, and told at once.
    """

    def __init__(self, *details: FieldError, valid: object = None) -> None:
        super().__init__("; ".join(f"{detail.field}: {detail.message}" for detail in details))
        self.details = details
        self.valid = valid
