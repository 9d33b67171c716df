"""When a call is tried again: what is worth it, after how long, and how much of it is too much.

Full jitter as Amazon's "Exponential Backoff And Jitter" has it; a budget as botocore's standard
mode (its retry quota) and gRPC's A6 (retry throttling) have it; a breaker as in "Release It!".
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Callable
from enum import Enum

from user_service_schemas import ErrorCode

from user_service_client._clock import Clock
from user_service_client.errors import (
    ApiError,
    CircuitOpen,
    Conflict,
    DeadlineExceeded,
    MaybeProcessed,
    NotSent,
    RateLimited,
    ServerError,
    UserServiceError,
)

BASE_DELAY = 0.05
"""Seconds: the longest first wait between two attempts."""
BASE_DELAY_THROTTLED = 1.0
MAX_DELAY = 5.0
RETRIED = frozenset({408, 429, 500, 502, 503, 504})

BUDGET = 500
RETRY_COST = 14
THROTTLED_RETRY_COST = 5

BREAKER_WINDOW = 10
"""Seconds that the breaker looks back."""
BREAKER_CALLS = 20
BREAKER_OPEN = 5.0
"""Seconds after which an open breaker lets one call through."""


def is_throttled(error: UserServiceError) -> bool:
    """Whether the service says that it is asked too often."""
    return isinstance(error, RateLimited) or error.code == ErrorCode.OVERLOADED


def is_retried(error: UserServiceError) -> bool:
    """Whether trying again may help. What is repeated is a read, or has an `Idempotency-Key`."""
    if isinstance(error, ApiError):
        in_progress = error.code == ErrorCode.IDEMPOTENCY_IN_PROGRESS
        return error.status in RETRIED or (isinstance(error, Conflict) and in_progress)
    return isinstance(error, NotSent | MaybeProcessed)


def leaves_in_doubt(error: ApiError) -> bool:
    """Whether a write may have happened although the service, or a proxy, has refused it.

    An unexpected failure may have come after the commit, or the database was lost in the middle of
    it; a proxy does not know what became of what it passed on. A write whose twin is still under
    way is about to happen.
    """
    if error.status == 503:
        return error.code != ErrorCode.OVERLOADED
    return error.status in {500, 502, 504} or error.code == ErrorCode.IDEMPOTENCY_IN_PROGRESS


def is_outage(error: UserServiceError) -> bool:
    """Whether it says that the service is not there, so that what is known of it must do."""
    return isinstance(
        error, NotSent | MaybeProcessed | DeadlineExceeded | CircuitOpen | ServerError | RateLimited
    )


def delay_after(error: UserServiceError, attempt: int) -> float:
    """Return how many seconds to wait after a failed attempt (1 for the first).

    `Retry-After` is a floor (RFC 9110, section 10.2.3), with a tenth more at random, so that those
    who were told the same do not come back together.
    """
    base = BASE_DELAY_THROTTLED if is_throttled(error) else BASE_DELAY
    longest = min(MAX_DELAY, base * 2.0 ** (attempt - 1))
    jittered = random.uniform(0, longest)  # noqa: S311 - no secret
    asked = error.retry_after if isinstance(error, ApiError) else None
    if asked is None:
        return jittered
    return max(asked, jittered) + random.uniform(0, min(asked, MAX_DELAY) / 10)  # noqa: S311


class Budget:
    """What retries may cost: tokens that successes bring back, so that an outage meets no storm.

    It never makes anybody wait: without a token, the failure stands.
    """

    def __init__(self) -> None:
        self.tokens = BUDGET

    def take(self, error: UserServiceError) -> int:
        """Pay for a retry after `error`; returns what it cost, 0 if there was not enough."""
        cost = THROTTLED_RETRY_COST if is_throttled(error) else RETRY_COST
        if self.tokens < cost:
            return 0
        self.tokens -= cost
        return cost

    def succeeded(self, paid: int) -> None:
        """Give back what the last retry has cost, or, without one, a token."""
        self.tokens = min(BUDGET, self.tokens + (paid or 1))


class _Second:
    __slots__ = ("at", "calls", "failures")

    def __init__(self, at: int) -> None:
        self.at = at
        self.calls = 0
        self.failures = 0


class Admission(Enum):
    """How an attempt was let through by the breaker."""

    USUAL = "usual"
    PROBE = "probe"
    """As the one that shows whether the service is back."""


class Breaker:
    """Keeps calls from a service of which most calls fail.

    Opens when half of at least 20 attempts of the last 10 s have failed; after 5 s one attempt is
    let through, whose end decides.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seconds: deque[_Second] = deque(maxlen=BREAKER_WINDOW)
        self._opened_at: float | None = None
        self._is_probing = False

    @property
    def is_open(self) -> bool:
        """Whether attempts are kept back."""
        return self._opened_at is not None

    def admit(self) -> Admission | None:
        """Say whether an attempt may be made; whoever makes one says how it `ended`."""
        if self._opened_at is None:
            return Admission.USUAL
        if self._is_probing or self._clock.monotonic() < self._opened_at + BREAKER_OPEN:
            return None
        self._is_probing = True
        return Admission.PROBE

    def ended(self, admission: Admission, failed: bool | None) -> None:
        """Say how an attempt ended; None if nobody knows, since it was cancelled."""
        if admission is Admission.PROBE:
            self._is_probing = False
        # Those that began before it opened say nothing of how the service is now.
        if failed is None or (self.is_open and admission is Admission.USUAL):
            return
        now = self._clock.monotonic()
        if admission is Admission.PROBE:
            self._opened_at = now if failed else None
            self._seconds.clear()
            return
        second = int(now)
        if not self._seconds or self._seconds[-1].at != second:
            self._seconds.append(_Second(second))
        self._seconds[-1].calls += 1
        self._seconds[-1].failures += failed
        if failed and self._is_too_much(second):
            self._opened_at = now

    def _is_too_much(self, second: int) -> bool:
        while self._seconds[0].at <= second - BREAKER_WINDOW:
            self._seconds.popleft()
        calls = sum(some.calls for some in self._seconds)
        return calls >= BREAKER_CALLS and 2 * sum(s.failures for s in self._seconds) >= calls


async def try_again(
    first: UserServiceError,
    again: Callable[[], Awaitable[UserServiceError | None]],
    *,
    pause_before: Callable[[UserServiceError, int], float | None],
    sleep: Callable[[float], Awaitable[None]],
) -> None:
    """Call `again` until it returns no error that is retried, or `pause_before` says None.

    Entered only after a first failure: tenacity takes 15 µs even where nothing is retried.

    Args:
        first: What the first attempt ended with.
        again: Makes an attempt, and returns what it failed with.
        pause_before: Given an error and the number of the attempt, returns the seconds to wait
            before the next one, or None if that is not to be made.
        sleep: Waits.
    """
    from tenacity import AsyncRetrying, RetryCallState, retry_if_result  # noqa: PLC0415

    outcomes = deque([first])
    pauses: deque[float] = deque()

    async def attempt() -> UserServiceError | None:
        return outcomes.popleft() if outcomes else await again()

    def stop(state: RetryCallState) -> bool:
        failed = state.outcome.result() if state.outcome is not None else first
        pause = pause_before(failed, state.attempt_number)
        if pause is not None:
            pauses.append(pause)
        return pause is None

    retrying = AsyncRetrying(
        retry=retry_if_result(lambda error: error is not None and is_retried(error)),
        stop=stop,
        sleep=lambda _seconds: sleep(pauses.popleft()),
        retry_error_callback=lambda _state: None,
    )
    await retrying(attempt)
