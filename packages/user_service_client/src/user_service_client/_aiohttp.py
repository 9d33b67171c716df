"""The default transport: httpx's types outside, aiohttp's connections and parser inside.

Calls go past httpx' types (`send`), which would take 20 µs of the 70 that a call costs; streams,
and whoever else wants a transport, use it as any other of httpx'.

httpx's own pool loses connections when requests are cancelled (encode/httpcore#1093), and is
several times slower at 100 concurrent calls. Of aiohttp only the connector (names, sockets, TLS,
keep-alive) and the protocol (parser, flow control) are used. Its session is not: it adds headers,
sends again by itself what a dropped connection may have delivered, and does not tell whether a
request had left when it failed. Here the request is written in one place, so that is known.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import aiohttp
import httpx
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import RawResponseMessage
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import StreamReader
from yarl import URL  # how aiohttp takes an address

from user_service_client._transport import Attempt, Direct, Origin, Outgoing, Reply

DNS_TTL = 10
"""Seconds that an address is kept: replicas move."""

UNNOTICED = 0.1
"""Seconds of idleness after which the event loop is asked once more whether the server has closed:
while the loop was busy with something else, it may not have heard of it."""

_Trace: TypeAlias = Callable[[str, dict[str, object]], Awaitable[None]]
_HEAD = re.compile(
    r"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [!-~]+ HTTP/1\.1\r\n"
    r"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t -~\x80-\xff]*\r\n)*\r\n"
)
_NO_LIMITS: dict[str, float | None] = {}
_FAILURES = (
    aiohttp.ClientError,
    aiohttp.EofStream,
    HttpProcessingError,
    OSError,
    RuntimeError,
    ValueError,
)
"""All that aiohttp raises: its two trees, and what it lets through."""


@cache
def tls_context(*, verify: bool) -> ssl.SSLContext:
    """Return the TLS settings of all connections of the process.

    Reading the authorities takes 25 ms, too long for an event loop: it is done once, and not for
    each loop that a transport comes to.
    """
    context = httpx.create_ssl_context(verify=verify)
    context.set_alpn_protocols(["http/1.1"])
    return context


class AiohttpTransport(Direct, httpx.AsyncBaseTransport):
    """Sends HTTP/1.1 requests, each at most once, over connections that are kept.

    Bodies are read before they are sent. Connections belong to one event loop of one process; a
    request from another one abandons them.

    Args:
        verify: As httpx takes it: True (certifi's authorities), False, or a context.
        max_connections: How many there may be; waiting for one is limited by the "pool" time-out.
        keepalive_expiry: Seconds that an idle connection is kept.
        max_age: Seconds after which a connection is not used again, or new replicas stay idle.
    """

    def __init__(
        self,
        *,
        verify: ssl.SSLContext | bool = True,
        max_connections: int = 100,
        keepalive_expiry: float = 30.0,
        max_age: float = 300.0,
    ) -> None:
        self._verify = verify
        self._max_connections = max_connections
        self._keepalive_expiry = keepalive_expiry
        self._max_age = max_age
        self._pool: _Pool | None = None
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`; the body of the answer is read as it is asked for.

        Raises:
            LocalProtocolError: the request cannot be written as HTTP; nothing was sent.
            PoolTimeout, ConnectTimeout, ConnectError: nothing was sent.
            WriteTimeout, WriteError, ReadTimeout, ReadError, RemoteProtocolError: it may have been.
        """
        stream = request.stream
        if not isinstance(stream, httpx.AsyncByteStream):
            raise TypeError("the body is a synchronous stream")
        url, headers = request.url, request.headers.raw
        data = _encoded(
            request.method,
            url.raw_path.decode("ascii"),
            [(name.decode("latin-1"), text.decode("latin-1")) for name, text in headers],
            url.netloc.decode("ascii"),
            b"".join([part async for part in stream]),
        )
        limits: dict[str, float | None] = request.extensions.get("timeout", {})
        origin = Origin(url.scheme, url.raw_host.decode("ascii"), url.port)
        trace: _Trace | None = request.extensions.get("trace")
        begun = await self._begin(origin, request.method, data, limits, trace)
        return _response(begun, begun.whole())

    async def send(self, origin: Origin, request: Outgoing, attempt: Attempt) -> Reply:
        """Send `request` and return the whole answer, which whoever calls waits for with a limit.

        Raises:
            DecodingError: the answer's content coding is broken.
            TransportError: as `handle_async_request`, but for time-outs.
        """
        method, target, headers, body = request
        data = _encoded(method, target, headers.items(), "", body)
        begun = await self._begin(origin, method, data, _NO_LIMITS, attempt.trace)
        status, named = begun.message.code, begun.message.headers
        whole = begun.whole()
        if whole is None or "Content-Encoding" in named:
            response = _response(begun, whole)
            try:
                whole = await response.aread()
            finally:
                await response.aclose()
        return Reply(status, named, whole)

    async def _begin(
        self,
        origin: Origin,
        method: str,
        data: bytes,
        limits: Mapping[str, float | None],
        trace: _Trace | None,
    ) -> _Begun:
        """Send a request, and return the beginning of its answer."""
        pool = self._opened_pool()
        exchange = await pool.exchange(self, _seconds(limits, "pool"))
        try:
            protocol = await pool.connect(exchange, origin, _seconds(limits, "connect"))
            if trace is not None:
                await trace("http11.send_request_headers.started", {})
            protocol.set_response_params(
                skip_payload=method == "HEAD",
                read_until_eof=True,
                auto_decompress=False,
                read_timeout=_seconds(limits, "read"),
            )
            await _write(protocol, data, _seconds(limits, "write"))
            return await _begun(exchange, protocol)
        except BaseException:
            exchange.end(reusable=False)
            raise

    def _opened_pool(self) -> _Pool:
        if self._closed:
            raise RuntimeError("the transport is closed")
        if self._pool is not None and not self._pool.is_ours():
            self.abandon()
        if self._pool is None:
            self._pool = _Pool(
                self._verify, self._max_connections, self._keepalive_expiry, self._max_age
            )
        return self._pool

    async def aclose(self) -> None:
        """Close the connections; what is still under way on them fails."""
        self._closed = True
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.aclose()

    def abandon(self) -> None:
        """Forget the connections, without an event loop; the next request opens new ones.

        For a child process after a fork, whose parent goes on using the same sockets (so they are
        closed here and not shut down, nor is TLS told), for an event loop that is closed, and for
        a finalizer. In an event loop that still runs, they are closed at its next turn.
        """
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.abandon()

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self.abandon()


class _Pool:
    """The connections of one event loop in one process."""

    def __init__(
        self,
        verify: ssl.SSLContext | bool,
        max_connections: int,
        keepalive_expiry: float,
        max_age: float,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._verify = verify
        self._max_age = max_age
        # Slots are counted here, where waiting for one and for the network have their own time-out.
        # getaddrinfo resolves, as it does for httpx, even where aiodns is installed.
        self._connector = aiohttp.TCPConnector(
            limit=0,
            keepalive_timeout=keepalive_expiry,
            ttl_dns_cache=DNS_TTL,
            resolver=aiohttp.ThreadedResolver(),
        )
        self.slots = asyncio.Semaphore(max_connections)
        self.exchanges: set[_Exchange] = set()
        self._closed = False
        self._origins: dict[Origin, aiohttp.ClientRequest] = {}
        self._unlimited = aiohttp.ClientTimeout()  # made once: that takes 3 µs
        # when a connection was opened, and last used
        self._lives: WeakKeyDictionary[ResponseHandler, list[float]] = WeakKeyDictionary()

    async def exchange(self, transport: AiohttpTransport, seconds: float | None) -> _Exchange:
        if seconds is None or not self.slots.locked():
            await self.slots.acquire()
        else:
            try:
                async with asyncio.timeout(seconds):
                    await self.slots.acquire()
            except TimeoutError as error:
                raise httpx.PoolTimeout("no connection was free in time") from error
        return _Exchange(self, transport)

    async def connect(
        self, exchange: _Exchange, origin: Origin, seconds: float | None
    ) -> ResponseHandler:
        """Return an open connection, which `exchange` then owns."""
        try:
            address = self._address(origin)
            timeout = aiohttp.ClientTimeout(connect=seconds) if seconds else self._unlimited
            while not self._closed:
                connection = await self._connector.connect(address, [], timeout)
                protocol = exchange.takes(connection)
                if await self._is_fit(protocol):
                    return protocol
                connection.close()
        except TimeoutError as error:
            raise httpx.ConnectTimeout("no connection was made in time") from error
        except _FAILURES as error:
            raise httpx.ConnectError(f"no connection: {type(error).__name__}") from error
        raise httpx.ConnectError("the transport is closed")

    async def _is_fit(self, protocol: ResponseHandler) -> bool:
        now = self.loop.time()
        life = self._lives.get(protocol)
        if life is None:
            self._lives[protocol] = [now, now]
            return True
        opened, used = life
        if now - opened > self._max_age:
            return False
        if now - used > UNNOTICED:
            await asyncio.sleep(0)  # the loop looks at its sockets,
            await asyncio.sleep(0)  # and tells the protocols
        # should_close: it sent something that nobody had asked for, such as a 408 before closing
        return protocol.is_connected() and not protocol.should_close

    def used(self, protocol: ResponseHandler) -> None:
        self._lives[protocol][1] = self.loop.time()

    def _address(self, origin: Origin) -> aiohttp.ClientRequest:
        """Return what the connector takes for an address: a request, which is never sent."""
        address = self._origins.get(origin)
        if address is None:
            context: ssl.SSLContext | bool = True
            if origin.scheme == "https":
                context = self._verify
                if isinstance(context, bool):
                    context = tls_context(verify=context)
            elif origin.scheme != "http":
                raise httpx.UnsupportedProtocol("the URL must begin with http:// or https://")
            url = URL.build(scheme=origin.scheme, host=origin.host, port=origin.port)
            address = aiohttp.ClientRequest("GET", url, loop=self.loop, ssl=context)
            self._origins[origin] = address
        return address

    async def aclose(self) -> None:
        self._closed = True
        for exchange in list(self.exchanges):
            exchange.fail(aiohttp.ClientConnectionError("the transport was closed"))
        await self._connector.close()

    def abandon(self) -> None:
        self._closed = True
        exchanges = list(self.exchanges)
        self.exchanges.clear()
        self._connector._closed = True  # so that it touches no socket, nor warns in __del__
        transports: list[asyncio.Transport] = []
        for reference in self._lives.keyrefs():
            protocol = reference()
            if protocol is not None and protocol.transport is not None:
                transports.append(protocol.transport)
                protocol.transport = None
        for exchange in exchanges:
            if exchange.connection is not None:
                exchange.connection.close()
        if self.usable():
            with suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._abort, transports, len(exchanges))
                return
        for transport in transports:
            _drop(transport)

    def usable(self) -> bool:
        """Tell whether the event loop is there, and not another process's."""
        return self._pid == os.getpid() and not self.loop.is_closed()

    def is_ours(self) -> bool:
        """Tell whether the event loop is the one that runs here."""
        return self.usable() and self.loop is asyncio.get_running_loop()

    def _abort(self, transports: list[asyncio.Transport], slots: int) -> None:
        for transport in transports:
            transport.abort()
        for _ in range(slots):
            self.slots.release()  # who waits for one wakes, and fails


class _Exchange:
    """A slot of the pool, then the connection in it, until the answer is read or given up."""

    __slots__ = ("_pool", "_transport", "connection", "payload")

    def __init__(self, pool: _Pool, transport: AiohttpTransport) -> None:
        self._pool = pool
        self._transport = transport  # whose finalizer would abandon the pool
        self.connection: Connection | None = None
        self.payload: StreamReader | None = None
        pool.exchanges.add(self)

    def takes(self, connection: Connection) -> ResponseHandler:
        self.connection = connection
        protocol = connection.protocol
        assert protocol is not None  # noqa: S101 - it is new
        return protocol

    def end(self, *, reusable: bool) -> None:
        """Give connection and slot back; a second call does nothing."""
        pool = self._pool
        if self not in pool.exchanges:
            return
        if not reusable and not pool.usable():  # a coroutine that outlived its loop
            pool.abandon()
            return
        pool.exchanges.remove(self)
        connection, self.connection = self.connection, None
        if connection is not None and (protocol := connection.protocol) is not None:
            if reusable:
                pool.used(protocol)
                connection.release()
            else:
                # not closed: that would first send what is left, to a server that may not read
                if protocol.transport is not None:
                    protocol.transport.abort()
                connection.close()
        pool.slots.release()

    def fail(self, error: Exception) -> None:
        """End it while somebody waits for it."""
        if self.payload is not None:
            self.payload.set_exception(error)
        if self.connection is not None and (protocol := self.connection.protocol) is not None:
            protocol.set_exception(error)
        self.end(reusable=False)


class _Body(httpx.AsyncByteStream):
    """The rest of an answer."""

    def __init__(self, exchange: _Exchange, payload: StreamReader) -> None:
        self._exchange = exchange
        self._payload = payload

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while chunk := await self._payload.readany():
                yield chunk
        except _FAILURES as error:
            self._exchange.end(reusable=False)
            raise _unread(error) from None
        self._exchange.end(reusable=True)

    async def aclose(self) -> None:
        self._exchange.end(reusable=self._payload.at_eof())


class _Begun(NamedTuple):
    """An answer of which the head is there, and perhaps all of it."""

    exchange: _Exchange
    message: RawResponseMessage
    payload: StreamReader

    def whole(self) -> bytes | None:
        """Return the body if it is all there, as it mostly is: it need not be waited for."""
        payload = self.payload
        if not payload.is_eof() or payload.exception() is not None:
            return None
        body = payload.read_nowait()
        self.exchange.end(reusable=True)
        return body


async def _begun(exchange: _Exchange, protocol: ResponseHandler) -> _Begun:
    try:
        while True:
            protocol.start_timeout()
            message, payload = await protocol.read()
            if message.code >= 200:
                break
            if message.code == 101:
                raise HttpProcessingError(message="nobody asked for another protocol")
    except _FAILURES as error:
        raise _unread(error) from None
    return _Begun(exchange, message, payload)


def _response(begun: _Begun, whole: bytes | None) -> httpx.Response:
    exchange, message, payload = begun
    stream: httpx.AsyncByteStream
    if whole is not None:
        stream = httpx.ByteStream(whole)
    else:
        exchange.payload = payload
        stream = _Body(exchange, payload)
    return httpx.Response(
        message.code,
        headers=list(message.raw_headers),
        stream=stream,
        extensions={
            "http_version": b"HTTP/%d.%d" % message.version,
            "reason_phrase": message.reason.encode("utf-8", "surrogateescape"),
        },
    )


def _encoded(
    method: str, target: str, headers: Iterable[tuple[str, str]], host: str, body: bytes
) -> bytes:
    """Return a request as it goes out; `host` stands for a header that is not there."""
    lines = [f"{method} {target} HTTP/1.1"]
    framing: list[tuple[str, str]] = []
    for name, value in headers:
        lines.append(f"{name}: {value}")
        match name.lower():
            case "host":
                host = ""
            case "content-length" | "transfer-encoding" as kind:
                framing.append((kind, value))
            case _:
                pass
    if host:
        lines.insert(1, f"Host: {host}")
    length = str(len(body))
    if framing == [("transfer-encoding", "chunked")]:
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    elif framing and framing != [("content-length", length)]:
        raise httpx.LocalProtocolError("the headers tell another length than the body has")
    elif body and not framing:
        lines.append(f"Content-Length: {length}")
    head = "\r\n".join((*lines, "", ""))
    # the count finds what is well-formed, but more than one header
    if _HEAD.fullmatch(head) is None or head.count("\r\n") != len(lines) + 1:
        raise httpx.LocalProtocolError("method or header has a character that it cannot carry")
    return head.encode("latin-1") + body


async def _write(protocol: ResponseHandler, data: bytes, seconds: float | None) -> None:
    transport = protocol.transport
    if transport is None or transport.is_closing():
        raise httpx.ConnectError("the connection was lost before anything was sent")
    transport.write(data)
    if protocol.writing_paused:
        try:
            async with asyncio.timeout(seconds):
                await protocol._drain_helper()
        except TimeoutError as error:
            raise httpx.WriteTimeout("the request was not taken in time") from error
        except _FAILURES as error:
            if not len(protocol):  # else it was refused early, and the answer says why
                raise httpx.WriteError(type(error).__name__) from error


def _seconds(limits: Mapping[str, float | None], kind: str) -> float | None:
    seconds = limits.get(kind)
    return seconds if seconds is None else max(seconds, 1e-6)  # to aiohttp 0 is no limit


def _unread(error: Exception) -> httpx.TransportError:
    """Return what it is called that there is no whole answer.

    Without aiohttp's text, and not to be chained: that quotes the answer, which is personal data.
    """
    name = type(error).__name__
    if isinstance(error, TimeoutError):
        return httpx.ReadTimeout("the server did not answer in time")
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return httpx.RemoteProtocolError("the server closed the connection and did not answer")
    if isinstance(error, aiohttp.ClientConnectionError | OSError):
        return httpx.ReadError(f"the connection was lost: {name}")
    return httpx.RemoteProtocolError(f"the answer is malformed or cut off: {name}")


def _drop(transport: asyncio.Transport) -> None:
    """Close a socket behind its transport's back, whose event loop must not be asked.

    After a fork the loop's epoll is the parent's, too: to unregister here would do it there.
    """
    with suppress(Exception):
        tls = getattr(transport, "_ssl_protocol", None)
        if tls is not None:
            transport._closed = True  # type: ignore[attr-defined]  # else its __del__ warns
            transport = tls._transport
        sock = transport._sock  # type: ignore[attr-defined]
        transport._sock = None  # type: ignore[attr-defined]  # else its __del__ warns
        sock.close()
