"""What a call can raise.

* UserServiceError
  x NotSent             the request never left
  x MaybeProcessed      it left, and no whole answer came back
  x DeadlineExceeded    the call's time was up; `maybe_processed` says which of the two it is
  x CircuitOpen         the service has failed so often just now that it was not asked
  x DecodeError         an answer came that does not read as what was asked for
  x ApiError            the service, or a proxy before it, refused
    + BadRequest        400
    + Unauthenticated   401
    + Forbidden         403
    + NotFound          404
    + Conflict          409
    + VersionMismatch   412, with the current `etag`
    + Invalid           422, with `details`
    + RateLimited       429, with `retry_after`
    + ServerError       5xx, with `retry_after`

None of them prints what a caller sent or the service answered: no address, no token, no key.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

from user_service_schemas import FieldError


class UserServiceError(Exception):
    """A call failed. Every error of this package is one of these, and can be pickled.

    Attributes:
        code: The stable code of the service (see `ErrorCode`; a newer server may send others),
            None where the service itself did not answer.
        request_id: What to look for in the service's logs; also known where no answer came.
        status: The HTTP status, None where no answer came.
        attempts: How often the service was asked; 0 where the client knew by itself.
        elapsed: Seconds from the start of the call.
        maybe_processed: Whether a write may have happened: an attempt left, and what became of it
            is not known. Repeat it with the same `idempotency_key`, and it happens once.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        request_id: str | None = None,
        status: int | None = None,
        attempts: int = 1,
        elapsed: float = 0.0,
        maybe_processed: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id
        self.status = status
        self.attempts = attempts
        self.elapsed = elapsed
        self.maybe_processed = maybe_processed

    def __reduce__(self) -> tuple[type[Self], tuple[str], dict[str, object]]:
        return type(self), (str(self),), self.__dict__


class NotSent(UserServiceError):
    """The request never left: no connection could be had, or HTTP cannot carry its headers.

    Repeating it is safe.
    """


class MaybeProcessed(UserServiceError):
    """The request left, and no whole answer came back: a write may have happened."""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        request_id: str | None = None,
        status: int | None = None,
        attempts: int = 1,
        elapsed: float = 0.0,
        maybe_processed: bool = True,
    ) -> None:
        super().__init__(
            message,
            code=code,
            request_id=request_id,
            status=status,
            attempts=attempts,
            elapsed=elapsed,
            maybe_processed=maybe_processed,
        )


class DeadlineExceeded(UserServiceError):
    """The time of the call was up.

    `maybe_processed` is False if the request had certainly not left yet, so that repeating it is
    safe. Of a transport that was passed in nothing is known, and it is always true.
    """


class CircuitOpen(UserServiceError):
    """The service was not asked: most calls of the last seconds have failed.

    One call in five seconds is let through to see whether it is back.
    """


class DecodeError(UserServiceError):
    """An answer came that does not read as what was asked for. A write has happened."""


class ApiError(UserServiceError):
    """The service refused, or a proxy before it did (then `code` is None).

    Itself raised for the statuses that have no class of their own, such as 405, 413 and 415.

    Attributes:
        details: Every bad field of the request, where the service named them. Their messages are
            not part of what the error prints.
        etag: The current ETag, where the service sent one.
        retry_after: Seconds that the service asks to wait, None where it did not say.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        request_id: str | None = None,
        status: int | None = None,
        attempts: int = 1,
        elapsed: float = 0.0,
        maybe_processed: bool = False,
        details: tuple[FieldError, ...] = (),
        etag: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(
            message,
            code=code,
            request_id=request_id,
            status=status,
            attempts=attempts,
            elapsed=elapsed,
            maybe_processed=maybe_processed,
        )
        self.details = details
        self.etag = etag
        self.retry_after = retry_after


class BadRequest(ApiError):
    """400: the request cannot be read, such as `invalid_cursor`."""


class Unauthenticated(ApiError):
    """401: the key is missing or not known (`unauthenticated`), or what was to be verified, or the
    current password, is wrong (`invalid_credentials`)."""


class Forbidden(ApiError):
    """403: the key lacks the scope."""


class NotFound(ApiError):
    """404: `user_not_found`, `device_not_found`, or a route that this server does not have.

    The client remembers for 5 s that nobody has an id: then nobody was asked, `attempts` is 0, and
    there is no request id.
    """


class Conflict(ApiError):
    """409: `email_taken` or `external_id_taken`, or a write that is still under way."""


class VersionMismatch(ApiError):
    """412: the user has changed since the `if_version` was read. `etag` is the current one."""


class Invalid(ApiError):
    """422: `details` names every bad field."""


class RateLimited(ApiError):
    """429: too many calls. `retry_after` says how many seconds to wait."""


class ServerError(ApiError):
    """5xx: the service or something it needs is down. `retry_after` may say for how long."""


_OF_STATUS: Mapping[int, type[ApiError]] = MappingProxyType(
    {
        400: BadRequest,
        401: Unauthenticated,
        403: Forbidden,
        404: NotFound,
        409: Conflict,
        412: VersionMismatch,
        422: Invalid,
        429: RateLimited,
    }
)


def error_class(status: int) -> type[ApiError]:
    """Return the class that an answer with this HTTP status is raised as."""
    return ServerError if status >= 500 else _OF_STATUS.get(status, ApiError)
