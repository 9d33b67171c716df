"""How an answer is made: the envelope around data or an error, and the headers beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec
from litestar import Request, Response
from litestar.datastructures import State
from litestar.datastructures.headers import Accept
from litestar.response.base import ASGIResponse
from user_service_schemas import Envelope, Error, Problem

from ..errors import Header, ServiceError
from ..storage.document import EntityTags, StoredDocument

JSON = "application/json"
PROBLEM_JSON = "application/problem+json"
# A document may be kept by the caller, but is to be asked about each time.
PRIVATE: Header = ("Cache-Control", "private, no-cache")
NO_STORE: Header = ("Cache-Control", "no-store")

HTTPRequest = Request[None, None, State]

_encode = msgspec.json.Encoder().encode


def answer(
    data: object,
    message: str,
    *,
    status: int = 200,
    headers: Sequence[Header] = (),
    cache: Header = NO_STORE,
    error: Error | None = None,
) -> ASGIResponse:
    """Answer with `data` in the envelope. `msgspec.Raw` is put in as it is."""
    envelope = Envelope(success=error is None, data=data, message=message, error=error)
    return ASGIResponse(
        body=_encode(envelope), status_code=status, media_type=JSON, headers=[cache, *headers]
    )


def document_answer(request: HTTPRequest, document: StoredDocument, etag: str) -> ASGIResponse:
    """Answer with an encoded document, without decoding it; or 304 if the caller has it."""
    if is_held(request, etag):
        return not_modified(etag)
    body = b'{"success":true,"data":%b,"message":"User retrieved","error":null}' % document.body
    return ASGIResponse(body=body, media_type=JSON, headers=[PRIVATE, ("ETag", etag)])


def is_held(request: HTTPRequest, etag: str) -> bool:
    """Whether `If-None-Match` names this representation."""
    held = request.headers.get("if-none-match")
    return held is not None and EntityTags(held).name_representation(etag)


def not_modified(etag: str) -> ASGIResponse:
    """Answer that the caller's copy is still right (RFC 9110, section 15.4.5)."""
    return ASGIResponse(
        status_code=304, media_type=JSON, headers=[PRIVATE, ("ETag", etag)], content_length=0
    )


def documents_answer(
    field: str, documents: Sequence[bytes], rest: bytes, message: str, tag: str
) -> ASGIResponse:
    """Answer with many encoded documents as the list `field`, followed by `rest`.

    `tag` is what the entity tag of each begins with: whoever keeps one can ask for it again.
    """
    data = b'{"%b":[%b]%b}' % (field.encode(), b",".join(documents), rest)
    return answer(msgspec.Raw(data), message, headers=[("X-Document-Tag", tag)])


def error_answer(error: ServiceError, *, request_id: str, accept: str = "") -> Response[bytes]:
    """Answer with an error, in the envelope or as RFC 9457 has it, as the caller accepts."""
    if _accepts_problem(accept):
        media_type = PROBLEM_JSON
        body = _encode(
            Problem(
                type=f"urn:user-service:error:{error.code}",
                title=error.message,
                status=error.status,
                detail=error.shown,
                code=error.code,
                errors=error.details,
                request_id=request_id,
            )
        )
    else:
        media_type = JSON
        failed = Error(code=error.code, details=error.details, request_id=request_id)
        body = _encode(Envelope[None](success=False, data=None, message=error.shown, error=failed))
    headers = dict([NO_STORE, ("Vary", "Accept"), *error.headers])
    return Response(body, status_code=error.status, media_type=media_type, headers=headers)


def _accepts_problem(accept: str) -> bool:
    # Of a weight such as 1e999, Litestar's reading raises: then nobody said what they accept.
    with contextlib.suppress(ValueError, OverflowError):
        return Accept(accept).best_match([JSON, PROBLEM_JSON], default=JSON) == PROBLEM_JSON
    return False
