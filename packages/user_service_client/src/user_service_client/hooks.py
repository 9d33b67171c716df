"""What a client tells of what it does: typed events for metrics, logs and traces.

    hooks = Hooks(retry=lambda event: retries.labels(event.operation, event.reason).inc())
    client = UserServiceClient(url, hooks=hooks)

A hook is called in the event loop, between two steps of a call: it must be quick. What it raises is
logged, and goes no further.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

_log = logging.getLogger("user_service_client")

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class AttemptEvent:
    """An attempt of a call has ended.

    Attributes:
        operation: The method that was called, such as `users.get`.
        attempt: 1 for the first.
        status: The HTTP status, None where no answer came.
        error: The class of what went wrong without an answer, such as `NotSent`, else None. Where
            both are None, the attempt was cancelled, or the function of the key has failed.
        elapsed: Seconds that the attempt took.
        request_id: What the service logs it under.
    """

    operation: str
    attempt: int
    status: int | None
    error: str | None
    elapsed: float
    request_id: str


@dataclass(frozen=True, slots=True)
class RetryEvent:
    """An attempt has failed, and another one follows.

    Attributes:
        operation: The method that was called.
        attempt: The one that failed; 1 for the first.
        reason: Its status, or the class of its error.
        delay: Seconds until the next.
    """

    operation: str
    attempt: int
    reason: str
    delay: float


class CacheResult(StrEnum):
    """What the cache did for a read."""

    HIT = "hit"
    """The copy was fresh. Not told one by one, being most of what happens: see `cache.stats`."""
    STALE = "stale"
    """An old copy was returned, while it is revalidated, or since the service cannot be reached."""
    MISS = "miss"
    """The service was asked, or another read of the same was joined."""
    UNKNOWN = "unknown"
    """It was known that nobody has this id."""


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """A read was answered otherwise than with a fresh copy."""

    result: CacheResult
    documents: int


class StreamState(StrEnum):
    """Whether a client hears of changes."""

    OFF = "off"
    """It was made without `live=True`, or is closed."""
    INITIALIZING = "initializing"
    """The stream was not reached yet."""
    LIVE = "live"
    """Changes arrive."""
    INTERRUPTED = "interrupted"
    """The stream broke off, and is being reached for again."""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """The stream of changes has come to another state, or was reset (`reason` then says why)."""

    state: StreamState
    reason: str


@dataclass(frozen=True, slots=True)
class Hooks:
    """Functions that are called as things happen; None for what nobody listens to."""

    attempt: Callable[[AttemptEvent], None] | None = None
    retry: Callable[[RetryEvent], None] | None = None
    cache: Callable[[CacheEvent], None] | None = None
    stream: Callable[[StreamEvent], None] | None = None


def tell(hook: Callable[[E], None] | None, event: Callable[[], E]) -> None:
    """Call a hook, if there is one, with an event that is made only then."""
    if hook is None:
        return
    try:
        hook(event())
    except Exception:  # noqa: BLE001 - whatever it is, it is not the call's
        _log.exception("a hook has failed")


class Tracing(Protocol):
    """Puts spans around calls and their attempts; see `user_service_client.opentelemetry`."""

    def call(self, operation: str) -> AbstractContextManager[None]:
        """Return what a call is made in."""

    def attempt(
        self, operation: str, number: int, method: str, headers: MutableMapping[str, str]
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Return what an attempt is made in: it takes the status, and may add headers."""


class NoTracing:
    """Puts nothing around anything."""

    _nothing: AbstractContextManager[None] = nullcontext()
    _no_status: AbstractContextManager[Callable[[int], None]] = nullcontext(lambda _status: None)

    def call(self, _operation: str) -> AbstractContextManager[None]:
        """Return what does nothing."""
        return self._nothing

    def attempt(
        self, _operation: str, _number: int, _method: str, _headers: MutableMapping[str, str]
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Return what does nothing."""
        return self._no_status
