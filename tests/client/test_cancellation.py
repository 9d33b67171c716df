"""Calls that are cancelled or run out of time take nothing with them."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

import httpx
import pytest
from user_service_client import DeadlineExceeded, UserServiceClient, UserServiceError
from user_service_client._aiohttp import AiohttpTransport
from user_service_client._transport import TransportFactory

from tests.client.conftest import USER, USER_ID, envelope
from tests.client.test_transport import serving

CALLS = 2000
HEALTHY = 30
LATENCY = 0.01
"""Seconds that the server takes for an answer."""

BODY = envelope(USER)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY)

Call = Coroutine[None, None, object]
Make = Callable[["UserServiceClient", random.Random], Call]


def chance(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - no secret


class Slow:
    """A server that takes its time for the head, and again for the body."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.open = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(self.latency / 2)
                writer.write(ANSWER)
                await asyncio.sleep(self.latency / 2)
                writer.write(BODY)
                await writer.drain()
        finally:
            self.open -= 1


async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer soon, and close: so each call needs a connection of its own."""
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.sleep(0.001)
    writer.write(ANSWER[:-2] + b"Connection: close\r\n\r\n" + BODY)
    await writer.drain()


@asynccontextmanager
async def slow_server() -> AsyncIterator[tuple[Slow, str]]:
    slow = Slow(LATENCY)
    async with serving(slow.handle) as url:
        yield slow, url


def deadline(client: UserServiceClient, dice: random.Random) -> Call:
    """A write, or a read, whose time is up before, while or after it is answered."""
    seconds = dice.uniform(0.0001, 2 * LATENCY)
    if dice.random() < 0.5:
        return client.users.delete(USER_ID, timeout=seconds, retries=0)
    return client.users.get(f"{dice.random()}", timeout=seconds, retries=0)


async def cancelled(client: UserServiceClient, dice: random.Random) -> None:
    """A call whose caller is cancelled at some point of it."""
    call = asyncio.create_task(deadline(client, dice))
    await asyncio.sleep(dice.uniform(0, 2 * LATENCY))
    call.cancel()
    await call


async def make_many(
    client: UserServiceClient,
    make: Make,
    calls: int,
    dice: random.Random,
) -> int:
    """Make calls, 200 at a time, and return how many failed."""
    failed = 0
    for _ in range(calls // 200):
        some = (make(client, dice) for _ in range(200))
        for outcome in await asyncio.gather(*some, return_exceptions=True):
            expected = UserServiceError | asyncio.CancelledError
            assert not isinstance(outcome, BaseException) or isinstance(outcome, expected)
            failed += isinstance(outcome, expected)
    return failed


async def healthy(client: UserServiceClient) -> int:
    """Return how many of 30 calls at once succeed."""
    calls = (client.users.delete(USER_ID, timeout=2) for _ in range(HEALTHY))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    return sum(outcome is None for outcome in outcomes)


@pytest.mark.parametrize("make", [deadline, cancelled])
async def test_healthy_calls_succeed_at_once_after_two_thousand_that_were_given_up(
    make: Make,
) -> None:
    async with slow_server() as (slow, url), UserServiceClient(url) as client:
        failed = await make_many(client, make, CALLS, chance(1))
        assert failed > CALLS / 3
        assert await healthy(client) == HEALTHY
        assert slow.open <= 100, "no more connections than there are slots"


async def healthy_after(url: str, transport: TransportFactory, rounds: int) -> int:
    """Give up thousands of calls over few connections, and return how many of 30 succeed then."""
    succeeded = HEALTHY
    async with UserServiceClient(url, transport=transport) as client:
        for seed in range(rounds):
            for make in (cancelled, deadline):
                assert await make_many(client, make, 1000, chance(seed)) > 300
            succeeded = await healthy(client)
            if succeeded < HEALTHY:
                break
    return succeeded


async def test_no_slot_is_lost_to_calls_that_were_given_up() -> None:
    async with serving(answer_once) as url:
        few = functools.partial(AiohttpTransport, max_connections=3)
        assert await healthy_after(url, few, rounds=1) == HEALTHY


async def test_a_pool_of_httpx_loses_connections_and_so_is_not_the_default() -> None:
    """Shown so that it is seen when a later httpx does better (encode/httpcore#1093)."""
    async with serving(answer_once) as url:
        limits = httpx.Limits(max_connections=3)
        few = functools.partial(httpx.AsyncHTTPTransport, limits=limits)
        assert await healthy_after(url, few, rounds=10) < HEALTHY


async def test_a_call_that_is_cancelled_while_it_waits_for_its_retry_ends() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(503, headers={"Retry-After": "1"}))
    async with UserServiceClient("http://h", transport=transport) as client:
        call = asyncio.create_task(client.users.delete(USER_ID))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_a_timeout_of_the_callers_own_is_no_deadline_of_ours() -> None:
    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with UserServiceClient("http://h", transport=httpx.MockTransport(never)) as client:
        for call in (client.users.delete(USER_ID), client.users.get(USER_ID)):
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(0.02):
                    await call
            assert not isinstance(caught.value, DeadlineExceeded)


async def test_a_cancellation_at_the_deadline_is_not_swallowed() -> None:
    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with UserServiceClient("http://h", transport=httpx.MockTransport(never)) as client:
        call = asyncio.create_task(client.users.delete(USER_ID, timeout=0.02))
        asyncio.get_running_loop().call_later(0.02, call.cancel)
        outcome = (await asyncio.gather(call, return_exceptions=True))[0]
        assert isinstance(outcome, DeadlineExceeded | asyncio.CancelledError)
        assert call.cancelled() or not call.cancelling()
