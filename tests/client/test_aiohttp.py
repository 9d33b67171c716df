"""The default transport, on real sockets: what goes out, what comes back, and how it fails."""

from __future__ import annotations

import asyncio
import gc
import gzip
import os
import random
import re
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import httpx
import pytest
import trustme
from aiohttp import http_exceptions
from aiohttp.client_proto import ResponseHandler
from user_service_client import _aiohttp
from user_service_client._aiohttp import AiohttpTransport
from user_service_client._transport import Attempt, Origin, Outgoing, Reply

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Handler = Callable[[Reader, Writer], Awaitable[None]]
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    """Serves TCP connections; keeps how many there were, and what came in."""

    def __init__(self) -> None:
        self.url = ""
        self.connections = 0
        self.requests: list[bytes] = []
        self.open: set[asyncio.Task[None]] = set()

    async def request(self, reader: Reader) -> bytes:
        """Read a request without a body."""
        request = await reader.readuntil(b"\r\n\r\n")
        self.requests.append(request)
        return request


@asynccontextmanager
async def serving(
    handler: Callable[[Server, Reader, Writer], Awaitable[None]],
    context: ssl.SSLContext | None = None,
) -> AsyncIterator[Server]:
    served = Server()

    async def serve(reader: Reader, writer: Writer) -> None:
        try:
            await handler(served, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    def accept(reader: Reader, writer: Writer) -> None:
        served.connections += 1
        task = asyncio.create_task(serve(reader, writer))
        served.open.add(task)
        task.add_done_callback(served.open.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context, backlog=1000)
    scheme = "http" if context is None else "https"
    served.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield served
    finally:
        server.close()
        for task in served.open:
            task.cancel()
        await asyncio.gather(*served.open, return_exceptions=True)


async def keep_answering(server: Server, reader: Reader, writer: Writer) -> None:
    while True:
        await server.request(reader)
        writer.write(ANSWER)


def answers(*parts: bytes) -> Callable[[Server, Reader, Writer], Awaitable[None]]:
    """Answer one request with these bytes, then close."""

    async def handle(server: Server, reader: Reader, writer: Writer) -> None:
        await server.request(reader)
        for part in parts:
            writer.write(part)
            await writer.drain()

    return handle


async def never(server: Server, reader: Reader, _: Writer) -> None:
    await server.request(reader)
    await asyncio.Event().wait()


@pytest.fixture
async def transport() -> AsyncIterator[AiohttpTransport]:
    async with AiohttpTransport() as made:
        yield made


def request(url: str, method: str = "GET", **limits: float) -> httpx.Request:
    return httpx.Request(method, url, extensions={"timeout": {"read": 5.0, "pool": 5.0, **limits}})


async def call(transport: httpx.AsyncBaseTransport, request: httpx.Request) -> bytes:
    response = await transport.handle_async_request(request)
    try:
        return await response.aread()
    finally:
        await response.aclose()


# Past httpx


ORIGIN_OF = re.compile(r"(\w+)://([^:]+):(\d+)")


async def sent_directly(transport: AiohttpTransport, url: str, **headers: str) -> Reply:
    scheme, host, port = ORIGIN_OF.findall(url)[0]
    outgoing = Outgoing("GET", "/a?b=c", {"Host": f"{host}:{port}", **headers}, b"")
    return await transport.send(Origin(scheme, host, int(port)), outgoing, Attempt("a.b", "r"))


async def test_a_call_past_httpx_goes_out_as_one_through_it(transport: AiohttpTransport) -> None:
    async with serving(keep_answering) as server:
        reply = await sent_directly(transport, server.url, Accept="a/b")
        headers = {"Host": server.url.removeprefix("http://"), "Accept": "a/b"}
        whole = httpx.Request("GET", f"{server.url}/a?b=c", headers=headers)
        assert await call(transport, whole) == reply.body
    assert server.requests[0] == server.requests[1]
    assert server.connections == 1


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_call_past_httpx_gets_a_body_that_comes_late_or_compressed(
    transport: AiohttpTransport, is_chunked: bool
) -> None:
    body = gzip.compress(b"whole")
    head = b"HTTP/1.1 200 OK\r\nX-Case: Kept\r\nContent-Encoding: gzip\r\n"
    framed = (b"%x\r\n" % len(body), body, b"\r\n0\r\n\r\n") if is_chunked else (body[:5], body[5:])
    length = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body)
    async with serving(answers(head + length + b"\r\n\r\n", *framed)) as server:
        reply = await sent_directly(transport, server.url)
    assert (reply.status, reply.body) == (200, b"whole")
    assert reply.headers["x-case"] == "Kept"


async def test_what_no_header_can_carry_is_not_sent_past_httpx_either(
    transport: AiohttpTransport,
) -> None:
    async with serving(keep_answering) as server:
        for value in ("a\r\nb: c", "a\nb", "a\0", "\u20ac"):
            with pytest.raises(httpx.LocalProtocolError):
                await sent_directly(transport, server.url, Accept=value)
    assert server.requests == []


# What goes out


async def test_the_request_goes_out_byte_for_byte(transport: AiohttpTransport) -> None:
    async with serving(keep_answering) as server:
        url = f"{server.url}/a%2Fb/%7Eé?x=%20y&z=a+b&k=%3a"
        headers = [("X-One", "1"), ("x-one", "2"), ("Host", "elsewhere"), ("aCCept", "a/b")]
        await call(transport, httpx.Request("GET", url, headers=headers))
    (sent,) = server.requests
    assert sent == (
        b"GET /a%2Fb/%7E%C3%A9?x=%20y&z=a+b&k=%3a HTTP/1.1\r\n"
        b"X-One: 1\r\nx-one: 2\r\nHost: elsewhere\r\naCCept: a/b\r\n\r\n"
    )


async def test_host_and_content_length_are_added_where_they_are_missing(
    transport: AiohttpTransport,
) -> None:
    async with serving(keep_answering) as server:
        bare = httpx.Request("POST", server.url, stream=httpx.ByteStream(b"\r\n\r\n"))
        assert not bare.headers
        await call(transport, bare)
    host = server.url.removeprefix("http://").encode()
    assert server.requests[0] == b"POST / HTTP/1.1\r\nHost: %b\r\nContent-Length: 4\r\n\r\n" % host


@pytest.mark.parametrize(
    ("headers", "sent"),
    [
        ({}, b"8\r\nabcdefgh\r\n0\r\n\r\n"),
        ({"Content-Length": "8"}, b"abcdefgh"),
    ],
    ids=["in-chunks", "of-known-length"],
)
async def test_the_body_may_be_a_stream(
    transport: AiohttpTransport, headers: dict[str, str], sent: bytes
) -> None:
    received = b""

    async def handle(server: Server, reader: Reader, writer: Writer) -> None:
        nonlocal received
        await server.request(reader)
        received = await reader.readexactly(len(sent))
        writer.write(ANSWER)

    async def body() -> AsyncIterator[bytes]:
        for part in (b"abc", b"", b"defgh"):
            yield part

    async with serving(handle) as server:
        await call(transport, httpx.Request("PUT", server.url, headers=headers, content=body()))
    assert received == sent


@pytest.mark.parametrize(
    "headers",
    [
        [("X-Key", "gehe\r\nim: 1")],
        [("X-Key", "geheim\n")],
        [("X-Key", "geheim\0")],
        [("X-Key: geheim\r\nX", "")],
        [("Content-Length ", "geheim")],
        [("Content-Length", "3"), ("Content-Length", "3")],
        [("Content-Length", "3"), ("Transfer-Encoding", "chunked")],
        [("Transfer-Encoding", "geheim, chunked")],
        [("Content-Length", "4")],
        [("Content-Length", "-3")],
        [("Content-Length", "geheim")],
    ],
    ids=str,
)
async def test_what_could_smuggle_is_refused_and_not_quoted(
    transport: AiohttpTransport, headers: list[tuple[str, str]]
) -> None:
    async with serving(keep_answering) as server:
        sneaky = httpx.Request("POST", server.url, headers=headers, stream=httpx.ByteStream(b"abc"))
        with pytest.raises(httpx.LocalProtocolError) as caught:
            await transport.handle_async_request(sneaky)
        assert "geheim" not in f"{caught.value!r} {caught.value.__cause__!r}"
        with pytest.raises(httpx.LocalProtocolError):
            await transport.handle_async_request(httpx.Request("GE T", server.url))
    assert server.connections == 0


async def test_the_trace_comes_before_the_first_byte(transport: AiohttpTransport) -> None:
    events: list[tuple[str, int]] = []

    async with serving(keep_answering) as server:

        async def trace(event: str, _: object) -> None:
            await asyncio.sleep(0.02)
            events.append((event, len(server.requests)))

        traced = request(server.url)
        traced.extensions["trace"] = trace
        await call(transport, traced)
        traced = request("http://127.0.0.1:1")
        traced.extensions["trace"] = trace
        with pytest.raises(httpx.ConnectError):
            await call(transport, traced)
    assert events == [("http11.send_request_headers.started", 0)]


# What comes back


async def test_the_answer_comes_as_it_was_sent(transport: AiohttpTransport) -> None:
    packed = gzip.compress(b"body")
    head = (
        b"HTTP/1.1 299 Sehr sch\xc3\xb6n\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\n"
        b"Location: /x\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    )
    async with serving(answers(b"HTTP/1.1 103 Early\r\nA: b\r\n\r\n", head + packed)) as server:
        response = await transport.handle_async_request(request(server.url))
        assert await response.aread() == b"body"
        await response.aclose()
    assert response.status_code == 299
    assert response.headers.raw[:3] == [
        (b"Set-Cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
        (b"Location", b"/x"),
    ]
    assert response.extensions["http_version"] == b"HTTP/1.1"
    assert response.extensions["reason_phrase"] == "Sehr schön".encode()


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_an_answer_without_a_body_leaves_the_connection_usable(
    transport: AiohttpTransport, method: str
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"
    if method == "GET":
        head = b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n"

    async def handle(server: Server, reader: Reader, writer: Writer) -> None:
        while True:
            await server.request(reader)
            writer.write(head)

    async with serving(handle) as server:
        for _ in range(3):
            assert await call(transport, request(server.url, method)) == b""
    assert server.connections == 1


async def test_events_are_read_as_they_come_and_a_silence_times_out(
    transport: AiohttpTransport,
) -> None:
    more = asyncio.Event()

    async def handle(server: Server, reader: Reader, writer: Writer) -> None:
        await server.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(4):
            await asyncio.sleep(0.1)
            writer.write(b"7\r\ndata: %d\r\n" % number)
        await more.wait()

    async with serving(handle) as server:
        response = await transport.handle_async_request(request(server.url, read=0.25))
        parts = response.aiter_raw()
        assert [await anext(parts) for _ in range(4)] == [b"data: %d" % n for n in range(4)]
        with pytest.raises(httpx.ReadTimeout):
            await anext(parts)
        more.set()
        await response.aclose()


async def test_a_large_body_waits_for_its_reader(transport: AiohttpTransport) -> None:
    body = os.urandom(3_000_000)

    async def handle(server: Server, reader: Reader, writer: Writer) -> None:
        while True:
            await server.request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async with serving(handle) as server:
        for _ in range(2):
            response = await transport.handle_async_request(request(server.url))
            await asyncio.sleep(0.1)
            assert await response.aread() == body
    assert server.connections == 1


# How it fails


async def refused(transport: AiohttpTransport, request: httpx.Request) -> httpx.TransportError:
    with pytest.raises(httpx.TransportError) as caught:
        await call(transport, request)
    return caught.value


FAILURES: dict[str, tuple[type[httpx.TransportError], tuple[bytes, ...]]] = {
    "no-answer": (httpx.RemoteProtocolError, ()),
    "half-a-head": (httpx.RemoteProtocolError, (b"HTTP/1.1 200 OK\r\nContent-Le",)),
    "no-http": (httpx.RemoteProtocolError, (b"geheim geheim geheim\r\n\r\n",)),
    "bad-header": (httpx.RemoteProtocolError, (b"HTTP/1.1 200 OK\r\ngeheim\0: 1\r\n\r\n",)),
    "another-protocol": (httpx.RemoteProtocolError, (b"HTTP/1.1 101 Yes\r\nUpgrade: x\r\n\r\n",)),
    "too-short": (httpx.RemoteProtocolError, (ANSWER[:-1],)),
    "no-last-chunk": (
        httpx.RemoteProtocolError,
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",),
    ),
    "bad-chunk": (
        httpx.RemoteProtocolError,
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"geheim\r\nok\r\n"),
    ),
}


@pytest.mark.parametrize(("error_class", "parts"), FAILURES.values(), ids=FAILURES)
async def test_no_whole_answer(
    transport: AiohttpTransport, error_class: type[httpx.TransportError], parts: tuple[bytes, ...]
) -> None:
    async with serving(answers(*parts)) as server:
        error = await refused(transport, request(server.url))
        assert type(error) is error_class
        assert "geheim" not in str(error)
        assert error.__cause__ is None  # aiohttp's error quotes the answer
        assert error.__suppress_context__
        assert len(server.requests) == 1  # and it was not sent again
        assert transport._pool is not None
        assert not transport._pool.exchanges


async def test_a_reset_is_a_read_error(transport: AiohttpTransport) -> None:
    async def reset(_: Server, reader: Reader, writer: Writer) -> None:
        await reader.readexactly(5)
        at_once = struct.pack("ii", 1, 0)  # makes the kernel send a reset
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        writer.transport.abort()

    async with serving(reset) as server:
        assert type(await refused(transport, request(server.url))) is httpx.ReadError


async def test_a_kept_connection_that_drops_a_request_does_not_get_it_again(
    transport: AiohttpTransport,
) -> None:
    async def once(server: Server, reader: Reader, writer: Writer) -> None:
        await server.request(reader)
        writer.write(ANSWER)
        await server.request(reader)

    async with serving(once) as server:
        assert await call(transport, request(server.url)) == b"ok"
        error = await refused(transport, request(server.url))
    assert type(error) is httpx.RemoteProtocolError
    assert len(server.requests) == 2


async def test_no_answer_in_time_is_a_read_timeout(transport: AiohttpTransport) -> None:
    async with serving(never) as server:
        assert type(await refused(transport, request(server.url, read=0.05))) is httpx.ReadTimeout
        assert type(await refused(transport, request(server.url, read=0))) is httpx.ReadTimeout


async def test_a_body_that_is_not_taken_in_time_is_a_write_timeout(
    transport: AiohttpTransport,
) -> None:
    arrived = asyncio.Event()

    async def take_the_head(server: Server, reader: Reader, _: Writer) -> None:
        await server.request(reader)
        arrived.set()
        await asyncio.Event().wait()

    async with serving(take_the_head) as server:
        large = request(server.url, "POST", write=0.3)
        large.stream = httpx.ByteStream(bytes(30_000_000))
        large.headers["Content-Length"] = "30000000"
        failing = asyncio.create_task(refused(transport, large))
        await arrived.wait()
        descriptors = _descriptors(transport)
        assert len(descriptors) == 1
        assert type(await failing) is httpx.WriteTimeout
        await asyncio.sleep(0.05)
        assert not any(map(_is_open, descriptors))  # nor does it wait until the rest is taken


@pytest.mark.parametrize("why", [b"", b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"])
async def test_a_body_that_is_refused_early(transport: AiohttpTransport, why: bytes) -> None:
    async def refuse(server: Server, reader: Reader, writer: Writer) -> None:
        await server.request(reader)
        writer.write(why)
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async with serving(refuse) as server:
        large = request(server.url, "POST", write=5)
        large.stream = httpx.ByteStream(bytes(30_000_000))
        large.headers["Content-Length"] = "30000000"
        if why:
            assert await call(transport, large) == b"no"
        else:
            assert type(await refused(transport, large)) is httpx.WriteError


async def test_a_refused_connection_is_a_connect_error(transport: AiohttpTransport) -> None:
    assert type(await refused(transport, request("http://127.0.0.1:1"))) is httpx.ConnectError
    assert type(await refused(transport, request("http://[::1]:1"))) is httpx.ConnectError
    assert type(await refused(transport, request("http://no.invalid"))) is httpx.ConnectError
    assert type(await refused(transport, request("ftp://a"))) is httpx.UnsupportedProtocol


async def test_a_name_that_is_not_found_in_time_is_a_connect_timeout(
    transport: AiohttpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", resolve)
    slow = request("http://some.invalid", connect=0.05)
    assert type(await refused(transport, slow)) is httpx.ConnectTimeout


async def test_waiting_for_a_connection_is_a_pool_timeout() -> None:
    async with serving(never) as server, AiohttpTransport(max_connections=1) as transport:
        first = asyncio.create_task(call(transport, request(server.url)))
        await asyncio.sleep(0.05)
        second = await refused(transport, request(server.url, pool=0.05))
        assert type(second) is httpx.PoolTimeout
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert len(server.requests) == 1


def _tree(error_class: type[BaseException]) -> Iterator[type[BaseException]]:
    yield error_class
    for below in error_class.__subclasses__():
        yield from _tree(below)


LOWER = sorted(
    {
        *_tree(aiohttp.ClientError),
        *_tree(http_exceptions.HttpProcessingError),
        aiohttp.EofStream,
        OSError,
        ConnectionResetError,
        TimeoutError,
        ValueError,
        UnicodeError,
        RuntimeError,
    },
    key=lambda lower: lower.__name__,
)


@pytest.mark.parametrize("lower", LOWER, ids=lambda lower: lower.__name__)
async def test_every_lower_error_is_mapped_by_where_it_happened(
    transport: AiohttpTransport, monkeypatch: pytest.MonkeyPatch, lower: type[Exception]
) -> None:
    error = lower.__new__(lower)

    async def fail(*_: object, **__: object) -> None:
        raise error

    expected = httpx.ReadTimeout if issubclass(lower, TimeoutError) else None
    async with serving(keep_answering) as server:
        with monkeypatch.context() as patch:
            patch.setattr(ResponseHandler, "read", fail)
            after = await refused(transport, request(server.url))
        with monkeypatch.context() as patch:
            patch.setattr(aiohttp.TCPConnector, "connect", fail)
            before = await refused(transport, request(server.url))
    assert type(after) in {expected or httpx.ReadError, expected or httpx.RemoteProtocolError}
    assert type(before) is (httpx.ConnectTimeout if expected else httpx.ConnectError)


# Connections


async def test_a_connection_is_used_again_until_it_is_old() -> None:
    async with serving(keep_answering) as server, AiohttpTransport(max_age=0.2) as transport:
        for _ in range(5):
            await call(transport, request(server.url))
        assert server.connections == 1
        await asyncio.sleep(0.25)
        for _ in range(5):
            await call(transport, request(server.url))
        assert server.connections == 2
        await asyncio.sleep(0.05)
        assert len(server.open) == 1  # the old one was closed


async def test_an_idle_connection_is_closed() -> None:
    async with (
        serving(keep_answering) as server,
        AiohttpTransport(keepalive_expiry=0.1) as transport,
    ):
        await call(transport, request(server.url))
        await asyncio.sleep(0.4)
        assert not server.open


@pytest.mark.parametrize(
    "last", [b"", b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"]
)
async def test_a_connection_that_the_server_ends_while_idle_is_not_used(
    transport: AiohttpTransport, monkeypatch: pytest.MonkeyPatch, last: bytes
) -> None:
    monkeypatch.setattr(_aiohttp, "UNNOTICED", 0.0)

    may_end = asyncio.Event()
    ended = asyncio.Event()

    async def end(server: Server, reader: Reader, writer: Writer) -> None:
        await server.request(reader)
        writer.write(ANSWER)
        await may_end.wait()
        may_end.clear()
        if last:
            writer.write(last)
        else:
            writer.close()
            await writer.wait_closed()
        ended.set()
        await asyncio.Event().wait()

    async with serving(end) as server:
        for _ in range(10):
            assert await call(transport, request(server.url)) == b"ok"
            may_end.set()
            await ended.wait()
            ended.clear()
    assert server.connections == 10


def test_an_end_that_the_loop_had_no_time_to_hear_of_is_noticed() -> None:
    ended = threading.Event()

    class OneAnswer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline() != b"\r\n":
                pass
            self.wfile.write(ANSWER)
            self.request.close()
            ended.set()

    async def main(url: str) -> None:
        async with AiohttpTransport() as transport:
            for _ in range(5):
                ended.clear()
                assert await call(transport, request(url)) == b"ok"
                threading.Event().wait(2 * _aiohttp.UNNOTICED)  # blocks the loop
                assert ended.is_set()

    with threads(OneAnswer) as url:
        asyncio.run(main(url))


# Cancellation


async def storm(transport: httpx.AsyncBaseTransport) -> int:
    """Cancel most of 2,000 calls, wherever they are; return how many of 30 then succeed."""
    chance = random.Random(7)  # noqa: S311

    async def slowly(server: Server, reader: Reader, writer: Writer) -> None:
        while True:
            await server.request(reader)
            await asyncio.sleep(chance.random() * 0.004)
            writer.write(ANSWER[:-2])
            await asyncio.sleep(chance.random() * 0.004)
            writer.write(ANSWER[-2:])

    async def hasty(url: str) -> None:
        try:
            async with asyncio.timeout(chance.random() * 0.03):
                await call(transport, request(url, connect=1.0))
        except (TimeoutError, httpx.PoolTimeout):
            pass

    async with serving(slowly) as server:
        for _ in range(20):
            await asyncio.gather(*(hasty(server.url) for _ in range(100)))
        healthy = (call(transport, request(server.url, pool=2.0, connect=2.0)) for _ in range(30))
        results = await asyncio.gather(*healthy, return_exceptions=True)
    return results.count(b"ok")


async def test_cancelled_calls_leave_nothing_behind() -> None:
    async with AiohttpTransport(max_connections=10) as transport:
        assert await storm(transport) == 30
        assert transport._pool is not None
        assert not transport._pool.exchanges
        assert transport._pool.slots._value == 10


async def test_httpx_own_pool_is_stuck_after_the_same() -> None:
    """Why there is another transport: when this fails, httpx may do (encode/httpcore#1093)."""
    async with httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=10)) as transport:
        assert await storm(transport) < 30


# The end


async def test_closing_is_quick_and_fails_what_is_under_way() -> None:
    async def half(server: Server, reader: Reader, writer: Writer) -> None:
        if b"/half" not in await server.request(reader):
            await asyncio.Event().wait()
        writer.write(ANSWER[:-1])
        await asyncio.Event().wait()

    async with serving(half) as server:
        transport = AiohttpTransport(max_connections=2)
        calls = [
            asyncio.create_task(refused(transport, request(f"{server.url}/{path}")))
            for path in ("half", "none", "waits", "waits")
        ]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(1):
            await transport.aclose()
            errors = [type(error) for error in await asyncio.gather(*calls)]
        assert errors == [httpx.ReadError, httpx.ReadError, httpx.ConnectError, httpx.ConnectError]
        with pytest.raises(RuntimeError, match="closed"):
            await transport.handle_async_request(request(server.url))
        await transport.aclose()


async def test_abandoning_in_a_running_loop_fails_what_is_under_way() -> None:
    async with serving(never) as server:
        transport = AiohttpTransport(max_connections=1)
        calls = [asyncio.create_task(refused(transport, request(server.url))) for _ in range(3)]
        await asyncio.sleep(0.05)
        transport.abandon()
        async with asyncio.timeout(1):
            errors = [type(error) for error in await asyncio.gather(*calls)]
        assert errors == [httpx.RemoteProtocolError, httpx.ConnectError, httpx.ConnectError]


@contextmanager
def threads(
    handler: type[socketserver.BaseRequestHandler], context: ssl.SSLContext | None = None
) -> Iterator[str]:
    """Serve in threads, and yield the URL."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            scheme = "http" if context is None else "https"
            yield f"{scheme}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class KeepsAnswering(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline():
            if line == b"\r\n":
                self.wfile.write(ANSWER)
                self.wfile.flush()


def _context(authority: trustme.CA | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    (authority or trustme.CA()).issue_cert("127.0.0.1").configure_cert(context)
    return context


def _descriptors(transport: AiohttpTransport) -> list[int]:
    assert transport._pool is not None
    connected = [
        protocol.transport.get_extra_info("socket")
        for protocol in transport._pool._lives
        if protocol.transport is not None
    ]
    return [connection.fileno() for connection in connected]


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("how", ["abandoned", "finalized", "used-in-another-loop"])
@pytest.mark.parametrize("loop_is", ["closed", "stopped"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_nothing_is_left_without_a_loop(how: str, loop_is: str, scheme: str) -> None:
    """Warnings are errors here, and those of finalizers, too."""
    context = _context() if scheme == "https" else None

    async def some(transport: AiohttpTransport, url: str) -> None:
        await asyncio.gather(*(call(transport, request(url)) for _ in range(3)))

    with threads(KeepsAnswering, context) as url:
        transport = AiohttpTransport(verify=False)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(some(transport, url))
        descriptors = _descriptors(transport)
        assert len(descriptors) == 3
        assert all(map(_is_open, descriptors))
        if loop_is == "closed":
            loop.close()
        if how == "abandoned":
            transport.abandon()
        if how != "finalized":
            again = asyncio.new_event_loop()
            again.run_until_complete(some(transport, url))
            again.run_until_complete(transport.aclose())
            again.close()
        del transport
        if loop_is == "stopped":
            loop.run_until_complete(asyncio.sleep(0.01))
        until = time.monotonic() + 5  # the server, which may have got a number again, closes, too
        while any(map(_is_open, descriptors)) and time.monotonic() < until:
            time.sleep(0.01)
        assert not any(map(_is_open, descriptors))
        loop.close()
        del loop
        gc.collect()


CHILD = """
import asyncio, gc, os, ssl, sys
import httpx
from user_service_client._aiohttp import AiohttpTransport
from user_service_client._transport import Attempt, Origin, Outgoing, Reply

url, authority = sys.argv[1:]

async def call():
    response = await transport.handle_async_request(httpx.Request("GET", url))
    assert await response.aread() == b"ok"
    await response.aclose()

transport = AiohttpTransport(verify=ssl.create_default_context(cafile=authority))
loop = asyncio.new_event_loop()
loop.run_until_complete(call())
(protocol,) = transport._pool._lives
descriptor = protocol.transport.get_extra_info("socket").fileno()
child = os.fork()
if child == 0:
    try:
        transport.abandon()
        try:
            os.fstat(descriptor)
        except OSError:
            asyncio.set_event_loop(None)
            ours = asyncio.new_event_loop()
            ours.run_until_complete(call())
            ours.run_until_complete(transport.aclose())
            os._exit(0)
    finally:
        os._exit(1)
assert os.waitpid(child, 0)[1] == 0
loop.run_until_complete(call())
loop.run_until_complete(transport.aclose())
loop.close()
"""


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_child_process_leaves_its_parent_the_connection(
    tmp_path: Path, scheme: str
) -> None:
    authority = trustme.CA()
    context = _context(authority) if scheme == "https" else None
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with serving(keep_answering, context) as server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-c", CHILD),
            *(server.url, str(tmp_path / "ca.pem")),
            stderr=asyncio.subprocess.PIPE,
        )
        _, printed = await process.communicate()
        assert printed == b""
        assert process.returncode == 0
        assert len(server.requests) == 3
        assert server.connections == 2  # the parent's, used again after the fork; and the child's


async def test_certificates_are_verified() -> None:
    async with serving(keep_answering, _context()) as server:
        async with AiohttpTransport() as transport:
            error = await refused(transport, request(server.url))
            assert type(error) is httpx.ConnectError
        async with AiohttpTransport(verify=False) as transport:
            assert await call(transport, request(server.url)) == b"ok"
