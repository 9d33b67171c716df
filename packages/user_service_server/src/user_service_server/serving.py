"""Owns the process that serves: its port, its signals, and the order in which it ends."""

import asyncio
import contextlib
import errno
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol, cast

from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from user_service_server.settings import Settings

_BACKLOG = 1024
# Granian's limit on reading headers also ends idle connections. Load balancers keep theirs for
# 60 s, and the side that reuses connections must be the first to close them.
_IDLE_TIMEOUT_MS = 75_000
USER_TIMEOUT_MS = 20_000
_MAX_HEADER_BYTES = 64 * 1024
# Granian counts connections, idle ones included; past it they wait in the kernel's queue.
_MAX_CONNECTIONS = 16_384
# Files and connections of our own, to Postgres and Redis among them.
_RESERVED_FILES = 256
# What is left to the application's own end, and to requests that were told to end.
_CLOSE_TIMEOUT = 5.0
_CANCEL_TIMEOUT = 1.0


class ServingError(Exception):
    """The service cannot be started; the text is one line."""


class Application(Protocol):
    """What is served: an ASGI application whose life is a context manager, as Litestar's is."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    def lifespan(self) -> AbstractAsyncContextManager[None]: ...


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address, on which nobody is listening yet.

    Raises:
        ServingError: the port is taken, or the address is not one of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise ServingError(f"HOST={host!a} is not an address of this machine") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A restart need not wait for connections of the last run to be forgotten.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":
            # Accepted sockets inherit it: a peer that takes nothing for so long is gone. Without
            # it, a stream that was cut off would hold its socket, and the end of the server.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        listener.setblocking(False)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _not_bound(host, port, error) from None
    return listener


async def serve(
    app: Application,
    settings: Settings,
    *,
    draining: asyncio.Event,
    listener: socket.socket | None = None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, and return when all is ended.

    The first signal sets `draining` (so does anyone else who wants the end); requests are then
    served for `shutdown_grace` seconds more, new connections are refused, and what runs gets
    `shutdown_timeout` seconds to finish. A second signal ends it at once.

    Args:
        app: the application; its lifespan is entered before the first connection is accepted.
        settings: the address and the times.
        draining: what the application looks at to say that it is not ready and to end streams.
        listener: a socket from `bind`; without one, `host` and `port` of the settings are bound.
        on_ready: called once, when connections are accepted.

    Raises:
        ServingError: the port is taken, or the application does not start.
    """
    if listener is None:
        listener = bind(settings.host, settings.port)
    with contextlib.closing(listener):
        await _Service(app, settings, draining).run(listener, on_ready)


class _Service:
    """One run of an application, from its start to its end."""

    def __init__(self, app: Application, settings: Settings, draining: asyncio.Event) -> None:
        self._app = app
        self._settings = settings
        self._draining = draining
        self._hurry = asyncio.Event()
        self._accepting = False

    async def run(self, listener: socket.socket, on_ready: Callable[[], None] | None) -> None:
        life = asyncio.create_task(self._live(listener, on_ready))

        def interrupt() -> None:
            if not self._accepting or self._hurry.is_set():
                life.cancel()
            elif self._draining.is_set():
                self._hurry.set()
            self._draining.set()

        with _signals(interrupt), _scheduling(self._settings.cpu_scheduling):
            try:
                await asyncio.wait({life})
            finally:
                life.cancel()
                await asyncio.wait({life})
        if not life.cancelled():
            life.result()

    async def _live(self, listener: socket.socket, on_ready: Callable[[], None] | None) -> None:
        async with _lifespan(self._app):
            # What lives as long as the process need not be looked at by each collection.
            gc.collect()
            gc.freeze()
            try:
                listener.listen(_BACKLOG)
            except OSError as error:
                # Someone else bound the port, too, and was the first to listen.
                raise _not_bound(self._settings.host, self._settings.port, error) from None
            self._accepting = True
            if on_ready is not None:
                on_ready()
            await self._accept(listener)

    async def _accept(self, listener: socket.socket) -> None:
        running: set[asyncio.Task[None]] = set()
        server = _Server(_tracked(self._app, running), listener)
        serving = asyncio.create_task(server.serve())
        try:
            await _first(serving, self._draining)
            await _first(serving, self._hurry, within=self._settings.shutdown_grace)
            server.end()
            await _first(serving, self._hurry, within=self._settings.shutdown_timeout)
        finally:
            server.end()
            for task in running:
                task.cancel()
            await asyncio.wait({serving}, timeout=_CANCEL_TIMEOUT)
        if serving.done():
            serving.result()


@contextlib.asynccontextmanager
async def _lifespan(app: Application) -> AsyncIterator[None]:
    lifespan = app.lifespan()
    try:
        await lifespan.__aenter__()
    except Exception as error:
        cause: BaseException = error
        # Litestar enters its lifespan within a task group, which wraps what it meets.
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise ServingError(f"the service did not start: {reason}") from error
    try:
        yield
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await lifespan.__aexit__(None, None, None)


class _Server(Server):
    """Granian in this event loop, on a socket that is bound already."""

    def __init__(self, app: Any, listener: socket.socket) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        super().__init__(
            app,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            websockets=False,
            runtime_threads=1,
            backlog=_BACKLOG,
            backpressure=max(1, min(_MAX_CONNECTIONS, files - _RESERVED_FILES)),
            http1_settings=HTTP1Settings(
                header_read_timeout=_IDLE_TIMEOUT_MS, max_buffer_size=_MAX_HEADER_BYTES
            ),
            log_enabled=False,
        )
        self._listener = listener

    def end(self) -> None:
        """Refuse new connections, close idle ones, and end when no request runs any more."""
        stop: Callable[[], None] = self.stop
        stop()

    def _init_shared_socket(self) -> None:
        # Granian closes the descriptor that it is given. Its stubs leave out the arguments.
        holder: Any = SocketHolder
        self._shd = holder(self._listener.detach(), False, _BACKLOG)


@contextlib.contextmanager
def _scheduling(policy: Literal["batch", "system"]) -> Iterator[None]:
    """With "batch", interrupt no thread because another was woken; those begun inherit it.

    Granian's thread reads and writes sockets, this one runs the event loop. Where they share a core
    the first would interrupt the second at each answer, to write it: three switches a request,
    and half of the time of one that asks for nothing (docs/performance.md). But where all cores are
    busy with others, too, what is woken waits for up to 3 ms, until the system's clock ticks.
    """
    is_batch = policy == "batch" and _rescheduled("SCHED_OTHER", "SCHED_BATCH")
    try:
        yield
    finally:
        if is_batch:
            _rescheduled("SCHED_BATCH", "SCHED_OTHER")


def _rescheduled(before: str, after: str) -> bool:
    """Change the thread's policy, if it is `before`, and the system knows and allows it."""
    with contextlib.suppress(AttributeError, OSError):
        if os.sched_getscheduler(0) == getattr(os, before):
            os.sched_setscheduler(0, getattr(os, after), os.sched_param(0))
            return True
    return False


def _tracked(app: Application, running: set[asyncio.Task[None]]) -> Callable[..., Any]:
    """Return the application, with the tasks that are in it noted in `running`."""

    async def tracked(scope: Any, receive: Any, send: Any) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        running.add(task)
        try:
            await app(scope, receive, send)
        finally:
            running.discard(task)

    return tracked


async def _first(
    serving: asyncio.Task[None], event: asyncio.Event, *, within: float | None = None
) -> None:
    """Return when the event is set, serving is over, or the seconds are."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({serving, waiting}, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


@contextlib.contextmanager
def _signals(interrupt: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    for number in before:
        loop.add_signal_handler(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            # The loop leaves the system's default, which ends `dev` without its engines.
            signal.signal(number, handler)


def _not_bound(host: str, port: int, error: OSError) -> ServingError:
    if error.errno == errno.EADDRINUSE:
        return ServingError(f"Port {port} is taken; set PORT, or end what listens there")
    return ServingError(f"cannot listen on {host}:{port}: {error.strerror}")
