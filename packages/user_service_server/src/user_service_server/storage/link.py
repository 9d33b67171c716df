"""The way to Redis: every call bounded in time, and none made to a server that is down.

One Redis or Valkey, or a cluster of them: then one primary that is down is down for its slots only.
To each server there is one wire, which all calls share.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextvars import Context
from typing import Any, NamedTuple

import structlog
from redis.asyncio import ConnectionPool, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from ..logs import describe
from ..settings import Settings
from .buckets import ALL_BUCKETS, hash_tag, slot_of
from .wire import UNREACHABLE, Command, Wire

PROBE_INTERVAL = 0.1
"""Seconds between two looks at a server that failed."""
LOOK_INTERVAL = 1.0
"""Seconds between two looks at who serves which slots of a cluster."""

_log = structlog.get_logger()

# Of the cluster's, not all are Redis errors.
_FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)
_INFO = re.compile(rb"^(run_id|master_replid|role|loading):(\w+)", re.MULTILINE)
_REDIRECTION = re.compile("MOVED|ASK |CLUSTERDOWN")
_PING: Command = ("PING",)
_PONG = b"PONG"
_ASKING: Command = ("ASKING",)


class _StrangeServer(Exception):
    """The server with this identity, which may hold these buckets, was not seen before."""


class _NotRecognised(ConnectionError):
    """A server cannot be made known, since Postgres does not answer."""


class _Server:
    """One server, and the wire to it. While there is none it is not asked, and looked for."""

    def __init__(
        self, name: str, timeout: float, connect: Callable[[], Awaitable[AbstractConnection]]
    ) -> None:
        self.wire: Wire | None = None
        self.recovery: asyncio.Task[None] | None = None
        self._name = name
        self._timeout = timeout
        self._connect = connect
        self._next_look = 0.0
        self._first_look: asyncio.Future[None] | None = None
        self._is_told = False
        self._is_outdated = False
        self._is_closed = False
        self.renew()

    async def call(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands over the wire, as it does, once there is one."""
        wire = await self._settled()
        return [UNREACHABLE] * len(commands) if wire is None else await wire.call(commands)

    async def strings(self, keys: Sequence[str]) -> list[Any]:
        """Return strings as the wire does, once there is one."""
        wire = await self._settled()
        return [UNREACHABLE] * len(keys) if wire is None else await wire.strings(keys)

    async def _settled(self) -> Wire | None:
        """Return the wire; where there was no failure, but it is being made, that is waited for."""
        if self._first_look is not None:
            await asyncio.wait((self._first_look,), timeout=self._timeout / 2)
        return self.wire

    def renew(self) -> None:
        """Make another wire, since somebody else may answer, and use this one no more."""
        self._take(None)
        self._is_outdated = True
        if self.recovery is None:
            self._first_look = asyncio.get_running_loop().create_future()
            self._begin_recovery()

    def replace(self) -> None:
        """Make another wire, to see who answers, and use this one until then."""
        if self.recovery is None:
            self._begin_recovery()

    def _lost(self, error: BaseException | None) -> None:
        """Note that the wire is over; `error` is None where nobody was waiting for an answer."""
        if error is None:
            self.renew()
            return
        self._tell(error)
        self.wire = None
        self.replace()

    def _begin_recovery(self) -> None:
        if not self._is_closed:
            # In a context of its own: it is not part of the request that met the failure.
            self.recovery = asyncio.create_task(
                self._recover(), name="redis-recovery", context=Context()
            )

    async def _recover(self) -> None:
        made: Wire | None = None
        while made is None and not self._is_closed:
            # Also one that is lost as soon as it is found is looked for no more often.
            await asyncio.sleep(max(0.0, self._next_look - time.monotonic()))
            self._next_look = time.monotonic() + PROBE_INTERVAL
            self._is_outdated = False
            try:
                made = await self._made()
                if self._is_outdated:  # who answered may have been greeted before it mattered
                    made.close()
                    made = None
            except _FAILURES as error:
                self._tell(error)
            except Exception as error:  # noqa: BLE001 - nobody else would ever ask Redis again
                _log.error("redis.failed", **describe(error))
            self._take(made)
            if self._first_look is not None:
                self._first_look.set_result(None)
                self._first_look = None
        self.recovery = None
        if self._is_told:
            self._is_told = False
            _log.info("redis.reachable", server=self._name)

    async def _made(self) -> Wire:
        connection = await self._connect()
        try:
            return Wire(connection, self._timeout, self._lost)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise

    def _take(self, wire: Wire | None) -> None:
        """Go on with another wire, or without one."""
        before, self.wire = self.wire, wire
        if before is not None:
            before.close()
        if wire is not None and self._is_closed:
            # A task that is cancelled as it is done with something may never know (Python 3.11).
            wire.close()

    def _tell(self, error: BaseException) -> None:
        # Where it is not known it is Postgres that does not answer.
        if not self._is_told and not isinstance(error, _NotRecognised):
            self._is_told = True
            _log.warning("redis.unreachable", server=self._name, error=type(error).__qualname__)

    def close(self) -> None:
        """Look for it no more, and end when those who asked have their answers."""
        self._is_closed = True
        if self.recovery is not None:
            self.recovery.cancel()
        self._take(None)


class RedisLink:
    """Runs commands on Redis; what cannot be had in time is answered with `UNREACHABLE`.

    `recognise` is told of every server that was not seen before, and of the buckets that it may
    hold: a restart with old data, or a failover that lost writes. Until it has returned, that
    server counts as unreachable.
    """

    def __init__(
        self,
        settings: Settings,
        recognise: Callable[[str, Collection[int]], Awaitable[None]],
    ) -> None:
        # A request asks Redis three times at the most: to count it, and to read and lease, or to
        # announce and publish.
        self._timeout = settings.redis_timeout_ms / 1000 / 3
        # Nobody waits for all of a connection that is made anew.
        self._patience = settings.redis_timeout_ms / 1000
        self._recognise = recognise
        self._known: set[str] = set()
        self._servers: dict[str, _Server] = {}
        self._looking: asyncio.Task[None] | None = None
        self._next_look = 0.0
        self._is_closed = False
        options: dict[str, Any] = {
            "socket_timeout": self._patience,
            "socket_connect_timeout": self._patience,
            # One attempt: what fails is answered from Postgres, not waited for.
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        # What redis-py knows of addresses: it makes connections, but sends no commands of ours.
        self._map: ConnectionPool | RedisCluster
        if settings.redis_cluster:
            # The slots of a dead primary are read from Postgres; the others go on.
            self._map = RedisCluster.from_url(
                settings.redis_url, require_full_coverage=False, **options
            )
        else:
            self._map = ConnectionPool.from_url(settings.redis_url, **options)

    @property
    def is_one(self) -> bool:
        """Whether a command may have several keys, since they are all on one server."""
        return isinstance(self._map, ConnectionPool)

    @property
    def reachable(self) -> bool:
        """Whether all servers answer."""
        return all(server.wire is not None for server in self._servers.values())

    async def start(self, patience: float) -> None:
        """Wait up to `patience` seconds for Redis, then go on without it."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        is_told = False
        while not await self.ping():
            waited = loop.time() - began
            if waited >= patience:
                _log.warning("redis.missing", note="serving from Postgres until it comes")
                return
            if waited >= PROBE_INTERVAL and not is_told:
                is_told = True
                _log.warning("redis.waiting", up_to_seconds=patience)
            await asyncio.sleep(PROBE_INTERVAL / 5)

    async def ping(self) -> bool:
        """Whether all servers answer."""
        names = self._names()
        answers = await asyncio.gather(*(self._server(name).call([_PING]) for name in names))
        # Of a cluster more may be known than before.
        return names == self._names() and all(answer == [_PONG] for answer in answers)

    def _names(self) -> list[str]:
        if isinstance(self._map, RedisCluster):
            return [str(node.name) for node in self._map.get_primaries()] or [_ONLY]
        return [_ONLY]

    def strings(self, keys: Sequence[str]) -> Awaitable[list[Any]]:
        """Return the strings under `keys`; None, or an error, for what is none."""
        if isinstance(self._map, ConnectionPool):
            server = self._server(_ONLY)
            return server.strings(keys) if server.wire is None else server.wire.strings(keys)
        return self.run([("GET", key) for key in keys])

    def run(self, commands: Sequence[Command]) -> Awaitable[list[Any]]:
        """Run commands; what a server refuses is answered by its error."""
        if isinstance(self._map, ConnectionPool):
            server = self._server(_ONLY)
            return server.call(commands) if server.wire is None else server.wire.call(commands)
        return self._run_in_cluster(self._map, commands)

    async def _run_in_cluster(
        self, cluster: RedisCluster, commands: Sequence[Command]
    ) -> list[Any]:
        replies: list[Any] = [UNREACHABLE] * len(commands)
        routes = [_Route(_server_of(cluster, command)) for command in commands]
        try:
            await self._ask(commands, dict(enumerate(routes)), replies)
            redirected: dict[int, _Route] = {}
            for number, reply in enumerate(replies):
                if isinstance(reply, ResponseError) and _REDIRECTION.match(str(reply)):
                    replies[number] = UNREACHABLE
                    if route := self._redirected(cluster, routes[number].name, str(reply)):
                        redirected[number] = route
            if redirected:
                await self._ask(commands, redirected, replies)
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait without end
            _log.error("redis.failed", **describe(error))
        return replies

    async def _ask(
        self, commands: Sequence[Command], routes: Mapping[int, _Route], replies: list[Any]
    ) -> None:
        """Run those of the commands that have a route, each server's together."""
        by_server: dict[str, list[int]] = defaultdict(list)
        for number, route in routes.items():
            by_server[route.name].append(number)

        async def ask(name: str, numbers: list[int]) -> None:
            asked: list[Command] = []
            for number in numbers:
                if routes[number].is_asking:
                    asked.append(_ASKING)
                asked.append(commands[number])
            answered = await self._server(name).call(asked)
            kept = [r for command, r in zip(asked, answered, strict=True) if command is not _ASKING]
            for number, reply in zip(numbers, kept, strict=True):
                replies[number] = reply

        await asyncio.gather(*(ask(*item) for item in by_server.items()))

    def _redirected(self, cluster: RedisCluster, asked: str, refusal: str) -> _Route | None:
        """Return to whom a server has sent a command, if to anybody who is known."""
        kind, _, rest = refusal.partition(" ")
        if kind != "ASK":
            self._look_soon(cluster)
        if kind == "MOVED":
            # It may not be a primary any more, and be one again before the map is looked at.
            self._server(asked).replace()
        name = rest.rpartition(" ")[2]
        # One without slots is not in the map. Until it has some it is as good as not there.
        if kind == "CLUSTERDOWN" or cluster.get_node(node_name=name) is None:
            return None
        return _Route(name, is_asking=kind == "ASK")

    def _server(self, name: str) -> _Server:
        server = self._servers.get(name)
        if server is None:
            server = self._servers[name] = _Server(name, self._timeout, lambda: self._connect(name))
        return server

    async def _connect(self, name: str) -> AbstractConnection:
        """Return a connection to a server that is known.

        Raises:
            RedisError, RedisClusterException, OSError, TimeoutError
        """
        while True:
            try:
                async with asyncio.timeout(self._patience):
                    return await self._greeted(await self._new_connection(name))
            except _StrangeServer as stranger:
                identity, buckets = stranger.args
            except _FAILURES:
                if isinstance(self._map, RedisCluster) and name != _ONLY:
                    self._look_soon(self._map, name)
                raise
            try:
                await self._recognise(identity, buckets)
            except OSError as error:
                raise _NotRecognised from error
            self._known.add(identity)

    async def _new_connection(self, name: str) -> AbstractConnection:
        if isinstance(self._map, ConnectionPool):
            return self._map.connection_class(**self._map.connection_kwargs)
        if not self._map.get_primaries():
            await self._map.nodes_manager.initialize()
        node = self._map.get_primaries()[0] if name == _ONLY else self._map.get_node(node_name=name)
        if node is None:
            raise ConnectionError  # it left the cluster
        return node.connection_class(**node.connection_kwargs)

    async def _greeted(self, connection: AbstractConnection) -> AbstractConnection:
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            await self._meet(connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _meet(self, connection: AbstractConnection) -> None:
        """Look who answers on a new connection, and whether it does so in time.

        `run_id` is new with every start of a server, `master_replid` with every promotion.

        Raises:
            _StrangeServer: it was not made known yet.
        """
        await connection.send_command("INFO")
        info = dict(_INFO.findall(bytes(await connection.read_response())))
        if info.get(b"loading") == b"1":
            raise BusyLoadingError
        if info.get(b"role") in {b"slave", b"replica"}:
            raise ReadOnlyError
        async with asyncio.timeout(self._timeout):
            await connection.send_command("PING")
            await connection.read_response()
        identity = f"{info.get(b'run_id')!r}{info.get(b'master_replid')!r}"
        if identity not in self._known:
            raise _StrangeServer(identity, await self._buckets_on(connection))

    async def _buckets_on(self, connection: AbstractConnection) -> Collection[int]:
        """Return the buckets of which the server behind a connection may hold something."""
        if isinstance(self._map, RedisCluster):
            await connection.send_command("CLUSTER", "NODES")
            return _buckets_of(bytes(await connection.read_response()))
        return ALL_BUCKETS

    def _look_soon(self, cluster: RedisCluster, failed: str | None = None) -> None:
        """Look who serves which slots now, once a second at most, until somebody tells.

        After it all wires are made anew. That also greets a replica that became a primary.
        """
        if not self._is_closed and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look(cluster, failed), context=Context())

    async def _look(self, cluster: RedisCluster, failed: str | None) -> None:
        while not self._is_closed:
            await asyncio.sleep(max(0.0, self._next_look - time.monotonic()))
            self._next_look = time.monotonic() + LOOK_INTERVAL
            before = _owners(cluster)
            with contextlib.suppress(*_FAILURES):
                async with asyncio.timeout(self._patience):
                    await cluster.nodes_manager.initialize(last_failed_node_name=failed)
                self._look_again(cluster, before)
                return

    def _look_again(self, cluster: RedisCluster, before: Sequence[str]) -> None:
        """Look who answers at each address, now that it is known who serves which buckets."""
        owners = _owners(cluster)
        gained = {name for name, was in zip(owners, before, strict=True) if name != was}
        served = set(self._names())
        for name, server in tuple(self._servers.items()):
            if name in gained:
                server.renew()
            elif name in served or name == _ONLY:
                server.replace()
            else:
                self._servers.pop(name).close()

    async def close(self) -> None:
        """Close the connections."""
        self._is_closed = True
        tasks = [server.recovery for server in self._servers.values()] + [self._looking]
        if self._looking is not None:
            self._looking.cancel()
        for server in self._servers.values():
            server.close()
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
        if isinstance(self._map, RedisCluster):
            await self._map.nodes_manager.aclose()
            await self._map.nodes_manager.aclose("startup_nodes")


_ONLY = "redis"
"""The name of the one server, or of any of a cluster."""


class _Route(NamedTuple):
    """The server that a command goes to; if `is_asking`, for once (ASK) and not for good."""

    name: str
    is_asking: bool = False


def _server_of(cluster: RedisCluster, command: Command) -> str:
    return _owner(cluster, command[3] if command[0] == "EVAL" else command[1])


def _owner(cluster: RedisCluster, key: str) -> str:
    with contextlib.suppress(RedisError, RedisClusterException):
        if node := cluster.get_node_from_key(key):
            return str(node.name)
    return _ONLY


def _owners(cluster: RedisCluster) -> list[str]:
    """Return who serves each bucket, as far as is known."""
    return [_owner(cluster, hash_tag(bucket)) for bucket in ALL_BUCKETS]


def _buckets_of(nodes: bytes) -> Collection[int]:
    """Return the buckets that a server may hold, by its own CLUSTER NODES.

    By its own view, and not by the others', which may be older: it answers for those slots that it
    takes for its own. Besides, it may hold what it imports: a primary that starts with keys in the
    slots of another either deletes them, or begins to import these slots. Slots that it gets later
    come with their keys from the one that had them, or empty. A replica that takes over its
    primary's has another `master_replid` from then on, and is a stranger anew. What only follows
    now is not known by its slots: all.
    """
    for line in nodes.splitlines():
        words = line.split()
        flags = words[2].split(b",")
        if b"myself" in flags and b"master" in flags:
            held: set[int] = set()
            for slots in words[8:]:  # 0-5460, 5462, [5463->-other], [5464-<-other]
                first, _, last = slots.strip(b"[]").partition(b"-")
                held.update(range(int(first), int(last if last.isdigit() else first) + 1))
            return [bucket for bucket in ALL_BUCKETS if slot_of(bucket) in held]
    return ALL_BUCKETS
