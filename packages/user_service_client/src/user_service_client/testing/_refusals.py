"""What the fake refuses a request with: the service's codes and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from user_service_schemas import STATUS_OF, ErrorCode, FieldError

MESSAGES: Mapping[ErrorCode, str] = {
    ErrorCode.MALFORMED_JSON: "The body is not valid JSON, is too deep, or has too many values.",
    ErrorCode.INVALID_CURSOR: "This cursor was not issued by this listing.",
    ErrorCode.UNAUTHENTICATED: "A valid service key is needed: Authorization: Bearer usk_…",
    ErrorCode.INVALID_CREDENTIALS: "These credentials are not right.",
    ErrorCode.FORBIDDEN: "The service key does not have the scope that this needs.",
    ErrorCode.USER_NOT_FOUND: "No user has this id.",
    ErrorCode.DEVICE_NOT_FOUND: "The user has no device with this id.",
    ErrorCode.ROUTE_NOT_FOUND: "There is nothing at this path.",
    ErrorCode.METHOD_NOT_ALLOWED: "This path does not take this method.",
    ErrorCode.REQUEST_TIMEOUT: "The body did not come in time.",
    ErrorCode.EMAIL_TAKEN: "Another user has this email.",
    ErrorCode.EXTERNAL_ID_TAKEN: "Another user has this external id.",
    ErrorCode.IDEMPOTENCY_IN_PROGRESS: (
        "A request with this Idempotency-Key is being processed. Try again."
    ),
    ErrorCode.VERSION_MISMATCH: "The user has another version than the one in If-Match.",
    ErrorCode.BODY_TOO_LARGE: "The body is larger than this route takes.",
    ErrorCode.UNSUPPORTED_MEDIA_TYPE: "The body must be sent as Content-Type: application/json.",
    ErrorCode.VALIDATION_FAILED: "The request has fields that are not valid.",
    ErrorCode.IDEMPOTENCY_KEY_REUSED: "This Idempotency-Key was used for another request.",
    ErrorCode.RATE_LIMITED: "Too many requests. Try again later.",
    ErrorCode.INTERNAL_ERROR: "Something went wrong here. Report the request id.",
    ErrorCode.DEPENDENCY_UNAVAILABLE: (
        "The service cannot reach its database right now. Try again."
    ),
    ErrorCode.OVERLOADED: "The service is busy. Try again.",
}


class Refusal(Exception):
    """A request that is not answered as it was meant."""

    def __init__(
        self,
        code: ErrorCode,
        *details: FieldError,
        message: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.status = STATUS_OF[code]
        self.details = details
        self.title = MESSAGES[code]
        self.message = message or MESSAGES[code]
        self.headers = headers or {}


def invalid(details: Sequence[FieldError]) -> Refusal:
    """Return the refusal of fields that are not valid."""
    return Refusal(ErrorCode.VALIDATION_FAILED, *details)
