"""The connection to Redis: every call bounded in time, and none made to a server that is down.

One Redis or Valkey, or a cluster of them: then one primary that is down is down for its slots only.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextvars import Context
from enum import Enum
from functools import partial
from itertools import islice
from typing import Any, Final

import structlog
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from ..logs import describe
from ..settings import Settings
from .buckets import ALL_BUCKETS, slot_of

PROBE_INTERVAL = 0.1
"""Seconds between two looks at a server that failed."""
LOOK_INTERVAL = 1.0
"""Seconds between two looks at who serves which slots, while a server of a cluster is down."""
LATE = 0.02
"""Seconds after which a timer of the event loop has come late."""
TURNS = 20
"""How many turns of the event loop an answer takes at most from the socket to who asked."""

Command = tuple[Any, ...]
"""A command that concerns one key, which is its second word, or of EVAL its fourth."""

_Asked = tuple[Sequence[Command], asyncio.Future[list[Any]]]

_log = structlog.get_logger()


class Unreachable(Enum):
    """The answer of a server that gives none."""

    UNREACHABLE = "unreachable"


UNREACHABLE: Final = Unreachable.UNREACHABLE
# Of the cluster's, not all are Redis errors.
_FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)
_IDENTITY = re.compile(rb"^(run_id|master_replid):(\w+)", re.MULTILINE)


class StrangeServer(RedisError):
    """The server behind the address is not one that was seen before."""


class _Server:
    """One server, and whether it is asked. After a failure it is not, until a probe succeeds."""

    def __init__(self, name: str, probe: Callable[[], Awaitable[object]]) -> None:
        self.recovery: asyncio.Task[None] | None = None
        self._name = name
        self._probe = probe

    @property
    def reachable(self) -> bool:
        return self.recovery is None

    def failed(self, error: BaseException) -> None:
        if self.recovery is None:
            if not isinstance(error, StrangeServer):
                _log.warning("redis.unreachable", server=self._name, error=type(error).__qualname__)
            # In a context of its own: it is not part of the request that met the failure.
            self.recovery = asyncio.create_task(
                self._recover(), name="redis-recovery", context=Context()
            )

    async def _recover(self) -> None:
        while True:
            try:
                await self._probe()
                break
            except _FAILURES:
                pass
            except Exception as error:  # noqa: BLE001 - nobody else would ever ask Redis again
                _log.error("redis.failed", **describe(error))
            await asyncio.sleep(PROBE_INTERVAL)
        self.recovery = None
        _log.info("redis.reachable", server=self._name)


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
        self._recognise = recognise
        self._known: set[str] = set()
        self._strangers: dict[str, Collection[int]] = {}
        self._servers: dict[str, _Server] = {}
        self._next_look = 0.0
        self._asked: list[_Asked] = []
        self._flushes: set[asyncio.Task[None]] = set()
        options: dict[str, Any] = {
            "socket_timeout": self._timeout,
            "socket_connect_timeout": self._timeout,
            # One attempt: what fails is answered from Postgres, not waited for.
            "retry": Retry(NoBackoff(), 0),
            "max_connections": 256,
            "protocol": 2,
        }
        self._client: Redis | RedisCluster
        if settings.redis_cluster:
            # The slots of a dead primary are read from Postgres; the others go on.
            self._client = RedisCluster.from_url(
                settings.redis_url, require_full_coverage=False, **options
            )
            # What its connections are made with, now and later; the constructor does not take it.
            for made_with in (
                self._client.connection_kwargs,
                *(node.connection_kwargs for node in self._client.startup_nodes),
            ):
                made_with["redis_connect_func"] = self._greet
        else:
            self._client = Redis.from_url(
                settings.redis_url, redis_connect_func=self._greet, **options
            )

    @property
    def reachable(self) -> bool:
        """Whether all servers answer."""
        return all(server.reachable for server in self._servers.values())

    async def start(self, patience: float) -> None:
        """Wait up to `patience` seconds for Redis, then go on without it."""
        if await self.ping():
            return
        recoveries = [s.recovery for s in self._servers.values() if s.recovery is not None]
        if not recoveries:
            return
        # Every server is a stranger at first, and made known by its recovery.
        _done, pending = await asyncio.wait(recoveries, timeout=PROBE_INTERVAL)
        if pending:
            _log.warning("redis.waiting", up_to_seconds=patience)
            _done, pending = await asyncio.wait(pending, timeout=patience)
        if pending:
            _log.warning("redis.missing", note="serving from Postgres until it comes")

    async def ping(self) -> bool:
        """Whether all servers answer."""
        names = [_ONLY]
        if isinstance(self._client, RedisCluster):
            names = [str(node.name) for node in self._client.get_primaries()] or [_ONLY]
        pings = [self._ask(name, partial(self._ping, name)) for name in names]
        return UNREACHABLE not in await asyncio.gather(*pings)

    async def strings(self, keys: Sequence[str]) -> list[Any]:
        """Return the strings under `keys`; None, or an error, for what is none."""
        if isinstance(self._client, RedisCluster):
            return await self.run([("GET", key) for key in keys])
        (found,) = await self.run([("MGET", *keys)])
        return list(found) if isinstance(found, list) else [found] * len(keys)

    def run(self, commands: Sequence[Command]) -> Awaitable[list[Any]]:
        """Run commands; what a server refuses is answered by its error.

        All that is asked for in one turn of the event loop is one round trip to each server: a
        call of redis-py costs more CPU than all of Litestar, and each takes a connection.
        """
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._flush)
        future: asyncio.Future[list[Any]] = loop.create_future()
        self._asked.append((commands, future))
        return future

    def _flush(self) -> None:
        asked, self._asked = self._asked, []
        task = asyncio.create_task(self._answer(asked))
        self._flushes.add(task)
        task.add_done_callback(self._flushes.discard)

    async def _answer(self, asked: Sequence[_Asked]) -> None:
        commands = [command for some, _ in asked for command in some]
        try:
            replies = iter(await self._run_all(commands))
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait without end
            _log.error("redis.failed", **describe(error))
            replies = iter([UNREACHABLE] * len(commands))
        for some, future in asked:
            answer = list(islice(replies, len(some)))
            if not future.done():
                future.set_result(answer)

    async def _run_all(self, commands: Sequence[Command]) -> list[Any]:
        if isinstance(self._client, Redis):
            return await self._run_some(_ONLY, commands)
        by_server: dict[str, list[int]] = defaultdict(list)
        for number, command in enumerate(commands):
            by_server[_server_of(self._client, command)].append(number)
        replies: list[Any] = [UNREACHABLE] * len(commands)

        async def run_some(name: str, numbers: list[int]) -> None:
            answered = await self._run_some(name, [commands[number] for number in numbers])
            for number, reply in zip(numbers, answered, strict=True):
                replies[number] = reply

        await asyncio.gather(*(run_some(*item) for item in by_server.items()))
        return replies

    async def _run_some(self, name: str, commands: Sequence[Command]) -> list[Any]:
        answered = await self._ask(name, lambda: self._pipeline(commands))
        return [UNREACHABLE] * len(commands) if answered is UNREACHABLE else answered

    async def _pipeline(self, commands: Sequence[Command]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            return list(await pipe.execute(raise_on_error=False))

    async def _ask(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        server = self._servers.get(name)
        if server is None:
            server = self._servers[name] = _Server(name, lambda: self._probe(name))
        if not server.reachable:
            return UNREACHABLE
        try:
            return await self._in_time(call)
        except _FAILURES as error:
            server.failed(error)
            return UNREACHABLE

    async def _in_time(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Await a call for the time that a request may wait for Redis.

        A busy event loop is no fault of Redis: while its timers come late, or it is at work most of
        the time, the time counts anew, up to three times; and what has arrived by then but was
        not looked at yet counts, too.
        """
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(call())
        for _ in range(3):
            began, worked = loop.time(), time.thread_time()
            await asyncio.wait((task,), timeout=self._timeout)
            took, worked = loop.time() - began, time.thread_time() - worked
            if task.done() or (took < self._timeout + LATE and worked < took / 2):
                break
        for _ in range(TURNS):
            if task.done():
                return task.result()
            await asyncio.sleep(0)
        task.cancel()
        raise TimeoutError

    async def _probe(self, name: str) -> None:
        """Ask a failed server again, after strangers were made known."""
        for identity, buckets in tuple(self._strangers.items()):
            await self._recognise(identity, buckets)
            self._known.add(identity)
            self._strangers.pop(identity, None)
        try:
            async with asyncio.timeout(self._timeout):
                await self._ping(name)
        except _FAILURES:
            if isinstance(self._client, RedisCluster) and name != _ONLY:
                await self._look_for_another(self._client, name)
            raise

    async def _look_for_another(self, cluster: RedisCluster, name: str) -> None:
        """Look whether another server has taken over the slots of one that is down.

        Once a second, for after each look all connections are made anew. That also greets a replica
        that became a primary behind a connection.
        """
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + LOOK_INTERVAL
            with contextlib.suppress(*_FAILURES):
                async with asyncio.timeout(self._timeout):
                    await cluster.nodes_manager.initialize(last_failed_node_name=name)

    async def _ping(self, name: str) -> object:
        if isinstance(self._client, Redis):
            return await self._client.ping()
        # The first time only; and by the node, since after a command of the cluster's client that
        # failed all others wait until it is initialized anew. That takes tens of ms, and what gives
        # it up closes all connections: a server that is down would take the others with it.
        await self._client.initialize()
        node = self._client.get_node(node_name=name)
        nodes = [node] if node else self._client.get_primaries()
        return await asyncio.gather(*(node.execute_command("PING") for node in nodes))

    async def _greet(self, connection: AbstractConnection) -> None:
        """Look who answers on a new connection.

        `run_id` is new with every start of a server, `master_replid` with every promotion.

        Raises:
            StrangeServer: it was not made known yet.
        """
        await connection.on_connect()
        await connection.send_command("INFO")
        info = dict(_IDENTITY.findall(bytes(await connection.read_response())))
        identity = f"{info.get(b'run_id')!r}{info.get(b'master_replid')!r}"
        if identity not in self._known:
            self._strangers[identity] = await self._buckets_on(connection)
            raise StrangeServer

    async def _buckets_on(self, connection: AbstractConnection) -> Collection[int]:
        """Return the buckets of which the server behind a connection may hold something."""
        if isinstance(self._client, RedisCluster):
            # While it loads its data it says nothing, and is not made known.
            with contextlib.suppress(ResponseError):
                await connection.send_command("CLUSTER", "NODES")
                return _buckets_of(bytes(await connection.read_response()))
        return ALL_BUCKETS

    async def close(self) -> None:
        """Close the connections."""
        tasks = [s.recovery for s in self._servers.values() if s.recovery is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._flushes, return_exceptions=True)
        await self._client.aclose()


_ONLY = "redis"
"""The name of the one server, or of a cluster that was not reached yet."""


def _server_of(cluster: RedisCluster, command: Command) -> str:
    key = command[3] if command[0] == "EVAL" else command[1]
    with contextlib.suppress(RedisError, RedisClusterException):
        if node := cluster.get_node_from_key(key):
            return str(node.name)
    return _ONLY


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
