"""How an answer is made: the envelope around data or an error, and the headers beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TypeAlias

import msgspec
from litestar import Request, Response
from litestar.datastructures import State
from litestar.datastructures.headers import Accept
from litestar.types import Receive, Scope, Send
from user_service_schemas import Envelope, Error, Problem

from ..errors import Header, ServiceError
from ..storage.document import EntityTags, StoredDocument

JSON = "application/json"
PROBLEM_JSON = "application/problem+json"
# A document may be kept by the caller, but is to be asked about each time.
PRIVATE: Header = ("Cache-Control", "private, no-cache")
NO_STORE: Header = ("Cache-Control", "no-store")

HTTPRequest = Request[None, None, State]
RawHeader: TypeAlias = tuple[bytes, bytes]
"""A header as ASGI has it, its name in small letters."""

_PRIVATE = (b"cache-control", PRIVATE[1].encode())
_JSON = (b"content-type", JSON.encode())

_encode = msgspec.json.Encoder().encode


class ReadyAnswer:
    """An answer whose bytes are there: an ASGI application, as Litestar's responses are.

    Without what those do for headers that may be set twice, in any case, and as text: 15 to 25 µs.
    """

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: list[RawHeader], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


def answer(
    data: object,
    message: str,
    *,
    status: int = 200,
    headers: Sequence[Header] = (),
    cache: Header = NO_STORE,
    error: Error | None = None,
) -> ReadyAnswer:
    """Answer with `data` in the envelope. `msgspec.Raw` is put in as it is."""
    envelope = Envelope(success=error is None, data=data, message=message, error=error)
    return json_answer(status, _encode(envelope), cache, *headers)


def json_answer(status: int, body: bytes, *headers: Header) -> ReadyAnswer:
    """Answer with JSON that is encoded already."""
    encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    return ReadyAnswer(status, [*encoded, _JSON, _length(body)], body)


def document_answer(held: str | None, document: StoredDocument, etag: str) -> ReadyAnswer:
    """Answer with an encoded document, without decoding it; or 304 if `held` names it."""
    if is_held(held, etag):
        return not_modified(etag)
    body = b'{"success":true,"data":%b,"message":"User retrieved","error":null}' % document.body
    return ReadyAnswer(200, [_PRIVATE, (b"etag", etag.encode()), _JSON, _length(body)], body)


def _length(body: bytes) -> RawHeader:
    return (b"content-length", b"%d" % len(body))


def is_held(held: str | None, etag: str) -> bool:
    """Whether `held`, what `If-None-Match` says, names this representation."""
    return held is not None and (held == etag or EntityTags(held).name_representation(etag))


def not_modified(etag: str) -> ReadyAnswer:
    """Answer that the caller's copy is still right (RFC 9110, section 15.4.5)."""
    return ReadyAnswer(304, [_PRIVATE, (b"etag", etag.encode())], b"")


def documents_answer(
    field: str, documents: Sequence[bytes], rest: bytes, message: str, tag: str
) -> ReadyAnswer:
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
