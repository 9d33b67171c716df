"""Deadlines and connections, on real sockets."""

from __future__ import annotations

import asyncio
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from user_service_client import (
    DeadlineExceeded,
    MaybeProcessed,
    NotSent,
    UserServiceClient,
    UserServiceError,
)
from user_service_client._aiohttp import AiohttpTransport

from tests.client.conftest import USER, USER_ID, envelope

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
BODY = envelope(USER)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """Serve TCP connections and yield the URL."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_connections_are_used_again() -> None:
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ANSWER)

    async with serving(answer) as url, UserServiceClient(url) as client:
        for _ in range(3):
            assert (await client.users.get(USER_ID)).name == "John Doe"
    assert connections == 1


async def test_a_refused_connection_was_not_sent() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        async with UserServiceClient(f"http://127.0.0.1:{taken.getsockname()[1]}") as client:
            with pytest.raises(NotSent):
                await client.users.get(USER_ID)


async def test_a_connection_dropped_after_sending_may_have_been_processed() -> None:
    async def drop(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with serving(drop) as url, UserServiceClient(url) as client:
        with pytest.raises(MaybeProcessed):
            await client.users.create(name="J", email="john@example.com")


async def test_the_deadline_says_that_the_request_had_left() -> None:
    async def never(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.Event().wait()

    async with serving(never) as url, UserServiceClient(url, timeout=0.1) as client:
        with pytest.raises(DeadlineExceeded) as caught:
            await client.users.delete(USER_ID)
    assert caught.value.maybe_processed
    assert caught.value.elapsed >= 0.1
    assert caught.value.request_id
    assert "within 0.1 s, maybe processed" in str(caught.value)


async def test_the_deadline_counts_the_wait_for_a_connection() -> None:
    arrived = asyncio.Event()

    async def never(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        arrived.set()
        await asyncio.Event().wait()

    def transport() -> AiohttpTransport:
        return AiohttpTransport(max_connections=1)

    async with (
        serving(never) as url,
        UserServiceClient(url, timeout=5, attempt_timeout=5, transport=transport) as client,
    ):
        first = asyncio.create_task(client.users.get(USER_ID))
        await arrived.wait()
        with pytest.raises(DeadlineExceeded):
            await client.users.delete(USER_ID, timeout=0.05)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_the_deadline_counts_the_function_of_the_key() -> None:
    async def never() -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async with UserServiceClient("http://h", api_key=never, timeout=0.05) as client:
        with pytest.raises(DeadlineExceeded) as caught:
            await client.users.get(USER_ID)
    assert not caught.value.maybe_processed


async def test_a_failure_of_the_function_of_the_key_is_passed_on() -> None:
    def fail() -> str:
        raise TimeoutError("the vault")

    async with UserServiceClient("http://h", api_key=fail) as client:
        with pytest.raises(TimeoutError, match="the vault"):
            await client.users.get(USER_ID)


async def test_of_a_transport_passed_in_nothing_is_known() -> None:
    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    transport = httpx.MockTransport(never)
    async with UserServiceClient("http://h", transport=transport, timeout=0.05) as client:
        with pytest.raises(DeadlineExceeded) as caught:
            await client.users.get(USER_ID)
    assert caught.value.maybe_processed


async def test_get_many_has_one_deadline_for_all_its_requests() -> None:
    async def answer(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.15)  # four at a time: beyond the deadline the second time
        return httpx.Response(200, content=envelope({"users": [], "missing": []}))

    async with UserServiceClient("http://h", transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(DeadlineExceeded):
            await client.users.get_many((str(i) for i in range(8000)), timeout=0.25)


async def test_what_cannot_be_written_as_http_was_not_sent() -> None:
    async with UserServiceClient("http://127.0.0.1:1") as client:
        with pytest.raises(NotSent) as caught:
            await client.users.delete(USER_ID, headers={"X-Split": "a\r\nb"}, retries=0)
    assert not caught.value.maybe_processed


async def test_a_header_that_is_refused_is_not_quoted() -> None:
    async def answer(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    headers = {"Authorization": "Bearer usk_" + "secret\n"}  # the traceback shows this line
    async with serving(answer) as url, UserServiceClient(url) as client:
        with pytest.raises(UserServiceError) as caught:
            await client.users.get(USER_ID, headers=headers)
    assert "usk_secret" not in "".join(traceback.format_exception(caught.value))
