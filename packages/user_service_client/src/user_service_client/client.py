"""The client: one object a process, that holds the connections and offers the resources."""

from __future__ import annotations

import warnings
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self, Unpack

import httpx
from user_service_schemas import Health

from user_service_client._cache import CacheOptions, CacheStats, DocumentCache
from user_service_client._calls import ApiKey, Call, CallOptions, Calls, Id, id_text
from user_service_client._changes import ChangesOfUsers
from user_service_client._clock import Clock, SystemClock
from user_service_client._credentials import Credentials
from user_service_client._deliveries import Deliveries
from user_service_client._devices import Devices
from user_service_client._feedback import Feedback
from user_service_client._health import read_health
from user_service_client._loops import Home
from user_service_client._preferences import PreferencesOfUsers
from user_service_client._stream import ClientStatus, LiveUpdates
from user_service_client._transport import Transport, TransportFactory
from user_service_client._users import DocumentSource, Users
from user_service_client._writes import Writes
from user_service_client.hooks import Hooks, NoTracing, StreamState, Tracing

_UNHEALTHY = frozenset({503})


class Cache:
    """The client's own copies of users."""

    def __init__(self, documents: DocumentCache) -> None:
        self._documents = documents

    @property
    def stats(self) -> CacheStats:
        """What it did so far, and what it holds now."""
        return self._documents.stats

    def invalidate(self, user_id: Id) -> None:
        """Do not believe the copy of a user, nor one that is on its way."""
        self._documents.invalidate(id_text(user_id))

    def clear(self) -> None:
        """Do not believe any copy, nor one that is on its way."""
        self._documents.clear()


class UserServiceClient:
    """A client of one User Service.

    Use it as an async context manager, or call `aclose` at the end. One client serves any number
    of concurrent calls. It lives in one event loop at a time: used in another one, after the first
    has ended or the process was forked, it makes its connections anew and keeps its copies.

    Args:
        base_url: Such as `http://user-service:3001`; a path in it is put before every path.
        api_key: A service key, or a function (async or not) that returns the current one.
        timeout: The total deadline of a call in seconds, with all that it waits for.
        attempt_timeout: Seconds for one attempt; what has not answered by then is tried again.
        retries: How often a call is tried again, if that may help and time is left.
        cache: How users are kept; None: not at all.
        live: Follow the service's changes, so that copies are used until they change.
        hooks: Functions that are called as things happen.
        tracing: Puts spans around calls, such as `user_service_client.opentelemetry`'s.
        transport: Sends the requests instead of the client's own connections, such as
            `httpx.AsyncHTTPTransport()` or `httpx.MockTransport(router.async_handler)` for respx.
            It is closed with the client. A function that makes one is called for every event loop.
        clock: What time it is, which only tests replace.

    Attributes:
        users: Reading, registering, changing and deleting users.
        preferences: What users want to get, and the history of it.
        devices: Where a push can reach users.
        deliveries: Whether a message may go to a user now.
        feedback: Reporting what the providers said.
        credentials: Whose email and password these are.
        changes: What was changed, page by page.
        cache: The client's own copies of users.

    Raises:
        ValueError: `base_url` is no http URL, `api_key` cannot be a header, or a number is none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: ApiKey | None = None,
        timeout: float = 2.0,
        attempt_timeout: float = 0.8,
        retries: int = 2,
        cache: CacheOptions | None = CacheOptions(),  # noqa: B008 - it is frozen
        live: bool = False,
        hooks: Hooks = Hooks(),  # noqa: B008 - it is frozen
        tracing: Tracing | None = None,
        transport: httpx.AsyncBaseTransport | TransportFactory | None = None,
        clock: Clock | None = None,
    ) -> None:
        if not (timeout > 0 and attempt_timeout > 0 and retries >= 0):  # nor NaN
            raise ValueError("timeouts must be above 0, and retries not below")
        self._clock = clock = clock or SystemClock()
        self._home = home = Home()
        self._transport = Transport(base_url, transport, home)
        calls = Calls(
            api_key=api_key,
            timeout=timeout,
            attempt_timeout=attempt_timeout,
            retries=retries,
            transport=self._transport,
            home=home,
            clock=clock,
            hooks=hooks,
            tracing=tracing or NoTracing(),
        )
        self._calls = calls
        self._documents = DocumentCache(cache, DocumentSource(calls), home, clock, hooks)
        self._live = LiveUpdates(calls, self._documents, home, clock, hooks) if live else None
        self._made_at = clock.now()
        writes = Writes(calls, self._documents)
        self.users = Users(calls, self._documents, writes)
        self.preferences = PreferencesOfUsers(calls, writes)
        self.devices = Devices(calls, writes)
        self.deliveries = Deliveries(calls, self._documents, clock)
        self.feedback = Feedback(calls)
        self.credentials = Credentials(calls)
        self.changes = ChangesOfUsers(calls)
        self.cache = Cache(self._documents)

    @property
    def status(self) -> ClientStatus:
        """Whether the client hears of changes, and since when."""
        if self._live is None:
            return ClientStatus(StreamState.OFF, self._made_at, is_complete=False)
        return self._live.status

    async def health(self, **options: Unpack[CallOptions]) -> Health:
        """Return how the service and its dependencies are; `unhealthy` is not raised.

        Raises:
            ServerError: a proxy answered, and not the service.
        """
        call = Call("health", "GET", "/health", accepts=_UNHEALTHY, **options)
        return read_health(await self._calls.send(call), self._clock.now())

    async def aclose(self) -> None:
        """Close the connections and end what is under way. The client can be used again."""
        self._home.come()
        async with AsyncExitStack() as stack:  # to its end, also if it is cancelled
            stack.callback(self._home.leave)
            stack.push_async_callback(self._transport.aclose)
            stack.push_async_callback(self._documents.aclose)
            if self._live is not None:
                await self._live.aclose()

    async def __aenter__(self) -> Self:
        self._home.enter()
        return self

    async def __aexit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # Not made to its end if its arguments were refused.
        live: LiveUpdates | None = getattr(self, "_live", None)
        transport: Transport | None = getattr(self, "_transport", None)
        is_following = live is not None and live.is_following
        if transport is None or not (transport.has_connections or is_following):
            return
        warnings.warn(f"{type(self).__name__} was not closed: await aclose()", ResourceWarning, 2)
        loop = self._home.loop
        if live is not None and loop is not None and not loop.is_closed():
            live.abandon(loop)
        transport.forget()
