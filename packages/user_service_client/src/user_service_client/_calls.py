"""One call: its address, headers and deadline. What every method of the client goes through."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TypeAlias, TypedDict
from urllib.parse import quote, urlencode
from uuid import UUID, uuid4

import httpx
import msgspec
from user_service_schemas import Request

from user_service_client._answers import Answer
from user_service_client._transport import Attempt, Transport
from user_service_client.errors import DeadlineExceeded, UserServiceError

AFTERLIFE = 0.5
"""Seconds by which an exchange may outlive the call that it was made for."""

ApiKey: TypeAlias = str | Callable[[], str] | Callable[[], Awaitable[str]]
"""A service key, or a function that returns the current one; it is asked at each call."""

Id: TypeAlias = str | UUID
"""The id of a user or a device."""


class CallOptions(TypedDict, total=False):
    """What every method takes as keywords.

    Keys:
        timeout: The total deadline of the call in seconds; None or omitted: the client's own.
        headers: Further headers; they override those that the client would send.
    """

    timeout: float | None
    headers: Mapping[str, str] | None


class WriteOptions(CallOptions, total=False):
    """What every method that changes a user takes as keywords.

    Keys:
        if_match: An ETag as `get_with_etag` returns it. The write happens only if the user's
            version is still that one, else `VersionMismatch` is raised. None: it happens anyway.
    """

    if_match: str | None


@dataclass(frozen=True, slots=True)
class Call:
    """What is to be called. `operation` is the method's name, such as `users.get`."""

    operation: str
    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    body: Request | None = field(default=None, repr=False)
    timeout: float | None = None
    headers: Mapping[str, str] | None = field(default=None, repr=False)
    if_match: str | None = None


class Calls:
    """Makes calls to one service."""

    def __init__(
        self, base_url: str, *, api_key: ApiKey | None, timeout: float, transport: Transport
    ) -> None:
        self.timeout = timeout
        self._base_url = _checked_base_url(base_url)
        self._api_key = _checked_key(api_key) if isinstance(api_key, str) else api_key
        self._transport = transport
        self._user_agent = f"user-service-client/{version('user-service-client')}"

    async def send(self, call: Call) -> Answer:
        """Make `call` and return the answer, whatever its status.

        Raises:
            NotSent, MaybeProcessed, DeadlineExceeded, DecodeError: there is no answer.
        """
        started = time.monotonic()
        headers = self._headers(call)
        attempt = Attempt(call.operation, headers["X-Request-ID"])
        timeout = self.timeout if call.timeout is None else call.timeout
        deadline = asyncio.timeout(timeout)
        try:
            async with deadline:
                if "Authorization" not in headers and self._api_key is not None:
                    headers["Authorization"] = f"Bearer {await self._key(self._api_key)}"
                reply = await self._transport.send(self._request(call, headers, timeout), attempt)
        except UserServiceError as error:
            error.elapsed = time.monotonic() - started
            raise
        except TimeoutError:
            if not deadline.expired():  # then it is the key's function that raised it
                raise
            sent = "maybe processed" if attempt.may_have_left else "not sent"
            raise DeadlineExceeded(
                f"{call.operation}: no answer within {timeout:g} s, {sent} "
                f"(request id {attempt.request_id})",
                maybe_processed=attempt.may_have_left,
                request_id=attempt.request_id,
                elapsed=time.monotonic() - started,
            ) from None
        return Answer(call.operation, reply, attempt.request_id, time.monotonic() - started)

    def _headers(self, call: Call) -> httpx.Headers:
        headers = httpx.Headers(
            {
                "Accept": "application/json",
                "User-Agent": self._user_agent,
                # made here, so that a call without an answer can be found in the logs, too
                "X-Request-ID": uuid4().hex,
            }
        )
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        if call.if_match is not None:
            headers["If-Match"] = call.if_match
        headers.update(call.headers)
        return headers

    def _request(self, call: Call, headers: httpx.Headers, timeout: float) -> httpx.Request:
        # For an exchange whose call was given up: the deadline of the call itself comes sooner.
        limits = dict.fromkeys(("connect", "read", "write", "pool"), timeout + AFTERLIFE)
        query = f"?{urlencode(call.params)}" if call.params else ""
        return httpx.Request(
            call.method,
            f"{self._base_url}{call.path}{query}",
            headers=headers,
            content=None if call.body is None else msgspec.json.encode(call.body),
            extensions={"timeout": limits},
        )

    @staticmethod
    async def _key(key: ApiKey) -> str:
        if isinstance(key, str):
            return key
        made = key()
        return _checked_key(made if isinstance(made, str) else await made)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()


def user_path(user_id: Id, rest: str = "") -> str:
    """Return the path of a user, or of `rest` below it; raises `ValueError` as `segment`."""
    return f"/api/v1/users/{segment(user_id)}{rest}"


def segment(id_: Id) -> str:
    """Return an id as a part of a path.

    Raises:
        ValueError: it is empty, `.` or `..`, which would make it another path.
    """
    text = str(id_)
    if text in {"", ".", ".."}:
        raise ValueError("an id is expected")
    return quote(text, safe="")


def page_params(page_size: int | None, cursor: str | None) -> dict[str, str]:
    """Return the query of a page of a keyset listing."""
    size = {} if page_size is None else {"limit": str(page_size)}
    return size if cursor is None else {**size, "cursor": cursor}


def _checked_base_url(base_url: str) -> str:
    url = httpx.URL(base_url)
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("base_url must be an http or https URL with a host")
    if url.userinfo or url.query or url.fragment:
        raise ValueError("base_url must have no user, query or fragment; keys go to api_key")
    return base_url.rstrip("/")


def _checked_key(key: str) -> str:
    # checked here and without a quotation: a header that is refused further below is quoted
    if not key.isascii() or not key.isprintable() or key != key.strip() or not key:
        raise ValueError("api_key is empty, or has characters that a header cannot carry")
    return key
