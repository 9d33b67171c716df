"""How whatever a request ends in becomes the answer that the contract promises."""

from __future__ import annotations

from collections.abc import Mapping

import structlog
from litestar import Request, Response
from litestar.datastructures import Headers
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import HTTPScope, Receive, Send
from user_service_schemas import ErrorCode, FieldError, RuleViolation

from ..errors import Invalid, MalformedBody, ServiceError
from ..logs import describe
from .answers import HTTPRequest, error_answer
from .requests import header

_log = structlog.get_logger()


class RouteNotFound(ServiceError):
    code = ErrorCode.ROUTE_NOT_FOUND
    message = "There is nothing at this path."


class MethodNotAllowed(ServiceError):
    code = ErrorCode.METHOD_NOT_ALLOWED
    message = "This path does not take this method."


class BodyTooLarge(ServiceError):
    code = ErrorCode.BODY_TOO_LARGE
    message = "The body is larger than this route takes."


class BodyTooSlow(ServiceError):
    code = ErrorCode.REQUEST_TIMEOUT
    message = "The body did not come in time."

    def __init__(self) -> None:
        super().__init__(headers=[("Connection", "close")])


class InternalError(ServiceError):
    code = ErrorCode.INTERNAL_ERROR
    message = "Something went wrong here. Report the request id."


_OF_STATUS: Mapping[int, type[ServiceError]] = {
    404: RouteNotFound,
    405: MethodNotAllowed,
    413: BodyTooLarge,
}


def answer_failure(request: HTTPRequest, error: Exception) -> Response[bytes]:
    """Render any exception; registered as the app's one exception handler."""
    return error_answer(
        meaning(error),
        request_id=request.scope["state"]["request_id"],
        accept=header(request.scope, b"accept") or "",
    )


async def send_failure(error: Exception, scope: HTTPScope, receive: Receive, send: Send) -> None:
    """Answer with what any exception means, where Litestar is not there to do it."""
    request: HTTPRequest = Request(scope)
    render = answer_failure(request, error).to_asgi_response(app=None, request=request)
    await render(scope, receive, send)


def meaning(error: Exception) -> ServiceError:
    """Return the error that a caller is told; what is nobody's fault but ours is logged."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, RuleViolation):
        return Invalid(*error.details)
    if isinstance(error, ValidationException):
        return _bad_parameters(error)
    if isinstance(error, HTTPException) and error.status_code < 500:
        allow = Headers(error.headers or {}).get("allow")
        kind = _OF_STATUS.get(error.status_code, Invalid)
        # HEAD is served as GET, which Litestar does not know (see `observation`).
        return kind(headers=[("Allow", allow.replace("GET", "GET, HEAD"))] if allow else [])
    _log.error("request.crashed", **describe(error))
    return InternalError()


def _bad_parameters(error: ValidationException) -> ServiceError:
    """Translate Litestar's words on query parameters; an empty body comes this way, too."""
    extra = error.extra if isinstance(error.extra, list) else []
    if any(item.get("key") == "data" for item in extra):
        return MalformedBody(message="The body is empty; a JSON object is expected.")
    return Invalid(
        *(
            FieldError(
                field=str(item.get("key", "query")),
                message=str(item.get("message", "")).replace("`", "") + ".",
            )
            for item in extra
        )
    )
