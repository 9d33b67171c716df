"""What is tried again, how often, with which key and after how long: against scripted answers."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from email.utils import format_datetime

import httpx
import msgspec
import pytest
import respx
from user_service_client import (
    ApiError,
    AttemptEvent,
    Conflict,
    DeadlineExceeded,
    DecodeError,
    Hooks,
    MaybeProcessed,
    NotSent,
    RateLimited,
    RetryEvent,
    ServerError,
    UserServiceClient,
    UserServiceError,
)

from tests.client.conftest import ETAG, USER, USER_ID, envelope
from tests.client.virtual import VirtualClock

Make = Callable[[UserServiceClient], Awaitable[object]]
Outcome = httpx.Response | Exception


def refusal(status: int, code: str = "some_code", **headers: str) -> httpx.Response:
    error = {"code": code, "details": [], "request_id": "req-1"}
    body = {"success": False, "data": None, "message": "No", "error": error}
    return httpx.Response(status, content=msgspec.json.encode(body), headers=headers)


def success(data: object = USER) -> httpx.Response:
    return httpx.Response(200, content=envelope(data), headers={"ETag": ETAG})


@dataclass
class Scripted:
    """A client whose service answers as scripted, the last answer again and again."""

    client: UserServiceClient
    clock: VirtualClock
    route: respx.Route
    told: list[AttemptEvent | RetryEvent]

    def answers(self, *outcomes: Outcome) -> None:
        def answer(_request: httpx.Request, route: respx.Route) -> httpx.Response:
            outcome = outcomes[min(route.call_count, len(outcomes) - 1)]
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        self.route.mock(side_effect=answer)

    @property
    def requests(self) -> Sequence[httpx.Request]:
        return [call.request for call in self.route.calls]


@pytest.fixture
async def scripted() -> AsyncIterator[Scripted]:
    router = respx.MockRouter(base_url="http://users.test")
    clock = VirtualClock()
    told: list[AttemptEvent | RetryEvent] = []
    async with UserServiceClient(
        "http://users.test",
        timeout=60,
        transport=httpx.MockTransport(router.async_handler),
        clock=clock,
        hooks=Hooks(attempt=told.append, retry=told.append),
    ) as client:
        yield Scripted(client, clock, router.route(), told)


CALLS: dict[str, tuple[Make, bool]] = {
    "GET": (lambda c: c.users.get(USER_ID), False),
    "POST batch": (lambda c: c.users.get_many([USER_ID]), False),
    "POST lookup": (lambda c: c.users.lookup(email="john@example.com"), False),
    "POST": (lambda c: c.users.create(name="J", email="john@example.com"), True),
    "PATCH": (lambda c: c.users.update(USER_ID, name="J"), True),
    "PUT": (lambda c: c.users.set_password(USER_ID, "a new password"), True),
    "DELETE": (lambda c: c.users.delete(USER_ID), True),
}
ONCE, OFTEN, THROTTLED = (1, 0.0), (3, 0.05), (3, 1.0)
OUTCOMES: dict[str, tuple[Outcome, tuple[int, float]]] = {
    **{str(s): (refusal(s), ONCE) for s in (400, 401, 403, 404, 405, 412, 413, 415, 422, 501)},
    **{str(s): (refusal(s), OFTEN) for s in (408, 500, 502, 503, 504)},
    "429": (refusal(429, "rate_limited"), THROTTLED),
    "409 email_taken": (refusal(409, "email_taken"), ONCE),
    "409 in progress": (refusal(409, "idempotency_in_progress"), OFTEN),
    "503 overloaded": (refusal(503, "overloaded"), THROTTLED),
    "not sent": (httpx.ConnectError("refused"), OFTEN),
    "cut off": (httpx.ReadError("reset"), OFTEN),
    "no answer": (httpx.ReadTimeout("late"), OFTEN),
    "unreadable": (httpx.DecodingError("no gzip"), ONCE),
}


@pytest.mark.parametrize(("make", "is_write"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("outcome", "expected"), OUTCOMES.values(), ids=OUTCOMES)
async def test_what_happened_says_how_often_a_call_is_made(
    scripted: Scripted,
    make: Make,
    is_write: bool,
    outcome: Outcome,
    expected: tuple[int, float],
) -> None:
    scripted.answers(outcome)
    with pytest.raises(UserServiceError) as caught:
        await make(scripted.client)
    attempts, base = expected
    assert len(scripted.requests) == caught.value.attempts == attempts
    keys = [request.headers.get("Idempotency-Key") for request in scripted.requests]
    assert len(set(keys)) == 1
    assert (keys[0] is not None) is is_write
    assert len({request.headers["X-Request-ID"] for request in scripted.requests}) == 1
    assert len({request.content for request in scripted.requests}) == 1
    slept = scripted.clock.slept
    assert len(slept) == attempts - 1
    assert all(0 <= pause <= base * 2**i for i, pause in enumerate(slept))
    assert caught.value.elapsed == pytest.approx(sum(slept))


@pytest.mark.parametrize(("make", "is_write"), CALLS.values(), ids=CALLS)
async def test_a_call_that_succeeds_at_last_succeeds(
    scripted: Scripted, make: Make, is_write: bool
) -> None:
    data: object = USER
    if make is CALLS["POST batch"][0]:
        data = {"users": [USER], "missing": []}
    elif make is CALLS["POST lookup"][0]:
        data = {"users": [USER]}
    scripted.answers(httpx.ReadError("reset"), refusal(503), success(data))
    await make(scripted.client)
    assert len(scripted.requests) == 3
    keys = {request.headers.get("Idempotency-Key") for request in scripted.requests}
    assert len(keys) == 1
    assert (keys != {None}) is is_write


async def test_each_call_has_a_key_of_its_own(scripted: Scripted) -> None:
    scripted.answers(success())
    for _ in range(3):
        await scripted.client.users.update(USER_ID, name="J")
    assert len({request.headers["Idempotency-Key"] for request in scripted.requests}) == 3


async def test_the_key_of_the_caller_goes_with_each_attempt(scripted: Scripted) -> None:
    scripted.answers(refusal(500), refusal(502), success())
    await scripted.client.users.delete(USER_ID, idempotency_key="task-7")
    sent = [request.headers["Idempotency-Key"] for request in scripted.requests]
    assert sent == ["task-7"] * 3


@pytest.mark.parametrize("headers", [None, {"X-Of-The-Caller": "1"}])
async def test_the_key_of_the_service_is_asked_for_at_each_attempt(
    headers: dict[str, str] | None,
) -> None:
    keys = iter(["one", "two", "three"])
    sent: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers["Authorization"])
        return refusal(503)

    async def key() -> str:
        return next(keys)

    async with UserServiceClient(
        "http://h", api_key=key, transport=httpx.MockTransport(answer), clock=VirtualClock()
    ) as client:
        with pytest.raises(ServerError):
            await client.users.delete(USER_ID, headers=headers)
    assert sent == ["Bearer one", "Bearer two", "Bearer three"]


@pytest.mark.parametrize("retries", [0, 1, 5])
async def test_retries_of_a_call_override_those_of_the_client(
    scripted: Scripted, retries: int
) -> None:
    scripted.answers(refusal(500))
    with pytest.raises(ServerError) as caught:
        await scripted.client.users.delete(USER_ID, retries=retries)
    assert len(scripted.requests) == caught.value.attempts == retries + 1


async def test_waits_never_exceed_five_seconds(scripted: Scripted) -> None:
    scripted.answers(refusal(429))
    with pytest.raises(RateLimited):
        await scripted.client.users.delete(USER_ID, retries=30, timeout=1000)
    assert max(scripted.clock.slept) <= 5
    assert max(scripted.clock.slept) > 1


@pytest.mark.parametrize("status", [409, 429, 503])
async def test_retry_after_in_seconds_is_a_floor(scripted: Scripted, status: int) -> None:
    answer = refusal(status, "idempotency_in_progress", **{"Retry-After": "3"})
    scripted.answers(answer, answer, success(None))
    await scripted.client.users.delete(USER_ID)
    assert all(3 <= pause <= 3.3 for pause in scripted.clock.slept[:1])
    assert all(pause >= 3 for pause in scripted.clock.slept)


async def test_retry_after_as_a_date_is_a_floor(scripted: Scripted) -> None:
    date = format_datetime(scripted.clock.now() + timedelta(seconds=20), usegmt=True)
    scripted.answers(refusal(503, **{"Retry-After": date}), success(None))
    await scripted.client.users.delete(USER_ID)
    (pause,) = scripted.clock.slept
    assert 15 < pause < 21


@pytest.mark.parametrize("date", [False, True], ids=["seconds", "date"])
async def test_retry_after_beyond_the_deadline_is_raised_at_once(
    scripted: Scripted, date: bool
) -> None:
    at = format_datetime(scripted.clock.now() + timedelta(seconds=90), usegmt=True)
    scripted.answers(refusal(503, **{"Retry-After": at if date else "90"}))
    with pytest.raises(ServerError) as caught:
        await scripted.client.users.delete(USER_ID)
    assert (scripted.clock.slept, caught.value.attempts) == ([], 1)
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 80


async def test_a_slow_write_that_is_repeated_ends_as_a_success(scripted: Scripted) -> None:
    in_progress = refusal(409, "idempotency_in_progress", **{"Retry-After": "1"})
    scripted.answers(httpx.ReadTimeout("slow"), in_progress, success())
    assert (await scripted.client.users.create(name="J", email="j@example.com")).version == 3
    assert scripted.clock.slept[1] >= 1


# What an error of several attempts says


async def test_an_error_carries_the_attempts_the_time_and_the_request_id(
    scripted: Scripted,
) -> None:
    scripted.answers(refusal(503, "overloaded", **{"Retry-After": "2"}))
    with pytest.raises(ServerError) as caught:
        await scripted.client.users.update(USER_ID, name="J")
    error = caught.value
    assert (error.attempts, error.request_id, error.code) == (3, "req-1", "overloaded")
    assert error.elapsed == pytest.approx(sum(scripted.clock.slept))
    twin = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(twin), vars(twin)) == (ServerError, vars(error))


async def test_an_error_without_an_answer_has_the_request_id_that_was_sent(
    scripted: Scripted,
) -> None:
    scripted.answers(httpx.ConnectError("refused"))
    with pytest.raises(NotSent) as caught:
        await scripted.client.users.get(USER_ID)
    assert caught.value.request_id == scripted.requests[0].headers["X-Request-ID"]


async def test_a_success_that_cannot_be_read_tells_of_all_its_attempts(
    scripted: Scripted,
) -> None:
    scripted.answers(refusal(503, **{"Retry-After": "1"}), httpx.Response(200, content=b"<html>"))
    with pytest.raises(DecodeError) as caught:
        await scripted.client.users.create(name="J", email="john@example.com")
    assert caught.value.attempts == 2
    assert caught.value.elapsed >= 1
    assert caught.value.maybe_processed, "a success was answered: the write has happened"


LAST_NOT_SENT: dict[str, tuple[Outcome, bool]] = {
    "cut off": (httpx.ReadError("reset"), True),
    "500": (refusal(500), True),
    "502": (refusal(502), True),
    "503 of the database": (refusal(503, "dependency_unavailable"), True),
    "503 of a proxy": (httpx.Response(503, content=b"upstream reset"), True),
    "503 overloaded": (refusal(503, "overloaded"), False),
    "429": (refusal(429), False),
    "not sent": (httpx.ConnectError("refused"), False),
}


@pytest.mark.parametrize(("first", "maybe"), LAST_NOT_SENT.values(), ids=LAST_NOT_SENT)
async def test_that_an_attempt_may_have_been_processed_is_not_forgotten(
    scripted: Scripted, first: Outcome, maybe: bool
) -> None:
    scripted.answers(first, httpx.ConnectError("refused"))
    with pytest.raises(UserServiceError) as caught:
        await scripted.client.users.create(name="J", email="john@example.com")
    assert type(caught.value) is (MaybeProcessed if maybe else NotSent)
    assert (caught.value.maybe_processed, caught.value.attempts) == (maybe, 3)


async def test_a_write_whose_twin_is_under_way_may_have_been_processed(scripted: Scripted) -> None:
    scripted.answers(refusal(409, "idempotency_in_progress"))
    with pytest.raises(Conflict) as caught:
        await scripted.client.users.delete(USER_ID, idempotency_key="task-7")
    assert caught.value.maybe_processed


async def test_a_definite_refusal_was_not_processed(scripted: Scripted) -> None:
    scripted.answers(refusal(422))
    with pytest.raises(ApiError) as caught:
        await scripted.client.users.delete(USER_ID)
    assert not caught.value.maybe_processed


async def test_time_that_is_up_after_an_attempt_that_left_says_so(scripted: Scripted) -> None:
    clock = scripted.clock

    def fail_late(_: httpx.Request, route: respx.Route) -> httpx.Response:
        if route.call_count:
            clock.advance(60)
            raise httpx.ConnectTimeout("late")
        raise httpx.ReadError("reset")

    scripted.route.mock(side_effect=fail_late)
    with pytest.raises(DeadlineExceeded) as caught:
        await scripted.client.users.delete(USER_ID)
    assert (caught.value.maybe_processed, caught.value.attempts) == (True, 2)
    assert "maybe processed" in str(caught.value)


async def test_a_write_that_needs_a_read_first_and_fails_there_was_not_sent(
    scripted: Scripted,
) -> None:
    scripted.answers(httpx.ReadError("reset"))
    with pytest.raises(UserServiceError) as caught:
        await scripted.client.users.delete(USER_ID, if_version=3)
    assert {request.method for request in scripted.requests} == {"GET"}
    assert type(caught.value) is NotSent
    assert (caught.value.maybe_processed, caught.value.attempts) == (False, 3)


async def test_a_write_that_needs_a_read_first_has_one_deadline_for_both(
    scripted: Scripted,
) -> None:
    def answer(request: httpx.Request, route: respx.Route) -> httpx.Response:
        scripted.clock.advance(1)
        if request.method == "GET" and route.call_count:
            return httpx.Response(200, content=envelope(USER), headers={"ETag": '"e.0f.3"'})
        return refusal(503, **{"Retry-After": "0"})

    scripted.route.mock(side_effect=answer)
    with pytest.raises(UserServiceError) as caught:
        await scripted.client.users.delete(USER_ID, if_version=3, timeout=3.5, retries=9)
    assert [request.method for request in scripted.requests] == ["GET", "GET", "DELETE", "DELETE"]
    assert isinstance(caught.value, ServerError)


# Hooks


async def test_hooks_hear_of_every_attempt_and_retry(scripted: Scripted) -> None:
    scripted.answers(httpx.ReadError("reset"), refusal(503), success())
    await scripted.client.users.update(USER_ID, name="J")
    request_id = scripted.requests[0].headers["X-Request-ID"]
    assert [
        (event.attempt, event.status, event.error)
        for event in scripted.told
        if isinstance(event, AttemptEvent) and event.request_id == request_id
    ] == [(1, None, "MaybeProcessed"), (2, 503, None), (3, 200, None)]
    retries = [event for event in scripted.told if isinstance(event, RetryEvent)]
    assert [(event.attempt, event.reason) for event in retries] == [
        (1, "MaybeProcessed"),
        (2, "503"),
    ]
    assert [event.delay for event in retries] == scripted.clock.slept
    assert {event.operation for event in scripted.told} == {"users.update"}


async def test_a_retry_that_is_not_made_is_not_told_of(scripted: Scripted) -> None:
    scripted.answers(refusal(503, **{"Retry-After": "90"}))
    with pytest.raises(ServerError):
        await scripted.client.users.delete(USER_ID)
    assert [type(event) for event in scripted.told] == [AttemptEvent]


async def test_a_cancelled_attempt_is_told_of() -> None:
    told: list[AttemptEvent] = []
    asked = asyncio.Event()

    async def never(_: httpx.Request) -> httpx.Response:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    transport = httpx.MockTransport(never)
    async with UserServiceClient(
        "http://h", transport=transport, hooks=Hooks(attempt=told.append)
    ) as client:
        call = asyncio.create_task(client.users.delete(USER_ID))
        await asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    (event,) = told
    assert (event.attempt, event.status, event.error) == (1, None, None)


async def test_a_hook_that_raises_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_event: object) -> None:
        raise ValueError("a hook of a user")

    answers = iter([refusal(503), success()])
    async with UserServiceClient(
        "http://h",
        transport=httpx.MockTransport(lambda _: next(answers)),
        clock=VirtualClock(),
        hooks=Hooks(attempt=fail, retry=fail, cache=fail, stream=fail),
    ) as client:
        assert (await client.users.get(USER_ID)).version == 3
    assert {record.message for record in caplog.records} == {"a hook has failed"}
    assert len(caplog.records) == 4  # a miss, two attempts, a retry
