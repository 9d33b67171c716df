"""One attempt: a request is sent, and its whole answer read, or one of our errors is raised.

The only module that knows what httpx transports raise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeAlias

import httpx

from user_service_client._loops import Home
from user_service_client.errors import DecodeError, MaybeProcessed, NotSent, UserServiceError

TransportFactory: TypeAlias = Callable[[], httpx.AsyncBaseTransport]
"""A function that makes a transport; it is called for every event loop that a client comes to."""

_NOT_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)
"""What can only be raised before the first byte of a request. `LocalProtocolError` may be: HTTP/2
transports raise it in the middle of an exchange, too."""

_FAILURES = (httpx.HTTPError, httpx.StreamError, OSError)


class Origin(NamedTuple):
    """Where a service is."""

    scheme: str
    host: str
    port: int | None


class Outgoing(NamedTuple):
    """A request: `target` is path and query, escaped, and `Host` is among the headers."""

    method: str
    target: str
    headers: MutableMapping[str, str]
    body: bytes


class Reply(NamedTuple):
    """An answer, read to its end; its headers are found in whatever case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Attempt:
    """The context of one attempt, and how far it has come.

    Attributes:
        may_have_left: Whether a byte of the request may have been sent.
    """

    __slots__ = ("may_have_left", "operation", "request_id")

    def __init__(self, operation: str, request_id: str) -> None:
        self.operation = operation
        self.request_id = request_id
        self.may_have_left = False

    async def trace(self, event: str, _info: object) -> None:
        """Follow httpcore's events (the `trace` extension of a request)."""
        if event.endswith("send_request_headers.started"):
            self.may_have_left = True


class Direct(ABC):
    """A transport of ours: httpx's types can be gone past, and it can be left to its event loop."""

    @abstractmethod
    async def send(self, origin: Origin, request: Outgoing, attempt: Attempt) -> Reply:
        """Send a request and return the whole answer; raises as an httpx transport."""

    @abstractmethod
    def abandon(self) -> None:
        """Forget the connections, without an event loop."""


class Transport:
    """Sends single requests to one service over an httpx transport, which it owns.

    The transport is used without `httpx.AsyncClient`: that would add redirects, cookies and the
    proxies of the environment, none of which a call inside a cluster should follow.

    Its own is backed by aiohttp: a call that is cancelled inside httpx' pool (httpcore 1.0) can
    leave a connection that nobody opens or closes, until none is left (encode/httpcore#1093).

    Attributes:
        closings: How often it was closed: what began before then is not tried again.
    """

    def __init__(
        self,
        base_url: str,
        transport: httpx.AsyncBaseTransport | TransportFactory | None,
        home: Home,
    ) -> None:
        base = _checked_base_url(base_url)
        self._origin = Origin(base.scheme, base.raw_host.decode("ascii"), base.port)
        self._below = base.raw_path.decode("ascii").removesuffix("/")
        self.host = base.netloc.decode("ascii")
        self._given: httpx.AsyncBaseTransport | None = None
        if isinstance(transport, httpx.AsyncBaseTransport):
            given = self._given = transport
            self._make: TransportFactory = lambda: given
        else:
            self._make = transport or _default_transport(is_tls=base.scheme == "https")
        self._current: httpx.AsyncBaseTransport | None = self._given
        self._direct = _direct(self._current)
        self.closings = 0
        home.on_move(self.abandon)

    @property
    def has_connections(self) -> bool:
        """Whether there may be connections that are its own."""
        return self._given is None and self._current is not None

    async def send(self, request: Outgoing, limit: float, attempt: Attempt) -> Reply:
        """Send `request` and return the answer, whatever its status.

        Whoever calls waits for `limit` seconds, and no longer.

        Raises:
            NotSent: no connection could be had.
            MaybeProcessed: no whole answer came back.
            DecodeError: the answer's content coding is broken.
        """
        self._open()
        request = request._replace(target=self._below + request.target)
        try:
            if self._direct is not None:
                return await self._direct.send(self._origin, request, attempt)
            # Not by `stream`: its generator and what `aread` goes through take 15 µs.
            response = await self._begin(request, limit, attempt)
            try:
                body = await _whole(response)
            finally:
                await response.aclose()
        except _FAILURES as error:
            raise _ours(attempt, error) from _shown(error)
        return Reply(status=response.status_code, headers=response.headers, body=body)

    @asynccontextmanager
    async def stream(self, request: Outgoing, attempt: Attempt) -> AsyncIterator[httpx.Response]:
        """Send `request` and give the answer, to be read without a limit; raises as `send`."""
        request = request._replace(target=self._below + request.target)
        try:
            response = await self._begin(request, None, attempt)
            try:
                yield response
            finally:
                await response.aclose()
        except _FAILURES as error:
            raise _ours(attempt, error) from _shown(error)

    async def _begin(
        self, outgoing: Outgoing, limit: float | None, attempt: Attempt
    ) -> httpx.Response:
        transport = self._open()
        method, target, headers, body = outgoing
        extensions: dict[str, object] = {
            "timeout": dict.fromkeys(("connect", "read", "write", "pool"), limit)
        }
        # Of others than these nobody knows when a request leaves.
        if self._direct is not None or isinstance(transport, httpx.AsyncHTTPTransport):
            extensions["trace"] = attempt.trace
        else:
            attempt.may_have_left = True
        # Given as a stream, with all headers there, it takes 8 µs less: httpx looks for nothing.
        request = httpx.Request(
            method,
            f"{self._origin.scheme}://{self.host}{target}",
            headers=headers,
            stream=httpx.ByteStream(body),
            extensions=extensions,
        )
        request.read()
        response = await transport.handle_async_request(request)
        response.request = request
        return response

    def _open(self) -> httpx.AsyncBaseTransport:
        if self._current is None:
            self._current = self._make()
            self._direct = _direct(self._current)
        return self._current

    def abandon(self) -> None:
        """Let go of connections of another loop or process; one that was passed in stays."""
        if self._given is None:
            current: object = self._current
            self._current = None
            # Those of httpx have nothing that could be let go of without their loop.
            if isinstance(current, Direct):
                current.abandon()

    async def aclose(self) -> None:
        """Close the connections, and with them what is still under way."""
        self.closings += 1
        current, self._current = self._current, self._given
        if current is not None:
            await current.aclose()

    def forget(self) -> None:
        """Close the connections as far as that can be done without an event loop."""
        self.closings += 1
        self.abandon()


def _default_transport(is_tls: bool) -> TransportFactory:
    # With the first client, and not with the package: importing aiohttp takes 100 ms. Nor with the
    # first call, while others wait for the event loop: the context of TLS takes 25 ms.
    from user_service_client._aiohttp import AiohttpTransport, tls_context  # noqa: PLC0415

    if is_tls:
        tls_context(verify=True)
    return AiohttpTransport


def _direct(transport: object) -> Direct | None:
    return transport if isinstance(transport, Direct) else None


def _checked_base_url(base_url: str) -> httpx.URL:
    url = httpx.URL(base_url)
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("base_url must be an http or https URL with a host")
    if url.userinfo or url.query or url.fragment:
        raise ValueError("base_url must have no user, query or fragment; keys go to api_key")
    return httpx.URL(base_url.rstrip("/"))


async def _whole(response: httpx.Response) -> bytes:
    """Return the body of an answer; what is there already, and not compressed, at once."""
    stream = response.stream
    if isinstance(stream, httpx.ByteStream) and "Content-Encoding" not in response.headers:
        return b"".join(stream)
    return await response.aread()


def _ours(attempt: Attempt, error: Exception) -> UserServiceError:
    """Return what a transport's error is to the caller."""
    error_class: type[UserServiceError] = MaybeProcessed
    is_unwritable = isinstance(error, httpx.LocalProtocolError) and not attempt.may_have_left
    if isinstance(error, _NOT_SENT) or is_unwritable:
        error_class = NotSent
    elif isinstance(error, httpx.DecodingError):
        error_class = DecodeError
    return error_class(
        f"{attempt.operation}: {type(error).__name__} (request id {attempt.request_id})",
        request_id=attempt.request_id,
        maybe_processed=error_class is not NotSent,
    )


def _shown(error: Exception) -> Exception | None:
    """Return an error as a cause. h11 quotes a header that it refuses, and that may be the key."""
    return None if isinstance(error, httpx.LocalProtocolError) else error
