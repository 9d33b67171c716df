"""One call: its address, headers, deadline and retries; every method goes through here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TypeAlias, TypedDict, TypeVar
from urllib.parse import quote, urlencode
from uuid import UUID

import httpx
import msgspec
from user_service_schemas import MAX_BATCH, Request

from user_service_client._answers import Answer
from user_service_client._clock import Clock
from user_service_client._deadline import seconds_left_in_scope
from user_service_client._loops import Home
from user_service_client._retry import (
    Breaker,
    Budget,
    delay_after,
    is_outage,
    is_retried,
    is_throttled,
    leaves_in_doubt,
    try_again,
)
from user_service_client._transport import Attempt, Outgoing, Transport
from user_service_client.errors import (
    ApiError,
    CircuitOpen,
    DeadlineExceeded,
    MaybeProcessed,
    NotSent,
    UserServiceError,
)
from user_service_client.hooks import AttemptEvent, Hooks, RetryEvent, Tracing, tell

T = TypeVar("T")

ApiKey: TypeAlias = str | Callable[[], str] | Callable[[], Awaitable[str]]
"""A service key, or a function that returns the current one; it is asked at each attempt."""

TICK = 0.001
"""Seconds by which a timer of the event loop may be early."""

_Headers: TypeAlias = dict[str, str] | httpx.Headers
"""Not any mapping: `copy.copy` of `httpx.Headers` shares its list with the original."""

Id: TypeAlias = str | UUID
"""The id of a user or a device."""


class CallOptions(TypedDict, total=False):
    """What every method takes as keywords.

    Keys:
        timeout: The total deadline of the call in seconds, with all attempts and the time between
            them; None or omitted: the client's own.
        retries: How often it may be tried again; None or omitted: the client's own.
        headers: Further headers; they override those that the client would send.
    """

    timeout: float | None
    retries: int | None
    headers: Mapping[str, str] | None


class ReadOptions(CallOptions, total=False):
    """What methods that use the client's own copies take as keywords.

    Keys:
        max_stale: How many seconds old a copy may be if the service cannot be reached; None or
            omitted: the client's own.
    """

    max_stale: float | None


class CreateOptions(CallOptions, total=False):
    """What methods that create something take as keywords.

    Keys:
        idempotency_key: 1 to 255 printable characters: a write that is repeated with the same key
            within 24 hours happens once. None or omitted: one of its own for each call, which its
            retries share. A task queue that repeats a task passes the task's id.
    """

    idempotency_key: str | None


class WriteOptions(CreateOptions, total=False):
    """What methods that change something take as keywords.

    Keys:
        if_version: A version (`User.version`) or an ETag (`get_with_etag`). The write happens only
            if the user's version is still that one, else `VersionMismatch` is raised. None: it
            happens anyway.
    """

    if_version: int | str | None


@dataclass(slots=True)
class Call:
    """What is to be called. `operation` is the method's name, such as `users.get`.

    Attributes:
        is_write: Whether it changes something, and so carries an `Idempotency-Key`.
        if_match: An ETag that the user must have.
        held: The ETag of a copy that a 304 can confirm.
        accepts: Statuses beside 2xx that are answers, and no errors.
        min_version: The version below which a server's own copy is not to be believed.
        deadline: When it must have ended, by the client's clock, where `timeout` does not say it.
    """

    operation: str
    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    body: Request | None = field(default=None, repr=False)
    timeout: float | None = None
    retries: int | None = None
    headers: Mapping[str, str] | None = field(default=None, repr=False)
    is_write: bool = False
    idempotency_key: str | None = None
    if_match: str | None = None
    held: str | None = None
    accepts: frozenset[int] = frozenset()
    min_version: int = 0
    deadline: float | None = None


class _Run:
    """A call under way."""

    __slots__ = (
        "answer",
        "attempts",
        "call",
        "closings",
        "deadline",
        "headers",
        "maybe_processed",
        "paid",
        "request_id",
        "retries",
        "started",
    )

    def __init__(
        self,
        call: Call,
        headers: _Headers,
        deadline: float,
        retries: int,
        *,
        started: float,
        closings: int,
    ) -> None:
        self.call = call
        self.closings = closings
        self.headers = headers
        self.request_id: str = headers["X-Request-ID"]
        self.deadline = deadline
        self.retries = retries
        self.started = started
        self.attempts = 0
        self.paid = 0
        self.maybe_processed = False
        self.answer: Answer


class Calls:
    """Makes calls to one service."""

    def __init__(
        self,
        *,
        api_key: ApiKey | None,
        timeout: float,
        attempt_timeout: float,
        retries: int,
        transport: Transport,
        home: Home,
        clock: Clock,
        hooks: Hooks,
        tracing: Tracing,
    ) -> None:
        # With the first client, and not at the first failure, when time is short: it takes 30 ms.
        import tenacity  # noqa: F401, PLC0415

        self._api_key = _checked_key(api_key) if isinstance(api_key, str) else api_key
        self._timeout = timeout
        self._attempt_timeout = attempt_timeout
        self._fair = min(timeout, attempt_timeout) / 2
        self._retries = retries
        self._transport = transport
        self._home = home
        self._clock = clock
        self._hooks = hooks
        self._tracing = tracing
        self._budget = Budget()
        self.breaker = Breaker(clock)
        self._every_header = {
            "Host": transport.host,
            "Accept": "application/json",
            "User-Agent": f"user-service-client/{version('user-service-client')}",
        }

    def deadline(self, timeout: float | None) -> float:
        """Return the deadline of a call that begins now."""
        seconds = self._timeout if timeout is None else timeout
        left = seconds_left_in_scope(self._clock.monotonic)
        if left is not None:
            seconds = min(seconds, left)
        return self._clock.monotonic() + seconds

    def deadline_of_its_own(self) -> float:
        """Return the deadline of a call that begins now, and belongs to nobody's scope."""
        return self._clock.monotonic() + self._timeout

    async def send(self, call: Call) -> Answer:
        """Make `call` and return the answer: a success, or what the call `accepts`.

        Raises:
            UserServiceError: of whatever kind.
            RuntimeError: the client is in use in another thread.
        """
        run = _Run(
            call,
            self._headers(call),
            self.deadline(call.timeout) if call.deadline is None else call.deadline,
            self._retries if call.retries is None else call.retries,
            started=self._clock.monotonic(),
            closings=self._transport.closings,
        )
        with self._tracing.call(call.operation):
            error = await self._attempt(run)
            if error is not None:
                error = await self._try_again(run, error)
            if error is not None:
                raise self._told(run, error)
        return run.answer

    async def _try_again(self, run: _Run, first: UserServiceError) -> UserServiceError | None:
        last: UserServiceError | None = first

        async def again() -> UserServiceError | None:
            nonlocal last
            if run.closings != self._transport.closings:  # while it waited
                return None
            outcome = await self._attempt(run)
            if not isinstance(outcome, CircuitOpen):  # which says less than what opened it
                last = outcome
            return outcome

        def pause_after(error: UserServiceError, attempt: int) -> float | None:
            if attempt > run.retries or run.closings != self._transport.closings:
                return None
            delay = delay_after(error, attempt)
            if self._clock.monotonic() + delay >= run.deadline:
                return None
            run.paid = self._budget.take(error)
            if not run.paid:
                return None
            tell(
                self._hooks.retry,
                lambda: RetryEvent(run.call.operation, attempt, _reason(error), delay),
            )
            return delay

        if is_retried(first):
            await try_again(first, again, pause_before=pause_after, sleep=self._clock.sleep)
        return last

    async def _attempt(self, run: _Run) -> UserServiceError | None:
        """Make one attempt; returns what it failed with, or keeps the answer."""
        self._home.enter()  # each time: others may have used it elsewhere since the one before
        started = self._clock.monotonic()
        limit = min(self._attempt_timeout, run.deadline - started)
        if limit <= 0:
            return self._out_of_time(run)
        admission = self.breaker.admit()
        if admission is None:
            return CircuitOpen(f"{run.call.operation}: not asked, since most calls fail")
        run.attempts += 1
        attempt = Attempt(run.call.operation, run.request_id)
        status: int | None = None
        failed: bool | None = None
        error: UserServiceError | None = None
        try:
            error = await self._exchange(run, attempt, limit)
            status = run.answer.status if error is None else error.status
            failed = error is not None and is_outage(error) and not is_throttled(error)
            took = self._clock.monotonic() - started
            if failed and status is None and limit < self._fair and took >= limit - TICK:
                failed = None  # the caller's time was up: that says nothing of the service
        finally:
            self.breaker.ended(admission, failed)
            self._tell(run, status, error, started)
        if error is None:
            self._budget.succeeded(run.paid)
        elif error.maybe_processed:
            run.maybe_processed = True
        return error

    def _tell(
        self, run: _Run, status: int | None, error: UserServiceError | None, started: float
    ) -> None:
        # Apart: what a lambda refers to is an object of its own, for as long as an attempt waits.
        tell(
            self._hooks.attempt,
            lambda: AttemptEvent(
                operation=run.call.operation,
                attempt=run.attempts,
                status=status,
                error=type(error).__name__ if error and not status else None,
                elapsed=self._clock.monotonic() - started,
                request_id=run.request_id,
            ),
        )

    async def _exchange(self, run: _Run, attempt: Attempt, limit: float) -> UserServiceError | None:
        call = run.call
        expiry = asyncio.timeout(limit)
        try:
            async with expiry:
                headers = run.headers
                if self._api_key is not None and "Authorization" not in headers:
                    headers = headers.copy()
                    headers["Authorization"] = f"Bearer {await self._key(self._api_key)}"
                number = run.attempts
                with self._tracing.attempt(call.operation, number, call.method, headers) as told:
                    request = _request(call, headers)
                    reply = await self._transport.send(request, limit, attempt)
                    told(reply.status)
        except UserServiceError as error:
            return self._in_time(run, error)
        except TimeoutError:
            if not expiry.expired():  # then it is the key's function that raised it
                raise
            error_class = MaybeProcessed if attempt.may_have_left else NotSent
            return self._in_time(
                run,
                error_class(
                    f"{call.operation}: no answer within {limit:g} s (request id {run.request_id})",
                    request_id=run.request_id,
                ),
            )
        elapsed = self._clock.monotonic() - run.started
        answer = run.answer = Answer(call.operation, reply, run.request_id, run.attempts, elapsed)
        if answer.is_success or answer.status in call.accepts:
            return None
        refused = answer.error(self._clock.now())
        refused.maybe_processed = leaves_in_doubt(refused)
        return refused

    def _in_time(self, run: _Run, error: UserServiceError) -> UserServiceError:
        """Return the error of an attempt, or that the time of the whole call was up with it."""
        if self._clock.monotonic() < run.deadline - TICK:
            return error
        run.maybe_processed = run.maybe_processed or error.maybe_processed
        return self._out_of_time(run)

    def _out_of_time(self, run: _Run) -> DeadlineExceeded:
        timeout = max(0.0, run.deadline - run.started)  # it may have begun too late
        sent = "maybe processed" if run.maybe_processed else "not sent"
        return DeadlineExceeded(
            f"{run.call.operation}: no answer within {timeout:.3g} s, {sent}"
            f" (request id {run.request_id})",
            request_id=run.request_id,
            maybe_processed=run.maybe_processed,
        )

    def _told(self, run: _Run, error: UserServiceError) -> UserServiceError:
        """Return the error of the whole call."""
        if isinstance(error, NotSent) and run.maybe_processed:
            # The last attempt has not left, but an earlier one has.
            error = MaybeProcessed(str(error), request_id=run.request_id)
        error.attempts = run.attempts
        error.elapsed = self._clock.monotonic() - run.started
        error.maybe_processed = error.maybe_processed or run.maybe_processed
        return error

    @asynccontextmanager
    async def stream(self, call: Call) -> AsyncIterator[httpx.Response]:
        """Make one attempt at a call whose answer has no end, and give the answer.

        Nothing of it is bounded in time.

        Raises:
            ApiError: the service refuses.
            NotSent, MaybeProcessed: it cannot be reached.
        """
        self._home.enter()
        headers = self._headers(call)
        if self._api_key is not None and "Authorization" not in headers:
            headers["Authorization"] = f"Bearer {await self._key(self._api_key)}"
        attempt = Attempt(call.operation, headers["X-Request-ID"])
        request = _request(call, headers)
        async with self._transport.stream(request, attempt) as response:
            if response.status_code != 200:
                await response.aread()
                answer = Answer.of(call.operation, response, attempt.request_id)
                raise answer.error(self._clock.now())
            yield response

    def _headers(self, call: Call) -> _Headers:
        # made here, so that a call without an answer can be found in the logs, too
        headers = {**self._every_header, "X-Request-ID": os.urandom(16).hex()}
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        if call.is_write:
            headers["Idempotency-Key"] = call.idempotency_key or os.urandom(16).hex()
        if call.if_match is not None:
            headers["If-Match"] = call.if_match
        if call.held is not None:
            headers["If-None-Match"] = call.held
        if call.min_version:
            headers["X-Min-Version"] = str(call.min_version)
        if call.headers is None:
            return headers  # which is 8 µs less than `httpx.Headers`, and all names are ours
        made = httpx.Headers(headers)
        made.update(call.headers)
        return made

    @staticmethod
    async def _key(key: ApiKey) -> str:
        if isinstance(key, str):
            return key
        made = key()
        return _checked_key(made if isinstance(made, str) else await made)


def _request(call: Call, headers: _Headers) -> Outgoing:
    target = f"{call.path}?{urlencode(call.params)}" if call.params else call.path
    body = b"" if call.body is None else msgspec.json.encode(call.body)
    if body:
        headers["Content-Length"] = str(len(body))
    return Outgoing(call.method, target, headers, body)


def _reason(error: UserServiceError) -> str:
    return str(error.status) if isinstance(error, ApiError) else type(error).__name__


def shared_wishes(retries: int | None, headers: Mapping[str, str] | None) -> CallOptions:
    """Return what a request is made with that others might share, but for these."""
    wishes = CallOptions()
    if retries is not None:
        wishes["retries"] = retries
    if headers is not None:
        wishes["headers"] = headers
    return wishes


def batches(items: Sequence[T]) -> Iterator[list[T]]:
    """Yield what one request may ask for at a time."""
    for start in range(0, len(items), MAX_BATCH):
        yield list(items[start : start + MAX_BATCH])


def id_text(id_: Id) -> str:
    """Return an id as the service writes it."""
    return id_.lower() if isinstance(id_, str) else str(id_)


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


def _checked_key(key: str) -> str:
    # checked here and without a quotation: a header that is refused further below is quoted
    if not key.isascii() or not key.isprintable() or key != key.strip() or not key:
        raise ValueError("api_key is empty, or has characters that a header cannot carry")
    return key
