"""No call lasts longer than its deadline, whatever the server does, and its error says what it did.

Against raw sockets. A machine that stalls makes everything late: what the event loop itself is late
by in the same time is measured, and allowed.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

import httpx
import pytest
from user_service_client import (
    AttemptEvent,
    DeadlineExceeded,
    Hooks,
    MaybeProcessed,
    ServerError,
    UserServiceClient,
    UserServiceError,
    deadline_scope,
)
from user_service_client.testing import FakeUserService

from tests.client.conftest import USER, USER_ID, envelope
from tests.client.test_transport import ANSWER, serving

ALLOWED = 0.05
"""Seconds that a call may last beyond its deadline."""
TIMEOUTS = (0.05, 0.3, 1.0)
"""Below and above what an attempt may last (0.8)."""
BODY = envelope(USER)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY)

Server = Callable[[], AbstractAsyncContextManager[str]]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Lateness:
    """The most that the event loop was late by."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def measure(self) -> None:
        while True:
            due = time.monotonic() + 0.005
            await asyncio.sleep(0.005)
            self.worst = max(self.worst, time.monotonic() - due)


@asynccontextmanager
async def lateness() -> AsyncIterator[Lateness]:
    measured = Lateness()
    task = asyncio.create_task(measured.measure())
    try:
        yield measured
    finally:
        task.cancel()


async def timed(call: Awaitable[object]) -> tuple[float, UserServiceError]:
    """Return how long a call took to fail, and with what."""
    started = time.monotonic()
    with pytest.raises(UserServiceError) as caught:
        await call
    return time.monotonic() - started, caught.value


def server_of(handler: Handler) -> Server:
    async def read_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await handler(reader, writer)
            if writer.is_closing():
                return

    return lambda: serving(read_first)


async def say_nothing(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def drip(writer: asyncio.StreamWriter, data: bytes, seconds: float) -> None:
    for number in range(len(data)):
        writer.write(data[number : number + 1])
        await asyncio.sleep(seconds)


async def one_byte_a_second(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await drip(writer, HEAD + BODY, 1)


async def body_byte_by_byte(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD)
    await drip(writer, BODY, 0.1)


async def body_without_end(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x" * 1000)
        await writer.drain()
        await asyncio.sleep(0.01)


async def continue_for_ever(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


async def close_after_headers(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD)
    writer.close()


async def close_in_the_body(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + BODY[:10])
    writer.close()


async def ask_to_wait(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(
        b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 60\r\nContent-Length: 0\r\n\r\n"
    )


@contextmanager
def full_backlog() -> Iterator[int]:
    """Give the port of a server that answers no further SYN."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = int(server.getsockname()[1])
        waiting = []
        try:
            for _ in range(8):
                one = socket.socket()
                waiting.append(one)
                one.settimeout(0.1)
                try:
                    one.connect(("127.0.0.1", port))
                except TimeoutError:
                    break
            else:
                pytest.skip("this system takes connections beyond the backlog")
            yield port
        finally:
            for one in waiting:
                one.close()


@asynccontextmanager
async def no_handshake() -> AsyncIterator[str]:
    with full_backlog() as port:
        yield f"http://127.0.0.1:{port}"


@asynccontextmanager
async def no_tls() -> AsyncIterator[str]:
    async with serving(say_nothing) as url:
        yield url.replace("http:", "https:")


TIME_IS_UP: dict[str, tuple[Server, bool]] = {
    "accepts-and-says-nothing": (server_of(say_nothing), True),
    "one-byte-a-second": (server_of(one_byte_a_second), True),
    "body-byte-by-byte": (server_of(body_byte_by_byte), True),
    "body-without-end": (server_of(body_without_end), True),
    "continue-for-ever": (server_of(continue_for_ever), True),
    "no-handshake": (no_handshake, False),
    "no-tls": (no_tls, False),
}


@pytest.mark.parametrize(("server", "maybe"), TIME_IS_UP.values(), ids=TIME_IS_UP)
async def test_a_call_ends_with_its_deadline_and_says_whether_it_had_left(
    server: Server, maybe: bool
) -> None:
    async with server() as url, UserServiceClient(url) as client, lateness() as late:
        if url.startswith("https:"):
            await timed(client.users.delete("first", timeout=0.2))  # it makes the TLS context
        reads = [client.users.get(f"user-{t}", timeout=t) for t in TIMEOUTS]
        writes = [client.users.update("user", name="J", timeout=t) for t in TIMEOUTS]
        outcomes = await asyncio.gather(*map(timed, [*reads, *writes]))
    for (took, error), timeout in zip(outcomes, TIMEOUTS * 2, strict=True):
        assert type(error) is DeadlineExceeded
        assert timeout - 0.002 <= took <= timeout + ALLOWED + late.worst
        assert error.elapsed == pytest.approx(timeout, abs=ALLOWED + late.worst)
        assert (error.maybe_processed, error.status) == (maybe, None)
        assert error.attempts == (1 if timeout < 0.8 else 2)
        assert error.request_id


NOT_THE_TIME: dict[str, tuple[Server, type[UserServiceError], int]] = {
    "retry-after-60": (server_of(ask_to_wait), ServerError, 1),
    "closes-after-headers": (server_of(close_after_headers), MaybeProcessed, 3),
    "closes-in-the-body": (server_of(close_in_the_body), MaybeProcessed, 3),
}


@pytest.mark.parametrize(
    ("server", "error_class", "attempts"), NOT_THE_TIME.values(), ids=NOT_THE_TIME
)
async def test_what_fails_before_the_deadline_is_raised_before_it(
    server: Server, error_class: type[UserServiceError], attempts: int
) -> None:
    async with server() as url, UserServiceClient(url, timeout=1) as client, lateness() as late:
        calls = [client.users.get("user"), client.users.update("user", name="J")]
        outcomes = await asyncio.gather(*map(timed, calls))
    for took, error in outcomes:
        assert type(error) is error_class
        assert took <= 0.3 + late.worst, "the sleeps of two retries and no more"
        assert (error.attempts, error.maybe_processed) == (attempts, True)


async def test_a_long_deadline_is_not_waited_for_when_the_attempts_are_used_up() -> None:
    async with (
        server_of(say_nothing)() as url,
        UserServiceClient(url, timeout=30, attempt_timeout=0.1) as client,
        lateness() as late,
    ):
        for call in (client.users.get("user"), client.users.delete("user")):
            took, error = await timed(call)
            assert type(error) is MaybeProcessed
            assert (error.attempts, error.maybe_processed) == (3, True)
            assert took <= 3 * 0.1 + 0.05 + 0.1 + 3 * late.worst + ALLOWED


# Scopes


@asynccontextmanager
async def answering(seconds: float, told: list[AttemptEvent]) -> AsyncIterator[UserServiceClient]:
    """A client of a service that takes its time."""

    async def answer(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(seconds)
        return httpx.Response(200, content=BODY)

    transport = httpx.MockTransport(answer)
    async with UserServiceClient(
        "http://h", transport=transport, hooks=Hooks(attempt=told.append)
    ) as client:
        yield client


@pytest.fixture
def told() -> list[AttemptEvent]:
    return []


async def test_a_scope_ends_all_calls_inside_together(told: list[AttemptEvent]) -> None:
    async with answering(0.1, told) as client, lateness() as late:
        started = time.monotonic()
        calls = (client.users.update("user", name="J") for _ in range(10))
        with deadline_scope(0.35), pytest.raises(DeadlineExceeded):
            [await call for call in calls]
        took = time.monotonic() - started
        assert took <= 0.35 + ALLOWED + late.worst
        assert len(told) in {3, 4}
        calls.close()
        await client.users.update("user", name="J")  # behind it, time is the client's again


@pytest.mark.parametrize(("outer", "inner"), [(0.05, 5), (5, 0.05)])
async def test_of_nested_scopes_the_first_to_end_holds(
    told: list[AttemptEvent], outer: float, inner: float
) -> None:
    async with answering(1, told) as client, lateness() as late:
        with deadline_scope(outer), deadline_scope(inner):
            took, error = await timed(client.users.delete("user"))
    assert type(error) is DeadlineExceeded
    assert took <= 0.05 + ALLOWED + late.worst


async def test_an_inner_scope_ends_with_its_block(told: list[AttemptEvent]) -> None:
    async with answering(0.1, told) as client:
        with deadline_scope(5):
            with deadline_scope(0.02), pytest.raises(DeadlineExceeded):
                await client.users.get("user")
            assert (await client.users.get("user")).version == 3


async def test_a_timeout_inside_a_scope_can_only_shorten_it(told: list[AttemptEvent]) -> None:
    async with answering(1, told) as client, lateness() as late:
        with deadline_scope(0.2):
            short, _ = await timed(client.users.delete("user", timeout=0.05))
            long, _ = await timed(client.users.delete("user", timeout=20))
    assert short <= 0.05 + ALLOWED + late.worst
    assert short + long <= 0.2 + ALLOWED + late.worst


async def test_a_scope_holds_in_the_tasks_that_are_started_inside(
    told: list[AttemptEvent],
) -> None:
    async with answering(1, told) as client, lateness() as late:
        with deadline_scope(0.05):
            calls = [client.users.get("a"), client.users.get_many(["b"]), client.users.delete("c")]
            tasks = [asyncio.create_task(timed(call)) for call in calls]
        for took, error in await asyncio.gather(*tasks):
            assert type(error) is DeadlineExceeded
            assert took <= 0.05 + ALLOWED + late.worst + 0.02


async def test_two_tasks_have_scopes_of_their_own(told: list[AttemptEvent]) -> None:
    async with answering(0.2, told) as client:

        async def within(seconds: float) -> bool:
            with deadline_scope(seconds):
                try:
                    await client.users.delete("user")
                except DeadlineExceeded:
                    return False
            return True

        assert list(await asyncio.gather(within(0.05), within(5))) == [False, True]


async def test_a_call_in_a_scope_that_is_over_is_not_sent(told: list[AttemptEvent]) -> None:
    async with answering(0, told) as client:
        for seconds in (0, -1):
            for call in (client.users.get("user"), client.users.delete("user")):
                with deadline_scope(seconds):
                    _, error = await timed(call)
                assert type(error) is DeadlineExceeded
                assert "within -" not in str(error)
                assert (error.maybe_processed, error.attempts) == (False, 0)
    assert told == []


# By a clock that a test moves


async def test_a_scope_runs_by_the_clock_of_the_client(fake: FakeUserService) -> None:
    ids = [fake.user().id for _ in range(3)]
    async with UserServiceClient("http://h", transport=fake, clock=fake.clock) as client:
        with deadline_scope(5):
            await client.users.get(ids[0])
            await fake.clock.advance(4.9)
            await client.users.get(ids[1])
            await fake.clock.advance(0.2)
            with pytest.raises(DeadlineExceeded):
                await client.users.get(ids[2])
        await client.users.get(ids[2])


async def test_nested_scopes_run_by_the_clock_of_the_client(fake: FakeUserService) -> None:
    user = fake.user()
    async with UserServiceClient("http://h", transport=fake, clock=fake.clock) as client:
        with deadline_scope(5), deadline_scope(50):
            await client.users.get(user.id)
            await fake.clock.advance(5)
            with pytest.raises(DeadlineExceeded):
                await client.preferences.get(user.id)


async def test_in_one_scope_each_client_has_its_own_clock(fake: FakeUserService) -> None:
    user = fake.user()
    ahead = FakeUserService()
    async with (
        UserServiceClient("http://h", transport=fake) as real,
        UserServiceClient("http://h", transport=fake, clock=ahead.clock) as moved,
    ):
        with deadline_scope(60):
            await moved.preferences.get(user.id)
            await ahead.clock.advance(60)
            with pytest.raises(DeadlineExceeded):
                await moved.preferences.get(user.id)
            await real.preferences.get(user.id)


# Others that make a call wait


@pytest.mark.parametrize("timeout", [0.05, 1.0])
async def test_a_key_that_does_not_come_ends_with_the_deadline(timeout: float) -> None:
    asked = 0

    async def key() -> str:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()
        raise AssertionError

    async with UserServiceClient("http://h", api_key=key) as client, lateness() as late:
        calls = [client.users.get("a", timeout=timeout), client.users.delete("b", timeout=timeout)]
        for took, error in await asyncio.gather(*map(timed, calls)):
            assert type(error) is DeadlineExceeded
            assert not error.maybe_processed
            assert took <= timeout + ALLOWED + late.worst
    assert asked == (2 if timeout < 0.8 else 4)


async def test_who_joins_a_read_waits_no_longer_than_its_own_deadline(
    told: list[AttemptEvent],
) -> None:
    async with answering(0.4, told) as client, lateness() as late:
        patient = asyncio.create_task(client.users.get(USER_ID, timeout=5))
        await asyncio.sleep(0.01)
        took, error = await timed(client.users.get(USER_ID, timeout=0.05))
        assert type(error) is DeadlineExceeded
        assert took <= 0.05 + ALLOWED + late.worst
        assert error.elapsed == pytest.approx(took, abs=0.01 + late.worst)
        assert (await patient).id == USER_ID
    assert len(told) == 1


async def test_who_joins_the_read_of_an_impatient_one_gets_its_own_time(
    told: list[AttemptEvent],
) -> None:
    async with answering(0.3, told) as client:
        impatient = asyncio.create_task(timed(client.users.get(USER_ID, timeout=0.05)))
        await asyncio.sleep(0.01)
        assert (await client.users.get(USER_ID, timeout=5)).id == USER_ID
        _, error = await impatient
    assert type(error) is DeadlineExceeded


async def test_the_time_of_a_page_is_its_own() -> None:
    pages = iter([{"items": [USER], "next_cursor": "c"}, {"items": [USER], "next_cursor": None}])

    async def answer(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.15)
        return httpx.Response(200, content=envelope(next(pages)))

    async with UserServiceClient("http://h", transport=httpx.MockTransport(answer)) as client:
        assert len([user async for user in client.users.list(timeout=0.25)]) == 2


async def test_a_connection_that_was_closed_while_idle_costs_no_time() -> None:
    connections = 0

    async def answer_then_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)

    async with serving(answer_then_close) as url, UserServiceClient(url, retries=0) as client:
        for number in range(3):
            await client.users.get(f"user-{number}")
            await asyncio.sleep(0.02)
    assert connections == 3
