"""The errors that services raise. Each carries its code; one handler in `http` renders them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from user_service_schemas import STATUS_OF, ErrorCode, FieldError

Header = tuple[str, str]

# RFC 9110, section 15.5.2: a 401 tells with what one would be let in.
_CHALLENGE: Header = ("WWW-Authenticate", "Bearer")


class ServiceError(Exception):
    """A request that cannot be answered as it was meant.

    `message` is for people and says nothing of the inside; `headers` go with the answer.
    """

    code: ClassVar[ErrorCode]
    message: ClassVar[str]

    def __init__(
        self, *details: FieldError, message: str | None = None, headers: Sequence[Header] = ()
    ) -> None:
        self.details = details
        self.shown = message or self.message
        self.headers = headers
        super().__init__(self.code)

    @property
    def status(self) -> int:
        """The HTTP status that the code is answered with."""
        return STATUS_OF[self.code]


class InvalidCursor(ServiceError):
    code = ErrorCode.INVALID_CURSOR
    message = "This cursor was not issued by this listing."


class MalformedBody(ServiceError):
    code = ErrorCode.MALFORMED_JSON
    message = "The body is not valid JSON, is too deep, or has too many values."


class UnsupportedMediaType(ServiceError):
    code = ErrorCode.UNSUPPORTED_MEDIA_TYPE
    message = "The body must be sent as Content-Type: application/json."


class Invalid(ServiceError):
    code = ErrorCode.VALIDATION_FAILED
    message = "The request has fields that are not valid."


class Unauthenticated(ServiceError):
    code = ErrorCode.UNAUTHENTICATED
    message = "A valid service key is needed: Authorization: Bearer usk_…"

    def __init__(self) -> None:
        super().__init__(headers=[_CHALLENGE])


class Forbidden(ServiceError):
    code = ErrorCode.FORBIDDEN
    message = "The service key does not have the scope that this needs."


class RateLimited(ServiceError):
    code = ErrorCode.RATE_LIMITED
    message = "Too many requests. Try again later."

    def __init__(
        self,
        *,
        retry_after: float,
        message: str | None = None,
        quota: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        headers = [(name.decode(), value.decode()) for name, value in quota]
        wait = ("Retry-After", str(max(1, math.ceil(retry_after))))
        super().__init__(message=message, headers=[wait, *headers])


class InvalidCredentials(ServiceError):
    code = ErrorCode.INVALID_CREDENTIALS
    message = "These credentials are not right."

    def __init__(self) -> None:
        super().__init__(headers=[_CHALLENGE])


class UserNotFound(ServiceError):
    code = ErrorCode.USER_NOT_FOUND
    message = "No user has this id."


class DeviceNotFound(ServiceError):
    code = ErrorCode.DEVICE_NOT_FOUND
    message = "The user has no device with this id."


class EmailTaken(ServiceError):
    code = ErrorCode.EMAIL_TAKEN
    message = "Another user has this email."


class ExternalIdTaken(ServiceError):
    code = ErrorCode.EXTERNAL_ID_TAKEN
    message = "Another user has this external id."


class VersionMismatch(ServiceError):
    code = ErrorCode.VERSION_MISMATCH
    message = "The user has another version than the one in If-Match."


class IdempotencyInProgress(ServiceError):
    code = ErrorCode.IDEMPOTENCY_IN_PROGRESS
    message = "A request with this Idempotency-Key is being processed. Try again."

    def __init__(self) -> None:
        super().__init__(headers=[("Retry-After", "1")])


class IdempotencyKeyReused(ServiceError):
    code = ErrorCode.IDEMPOTENCY_KEY_REUSED
    message = "This Idempotency-Key was used for another request."


class DependencyUnavailable(ServiceError):
    code = ErrorCode.DEPENDENCY_UNAVAILABLE
    message = "The service cannot reach its database right now. Try again."

    def __init__(self) -> None:
        super().__init__(headers=[("Retry-After", "1")])


class Overloaded(ServiceError):
    code = ErrorCode.OVERLOADED
    message = "The service is busy. Try again."

    def __init__(self) -> None:
        super().__init__(headers=[("Retry-After", "1")])
