"""What a call can raise.

* UserServiceError
  x NotSent             the request never left
  x MaybeProcessed      it left, and no whole answer came back
  x DeadlineExceeded    the call's time was up; `maybe_processed` says which of the two it is
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

from user_service_schemas import FieldError


class UserServiceError(Exception):
    """A call failed. Every error of this package is one of these, and can be pickled.

    Attributes:
        code: The stable code of the service (see `ErrorCode`; a newer server may send others),
            None where the service itself did not answer.
        request_id: What to look for in the service's logs; also known where no answer came.
        status: The HTTP status, None where no answer came.
        elapsed: Seconds from the start of the call.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        request_id: str | None = None,
        status: int | None = None,
        elapsed: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id
        self.status = status
        self.elapsed = elapsed


class NotSent(UserServiceError):
    """The request never left: no connection could be had. Repeating it is safe."""


class MaybeProcessed(UserServiceError):
    """The request left, and no whole answer came back: a write may have happened."""


class DeadlineExceeded(UserServiceError):
    """The time of the call was up.

    Attributes:
        maybe_processed: False if the request had certainly not left yet, so that repeating it is
            safe. Of a transport that was passed in nothing is known, and it is always true.
    """

    def __init__(
        self,
        message: str,
        *,
        maybe_processed: bool = True,
        request_id: str | None = None,
        elapsed: float = 0.0,
    ) -> None:
        super().__init__(message, request_id=request_id, elapsed=elapsed)
        self.maybe_processed = maybe_processed


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
        elapsed: float = 0.0,
        details: tuple[FieldError, ...] = (),
        etag: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, code=code, request_id=request_id, status=status, elapsed=elapsed)
        self.details = details
        self.etag = etag
        self.retry_after = retry_after


class BadRequest(ApiError):
    """400: the request cannot be read, such as `invalid_cursor`."""


class Unauthenticated(ApiError):
    """401: the key is missing or not known, or the current password is wrong."""


class Forbidden(ApiError):
    """403: the key lacks the scope."""


class NotFound(ApiError):
    """404: `user_not_found`, `device_not_found`, or a route that this server does not have."""


class Conflict(ApiError):
    """409: `email_taken` or `external_id_taken`."""


class VersionMismatch(ApiError):
    """412: the user has changed since the `if_match` was read. `etag` is the current one."""


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
