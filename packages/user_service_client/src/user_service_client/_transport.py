"""One attempt: a request is sent, and its whole answer read, or one of our errors is raised.

The only module that knows what httpx transports raise.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx

from user_service_client.errors import DecodeError, MaybeProcessed, NotSent, UserServiceError

MAX_CONNECTIONS = 100
KEEPALIVE_EXPIRY = 30.0
"""Seconds that an idle connection is kept: less than the 60 s after which load balancers drop one,
since a request on a connection that is just being dropped counts as maybe processed."""

_NOT_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)
"""What can only be raised before the first byte of a request. Not `LocalProtocolError`: HTTP/2
transports raise it in the middle of an exchange, too."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, read to its end."""

    status: int
    headers: httpx.Headers
    body: bytes


class Attempt:
    """The context of one attempt, and how far it has come.

    Attributes:
        may_have_left: Whether a byte of the request may have been sent.
    """

    def __init__(self, operation: str, request_id: str) -> None:
        self.operation = operation
        self.request_id = request_id
        self.may_have_left = False

    async def trace(self, event: str, _info: object) -> None:
        """Follow httpcore's events (the `trace` extension of a request)."""
        if event.endswith("send_request_headers.started"):
            self.may_have_left = True


class Transport:
    """Sends single requests over an httpx transport, which it owns.

    The transport is used without `httpx.AsyncClient`: that would add redirects, cookies and the
    proxies of the environment, none of which a call inside a cluster should follow.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport | None) -> None:
        self._reports = transport is None
        self._transport = transport or httpx.AsyncHTTPTransport(
            limits=httpx.Limits(
                max_connections=MAX_CONNECTIONS,
                max_keepalive_connections=MAX_CONNECTIONS,
                keepalive_expiry=KEEPALIVE_EXPIRY,
            )
        )
        # A request that is cancelled inside httpcore 1.0.9, in its queue or in an exchange, can
        # leave a connection that nobody opens or closes, until none is left (encode/httpcore#1093).
        # So nothing waits in its queue, and an exchange goes on without its cancelled call.
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._exchanges: set[asyncio.Task[Reply]] = set()

    async def send(self, request: httpx.Request, attempt: Attempt) -> Reply:
        """Send `request` and return the answer, whatever its status.

        Raises:
            NotSent: no connection could be had.
            MaybeProcessed: no whole answer came back.
            DecodeError: the answer's content coding is broken.
        """
        if self._reports:
            request.extensions["trace"] = attempt.trace
        else:
            attempt.may_have_left = True
        try:
            return await (self._undisturbed(request) if self._reports else self._exchange(request))
        except _NOT_SENT as error:
            raise self._failed(NotSent, attempt, error) from error
        except httpx.DecodingError as error:
            raise self._failed(DecodeError, attempt, error) from error
        except httpx.LocalProtocolError as error:
            # h11 quotes a header that it refuses, and that may be the key
            raise self._failed(MaybeProcessed, attempt, error) from None
        except (httpx.HTTPError, OSError) as error:
            raise self._failed(MaybeProcessed, attempt, error) from error

    async def _undisturbed(self, request: httpx.Request) -> Reply:
        """Exchange in a task of its own, which a cancelled call leaves to end by its time-outs."""
        await self._slots.acquire()
        exchange = asyncio.create_task(self._exchange(request))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._ended)
        return await asyncio.shield(exchange)

    def _ended(self, exchange: asyncio.Task[Reply]) -> None:
        self._slots.release()
        self._exchanges.discard(exchange)
        if not exchange.cancelled():
            exchange.exception()  # of a call that was cancelled, nobody asks for it

    async def _exchange(self, request: httpx.Request) -> Reply:
        response = await self._transport.handle_async_request(request)
        response.request = request
        try:
            body = await response.aread()
        finally:
            await response.aclose()
        return Reply(status=response.status_code, headers=response.headers, body=body)

    @staticmethod
    def _failed(
        error_class: type[UserServiceError], attempt: Attempt, error: Exception
    ) -> UserServiceError:
        return error_class(
            f"{attempt.operation}: {type(error).__name__} (request id {attempt.request_id})",
            request_id=attempt.request_id,
        )

    async def aclose(self) -> None:
        """Close the connections, and with them what is still under way."""
        await self._transport.aclose()
        await asyncio.gather(*self._exchanges, return_exceptions=True)
