"""What an answer says: the data of its envelope, or the error it is raised as."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx
import msgspec
from user_service_schemas import Envelope, Error

from user_service_client._transport import Reply
from user_service_client.errors import ApiError, DecodeError, error_class

T = TypeVar("T")

_REFUSAL = msgspec.json.Decoder(Envelope[object])
_SHOWABLE = re.compile(r"[A-Za-z0-9_.\[\]?-]{1,200}")
"""Codes, request ids and paths of fields look like this. What does not may hold anything, since
a proxy may have written it, and is not printed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a call, of whatever status.

    Attributes:
        operation: The method that was called, such as `users.get`.
        sent_id: The request id that the call was sent with.
        attempts: How often the service was asked until it came.
        elapsed: Seconds from the start of the call.
    """

    operation: str
    reply: Reply
    sent_id: str
    attempts: int = 1
    elapsed: float = 0.0

    @classmethod
    def of(cls, operation: str, response: httpx.Response, sent_id: str) -> Answer:
        """Return the answer that a response is, which was read."""
        reply = Reply(response.status_code, response.headers, response.content)
        return cls(operation, reply, sent_id)

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.reply.status

    @property
    def is_success(self) -> bool:
        """Whether the status tells of success."""
        return 200 <= self.status < 300

    @property
    def is_replayed(self) -> bool:
        """Whether it was recorded when the write was made: things may be otherwise by now."""
        replayed: str | None = self.reply.headers.get("Idempotency-Replayed")
        return replayed == "true"

    @property
    def etag(self) -> str | None:
        """The ETag, if there is one."""
        etag: str | None = self.reply.headers.get("ETag")
        return etag

    def known_etag(self) -> str:
        """Return the ETag; raises `DecodeError` if there is none."""
        if self.etag is None:
            raise self._undecodable("no ETag")
        return self.etag

    def data(self, decoder: msgspec.json.Decoder[Envelope[T]]) -> T:
        """Return the data; raises `DecodeError`."""
        try:
            data = decoder.decode(self.reply.body).data
        except msgspec.MsgspecError as error:
            # its text gives types and the path, never a value
            raise self._undecodable(str(error)) from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise self._undecodable(type(error).__name__) from None
        if data is None:
            raise self._undecodable("no data")
        return data

    def error(self, now: datetime) -> ApiError:
        """Return the error of a refusal, also of one that no envelope tells of.

        Args:
            now: The time by the client's clock: `Retry-After` may be a date.
        """
        refusal = self._refusal()
        code = _showable(refusal.code) if refusal else None
        details = refusal.details if refusal else ()
        request_id = self._request_id(refusal)
        fields = ", ".join(field for detail in details if (field := _showable(detail.field)))
        return error_class(self.status)(
            f"{self.operation}: {self.status}"
            + (f" {code}" if code else "")
            + (f": {fields}" if fields else "")
            + f" (request id {request_id})",
            code=code,
            request_id=request_id,
            status=self.status,
            details=details,
            etag=self.reply.headers.get("ETag"),
            retry_after=_seconds(self.reply.headers.get("Retry-After", ""), now),
        )

    def _refusal(self) -> Error | None:
        try:
            return _REFUSAL.decode(self.reply.body).error
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def _request_id(self, refusal: Error | None = None) -> str:
        named = (refusal and refusal.request_id) or self.reply.headers.get("X-Request-ID")
        return _showable(named or "") or self.sent_id

    def _undecodable(self, reason: str) -> DecodeError:
        """Return the error of an answer that is not what was asked for."""
        request_id = self._request_id()
        return DecodeError(
            f"{self.operation}: {self.status}, {reason} (request id {request_id})",
            request_id=request_id,
            status=self.status,
            attempts=self.attempts,
            elapsed=self.elapsed,
            maybe_processed=self.is_success,
        )


def _showable(text: str) -> str | None:
    return text if _SHOWABLE.fullmatch(text) else None


def _seconds(retry_after: str, now: datetime) -> float | None:
    """Return the seconds of a `Retry-After`, a number or a date (RFC 9110, section 10.2.3)."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        at = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    if at.tzinfo is None:  # "-0000", or an old form without a zone: HTTP dates are in UTC
        at = at.replace(tzinfo=UTC)
    return max(0.0, (at - now).total_seconds())
