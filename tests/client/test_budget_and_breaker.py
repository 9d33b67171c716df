"""How many requests a service meets that fails: what the budget and the breaker let through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from user_service_client import (
    CircuitOpen,
    DeadlineExceeded,
    MaybeProcessed,
    NotFound,
    RateLimited,
    ServerError,
    UserServiceClient,
    UserServiceError,
)

from tests.client.conftest import ETAG, USER, USER_ID, envelope
from tests.client.virtual import VirtualClock


class Troubled:
    """A service that fails while it is told to, and counts what it is asked."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.requests = 0
        self.status = 500
        self.failures_to_come: list[int] = []
        self.gate: asyncio.Event | None = None
        self.client = UserServiceClient(
            "http://users.test",
            timeout=60,
            transport=httpx.MockTransport(self.handle),
            clock=self.clock,
        )

    async def handle(self, _: httpx.Request) -> httpx.Response:
        self.requests += 1
        status = self.failures_to_come.pop(0) if self.failures_to_come else self.status
        if self.gate is not None:
            await self.gate.wait()
        content = envelope(USER) if status == 200 else b""
        return httpx.Response(status, content=content, headers={"ETag": ETAG})

    async def call(self, retries: int | None = None) -> UserServiceError | None:
        """Write once; returns the error."""
        try:
            await self.client.users.update(USER_ID, name="J", retries=retries)
        except UserServiceError as error:
            return error
        return None

    async def open_breaker(self) -> None:
        self.status = 500
        while not isinstance(await self.call(retries=0), CircuitOpen):
            pass
        self.requests = 0


@pytest.fixture
async def troubled() -> AsyncIterator[Troubled]:
    troubled = Troubled()
    async with troubled.client:
        yield troubled


# The budget


async def test_at_full_failure_the_extra_load_is_under_a_tenth_once_the_budget_is_spent(
    troubled: Troubled,
) -> None:
    calls = 2000
    for _ in range(calls):
        troubled.clock.advance(2)  # so few in 10 s that the breaker stays closed
        assert isinstance(await troubled.call(), ServerError)
    assert calls + 500 // 14 == troubled.requests < calls * 1.1


async def test_at_a_fifth_of_failure_retries_go_on_as_far_as_successes_pay(
    troubled: Troubled,
) -> None:
    failed = 0
    for number in range(5000):
        troubled.clock.advance(2)
        troubled.status = 500 if number % 5 == 0 else 200
        failed += await troubled.call() is not None
    assert failed == 1000
    # 4 successes of 5 calls bring 4 tokens: 14 of them make a retry
    assert troubled.requests - 5000 <= (500 + 4000) / 14


async def test_being_throttled_costs_less_than_a_failure(troubled: Troubled) -> None:
    troubled.status = 429
    for _ in range(200):
        assert isinstance(await troubled.call(), RateLimited)
    assert troubled.requests == 200 + 500 // 5


async def test_a_retry_that_succeeds_is_paid_back(troubled: Troubled) -> None:
    troubled.status = 200
    for _ in range(500):
        troubled.clock.advance(2)
        troubled.failures_to_come = [500]
        assert await troubled.call() is None
    assert troubled.requests == 1000


async def test_a_clean_success_brings_a_token_back(troubled: Troubled) -> None:
    for _ in range(50):
        troubled.clock.advance(2)
        await troubled.call()
    spent = troubled.requests - 50
    assert spent == 500 // 14  # and 10 tokens are left
    troubled.status = 200
    for _ in range(3):
        await troubled.call()
    troubled.clock.advance(20)
    troubled.status, troubled.requests = 500, 0
    await troubled.call()
    assert troubled.requests == 1, "13 tokens are not enough"
    troubled.status = 200
    await troubled.call()
    troubled.status, troubled.requests = 500, 0
    await troubled.call()
    assert troubled.requests == 2, "14 are"


async def test_an_empty_budget_makes_nobody_wait(troubled: Troubled) -> None:
    for _ in range(50):
        troubled.clock.advance(2)
        await troubled.call()
    troubled.clock.slept.clear()
    await troubled.call()
    assert troubled.clock.slept == []


# The breaker


async def fail(troubled: Troubled, failures: int, successes: int) -> None:
    troubled.status = 200
    for _ in range(successes):
        assert await troubled.call(retries=0) is None
    troubled.status = 500
    for _ in range(failures):
        assert isinstance(await troubled.call(retries=0), ServerError)


@pytest.mark.parametrize(("failures", "successes"), [(20, 0), (10, 10), (15, 15)])
async def test_the_breaker_opens_at_half_of_twenty_calls(
    troubled: Troubled, failures: int, successes: int
) -> None:
    await fail(troubled, failures, successes)
    asked = troubled.requests
    assert isinstance(await troubled.call(), CircuitOpen)
    assert troubled.requests == asked


@pytest.mark.parametrize(("failures", "successes"), [(19, 0), (9, 10), (9, 11), (29, 31)])
async def test_the_breaker_stays_closed_below(
    troubled: Troubled, failures: int, successes: int
) -> None:
    await fail(troubled, failures, successes)
    assert isinstance(await troubled.call(retries=0), ServerError)


async def test_failures_of_more_than_ten_seconds_ago_do_not_count(troubled: Troubled) -> None:
    await fail(troubled, 19, 0)
    troubled.clock.advance(11)
    await fail(troubled, 19, 0)
    assert isinstance(await troubled.call(retries=0), ServerError)


@pytest.mark.parametrize("status", [404, 409, 422, 429])
async def test_answers_of_a_working_service_do_not_open_the_breaker(
    troubled: Troubled, status: int
) -> None:
    troubled.status = status
    for _ in range(100):
        assert not isinstance(await troubled.call(retries=0), CircuitOpen)


async def never(_: httpx.Request) -> httpx.Response:
    await asyncio.Event().wait()
    raise AssertionError


async def errors_of(client: UserServiceClient, calls: int, timeout: float | None) -> set[type]:
    many = (client.users.delete(USER_ID, timeout=timeout) for _ in range(calls))
    return {type(outcome) for outcome in await asyncio.gather(*many, return_exceptions=True)}


async def test_calls_whose_own_deadline_was_too_short_do_not_open_the_breaker() -> None:
    async with UserServiceClient("http://h", transport=httpx.MockTransport(never)) as client:
        for _ in range(3):
            assert await errors_of(client, 100, timeout=0.001) == {DeadlineExceeded}


async def test_attempts_that_had_their_time_and_met_silence_open_the_breaker() -> None:
    transport = httpx.MockTransport(never)
    async with UserServiceClient(
        "http://h", transport=transport, attempt_timeout=0.05, retries=0
    ) as client:
        assert await errors_of(client, 20, timeout=None) == {MaybeProcessed}
        assert await errors_of(client, 20, timeout=None) == {CircuitOpen}


async def test_an_open_breaker_refuses_at_once_and_asks_nobody(troubled: Troubled) -> None:
    await troubled.open_breaker()
    troubled.clock.slept.clear()
    for _ in range(100):
        error = await troubled.call()
        assert isinstance(error, CircuitOpen)
        assert (error.attempts, error.maybe_processed) == (0, False)
    assert (troubled.requests, troubled.clock.slept) == (0, [])


async def test_one_probe_is_let_through_after_five_seconds(troubled: Troubled) -> None:
    await troubled.open_breaker()
    troubled.clock.advance(4.9)
    assert isinstance(await troubled.call(), CircuitOpen)
    troubled.clock.advance(0.2)
    troubled.gate = asyncio.Event()
    calls = [asyncio.create_task(troubled.call(retries=0)) for _ in range(50)]
    await asyncio.sleep(0.02)
    assert troubled.requests == 1
    troubled.status = 200
    troubled.gate.set()
    errors = await asyncio.gather(*calls)
    assert sum(isinstance(error, CircuitOpen) for error in errors) == 49


async def test_a_probe_that_fails_opens_again_for_five_seconds(troubled: Troubled) -> None:
    await troubled.open_breaker()
    troubled.clock.advance(5.1)
    assert isinstance(await troubled.call(), ServerError), "what the probe met, and no CircuitOpen"
    assert troubled.requests == 1, "it is not tried again"
    troubled.clock.advance(4.9)
    assert isinstance(await troubled.call(), CircuitOpen)
    troubled.clock.advance(0.2)
    await troubled.call()
    assert troubled.requests == 2


async def test_a_probe_that_succeeds_closes(troubled: Troubled) -> None:
    await troubled.open_breaker()
    troubled.clock.advance(5.1)
    troubled.status = 200
    assert await troubled.call() is None
    await fail(troubled, 19, 0)  # it begins to count anew
    assert isinstance(await troubled.call(retries=0), ServerError)


async def test_a_probe_that_is_refused_with_a_404_closes(troubled: Troubled) -> None:
    await troubled.open_breaker()
    troubled.clock.advance(5.1)
    troubled.status = 404
    assert isinstance(await troubled.call(), NotFound)
    assert isinstance(await troubled.call(), NotFound)


async def test_a_probe_that_is_cancelled_lets_the_next_call_probe(troubled: Troubled) -> None:
    await troubled.open_breaker()
    troubled.clock.advance(5.1)
    troubled.gate = asyncio.Event()
    probe = asyncio.create_task(troubled.call())
    await asyncio.sleep(0.01)
    assert troubled.requests == 1
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    troubled.gate.set()
    troubled.status = 200
    assert await troubled.call() is None
    assert await troubled.call() is None


async def test_a_probe_whose_key_cannot_be_had_lets_the_next_call_probe() -> None:
    clock = VirtualClock()
    status, fails = 500, False

    def key() -> str:
        if fails:
            raise OSError("the vault")
        return "usk_key"

    transport = httpx.MockTransport(lambda _: httpx.Response(status, content=envelope(None)))
    async with UserServiceClient(
        "http://h", api_key=key, transport=transport, retries=0, clock=clock
    ) as client:
        for _ in range(20):
            with pytest.raises(ServerError):
                await client.users.delete(USER_ID)
        clock.advance(5.1)
        fails = True
        with pytest.raises(OSError, match="the vault"):
            await client.users.delete(USER_ID)
        status, fails = 200, False
        await client.users.delete(USER_ID)


async def test_late_failures_from_before_the_opening_are_not_taken_for_the_probe(
    troubled: Troubled,
) -> None:
    troubled.gate = gate = asyncio.Event()
    late = [asyncio.create_task(troubled.call(retries=0)) for _ in range(30)]
    await asyncio.sleep(0.01)
    troubled.gate = None
    await troubled.open_breaker()
    troubled.clock.advance(5.1)
    troubled.status = 200
    troubled.gate = asyncio.Event()
    probe = asyncio.create_task(troubled.call(retries=0))
    await asyncio.sleep(0.01)
    gate.set()
    await asyncio.gather(*late)  # they fail while the probe is under way
    assert isinstance(await troubled.call(), CircuitOpen), "the probe is still the only one"
    troubled.gate.set()
    assert await probe is None
    assert await troubled.call() is None


async def test_late_failures_from_before_the_opening_do_not_put_off_the_probe(
    troubled: Troubled,
) -> None:
    troubled.gate = gate = asyncio.Event()
    late = [asyncio.create_task(troubled.call(retries=0)) for _ in range(30)]
    await asyncio.sleep(0.01)
    troubled.gate = None
    await troubled.open_breaker()
    troubled.clock.advance(4)
    gate.set()
    await asyncio.gather(*late)
    troubled.clock.advance(1.1)
    troubled.status = 200
    assert await troubled.call() is None


async def test_a_late_success_from_before_the_opening_does_not_close(troubled: Troubled) -> None:
    troubled.gate = gate = asyncio.Event()
    troubled.status = 200
    late = asyncio.create_task(troubled.call())
    await asyncio.sleep(0.01)
    troubled.gate = None
    await troubled.open_breaker()
    gate.set()
    assert await late is None
    assert isinstance(await troubled.call(), CircuitOpen)


async def test_old_copies_are_served_while_the_breaker_is_open(troubled: Troubled) -> None:
    troubled.status = 200
    user = await troubled.client.users.get(USER_ID)
    troubled.clock.advance(250)
    troubled.status = 500
    for _ in range(20):
        await asyncio.gather(troubled.client.users.delete("x"), return_exceptions=True)
    assert isinstance(await troubled.call(), CircuitOpen)
    assert await troubled.client.users.get(USER_ID) == user
    with pytest.raises(CircuitOpen):
        await troubled.client.users.get("somebody-else")
    troubled.clock.advance(51)
    with pytest.raises(UserServiceError):  # it may be the probe
        await troubled.client.users.get(USER_ID)


async def test_budget_and_breaker_together_keep_an_outage_from_becoming_a_storm(
    troubled: Troubled,
) -> None:
    for _ in range(6000):  # a hundred calls a second, for a minute
        troubled.clock.advance(0.01)
        await troubled.call()
    # what opened it, and a probe every 5 s
    assert troubled.requests < 45
