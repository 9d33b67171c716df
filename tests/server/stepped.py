"""Replicas of the storage in one process, whose reads and writes go on one effect at a time.

Each replica has what a server has: its own `Documents`, `DocumentCache`, `RedisLink` and
`StateWatcher`, on the real Postgres and Valkey. Nothing looks at the shared state by itself, so a
replica learns of a new generation when the test says so. A read or a write is an `Errand`: it stops
before each effect that it is told to stop at, until `step` or `finish`, and `crash` ends it there,
as a server that is killed: nothing that it would have done afterwards happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

import asyncpg
import redis.asyncio
from sqlalchemy import Engine, bindparam, event, func, insert, select, text, update
from sqlalchemy.util import await_only
from user_service_schemas import ChangeKind
from user_service_server.errors import UserNotFound
from user_service_server.metrics import Metrics
from user_service_server.settings import Settings
from user_service_server.storage import cache as cache_module
from user_service_server.storage import replica as standbys
from user_service_server.storage.buckets import bucket_of, hash_tag
from user_service_server.storage.cache import Absent, DocumentCache
from user_service_server.storage.database import Database
from user_service_server.storage.document import DocumentShape, StoredDocument
from user_service_server.storage.documents import Documents, Write
from user_service_server.storage.link import RedisLink
from user_service_server.storage.state import StateWatcher
from user_service_server.storage.tables import cache_generations, preferences, users
from user_service_server.storage.wire import UNREACHABLE, Command
from user_service_server.users import repository

from .statements import around_direct

READING = ("get", "lease", "read", "answer", "fill")
WRITING = ("lock_names", "announce", "lock", "conclude", "commit", "publish", "leave_behind")
IN_TRANSACTION = frozenset({"lock_names", "announce", "lock", "conclude", "commit"})
PATIENCE = 10.0
"""Seconds after which a step that goes on waiting is a fault of the test."""

_STATEMENTS = {
    "FOR NO KEY UPDATE": "lock",
    "WITH changed AS": "conclude",
    "JOIN preferences": "read",
    "AS believed (bucket, generation)": "leave_behind",
    "pg_advisory_xact_lock": "lock_names",
}


class Crashed(BaseException):
    """What an errand meets where it would have gone on."""


class Errand:
    """A read or a write under way; its result is a version, or None for nobody."""

    def __init__(self, work: Coroutine[Any, Any, int | None], stops: Sequence[str]) -> None:
        self.at: str | None = None
        self.joined = False
        self.connection: asyncpg.Connection | None = None
        self._stops = frozenset(stops)
        self._dead = False
        self._go: asyncio.Future[None] | None = None
        self._stopped = asyncio.Event()
        token = _errand.set(self)
        self.task = asyncio.create_task(work)
        _errand.reset(token)
        self.task.add_done_callback(lambda _task: self._stopped.set())

    async def reach(self, point: str) -> None:
        """Called where an effect is about to happen."""
        if self._dead:
            raise Crashed
        if point in self._stops:
            self.at, self._go = point, asyncio.get_running_loop().create_future()
            self._stopped.set()
            await self._go
            if self._dead:
                raise Crashed

    async def until(self, point: str) -> Errand:
        """Go on to where `point` is about to happen; it must come."""
        while await self.rest() != point:
            assert self.at is not None, f"it never came to {point}"
            self._continue()
        return self

    async def step(self) -> None:
        """Let the next effect happen, and go on to where another would."""
        if await self.rest() is not None:
            self._continue()
            await self.rest()

    async def finish(self) -> int | None:
        """Go on to the end and return the result."""
        self._stops = frozenset()
        if self.at is not None:
            self._continue()
        result = await asyncio.wait_for(asyncio.shield(self.task), PATIENCE)
        await turns()
        return result

    async def crash(self) -> None:
        """End here, as its server's power would; what has come to its end stays as it is."""
        self._dead = True
        # Postgres sees its socket close. At the other points it has given its connection back.
        if self.at in IN_TRANSACTION and self.connection is not None:
            self.connection.terminate()
        if self.at is not None:
            self._continue()
        self.task.cancel()
        await asyncio.wait([self.task], timeout=PATIENCE)
        if not self.task.cancelled():
            self.task.exception()
        await turns()

    def wake(self) -> None:
        """Whoever steps it need not wait: it waits for another errand."""
        self.joined = True
        self._stopped.set()

    async def rest(self) -> str | None:
        """Wait until it stops, or ends; returns before what."""
        await asyncio.wait_for(self._stopped.wait(), PATIENCE)
        if self.at is None:
            await turns()  # what it left to the background may stop, too
        return self.at

    def _continue(self) -> None:
        assert self._go is not None
        self.at = None
        self._stopped.clear()
        if self.task.done():
            asyncio.get_running_loop().call_soon(self._stopped.set)
        self._go.set_result(None)


_errand: ContextVar[Errand | None] = ContextVar("errand", default=None)


async def turns() -> None:
    """Let what is ready go on, until nothing is; what waits for a socket is not."""
    ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
    for _ in range(20):
        await asyncio.sleep(0)
        if not ready:
            break


async def _reach(point: str) -> None:
    if errand := _errand.get():
        await errand.reach(point)


def _point_of(command: Command) -> str:
    if command[0] == "SET":
        return "lease"
    scripts = {
        cache_module._LEASE_FOREIGN: "lease",
        cache_module._ANNOUNCE: "announce",
        cache_module._FILL: "fill",
        cache_module._LOOK: "get",
        cache_module._PUBLISH: "publish",
    }
    return scripts[command[1]] if command[0] == "EVAL" else "get"


@contextmanager
def stops_in_sql() -> Iterator[None]:
    """Let errands stop before statements and commits."""

    def before_statement(connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if errand := _errand.get():
            errand.connection = connection.connection.driver_connection
        for part, point in _STATEMENTS.items():
            if part in statement and _errand.get():
                await_only(_reach(point))

    def before_commit(_connection: Any) -> None:
        if _errand.get():
            await_only(_reach("commit"))

    async def before_direct(statement: str, connection: Any) -> None:
        if errand := _errand.get():
            errand.connection = connection
        for part, point in _STATEMENTS.items():
            if part in statement:
                await _reach(point)

    async def after_direct(statement: str, _connection: Any) -> None:
        if "JOIN preferences" in statement:
            await _reach("answer")

    listeners: dict[str, Callable[..., None]] = {
        "before_cursor_execute": before_statement,
        "commit": before_commit,
    }
    for name, listener in listeners.items():
        event.listen(Engine, name, listener)
    try:
        with around_direct(before_direct, after_direct):
            yield
    finally:
        for name, listener in listeners.items():
            event.remove(Engine, name, listener)


class SteppedLink(RedisLink):
    """A link whose commands wait for their errand, and that can be cut off from Redis.

    Or from some buckets, as from those on one server of a cluster. It is `cut` where nothing
    reaches Redis, and `deaf` where no answer comes back.
    """

    cut = False
    deaf = False
    cut_buckets: Collection[int] = ()

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        if commands:
            await _reach(_point_of(commands[0]))
        reached = [command for command in commands if self._reaches(command)]
        replies = iter(await super().run(reached))
        return [
            next(replies) if command in reached and not self.deaf else UNREACHABLE
            for command in commands
        ]

    def _reaches(self, command: Command) -> bool:
        keys = command[3 : 3 + command[2]] if command[0] == "EVAL" else command[1:2]
        return not self.cut and not any(
            hash_tag(bucket) in key for bucket in self.cut_buckets for key in keys
        )


class SteppedDocuments(Documents):
    """Documents that tell an errand that it waits for the read of another."""

    async def _join_flight(self, user_id: str, absence: Absent) -> StoredDocument | None:
        if user_id in self._flights and (errand := _errand.get()):
            errand.wake()
        return await super()._join_flight(user_id, absence)


class SteppedState(StateWatcher):
    """For whom no time passes between the looks of the world, until it stalls."""

    async def _look(self) -> None:
        await super()._look()
        self._looked_at = math.inf

    def stall(self) -> None:
        """Let the last look be long ago."""
        self._looked_at = -math.inf


class Replica:
    """The storage of one server."""

    def __init__(self, settings: Settings) -> None:
        metrics = Metrics()
        self.database = Database(settings)
        self.state = SteppedState(settings, self.database, metrics)
        self.link = SteppedLink(settings, self.state.recognise)
        shape = DocumentShape(settings)
        self.cache = DocumentCache(
            self.link, self.state, document_format=shape.format, ttl=300, metrics=metrics
        )
        standby = standbys.Replica(settings, self.state, shape, metrics)
        self.documents = SteppedDocuments(self.database, self.state, self.cache, shape, standby)
        self._errands: list[Errand] = []

    async def open(self) -> None:
        await self.state.look()
        await self.link.start(PATIENCE)
        assert self.database.reachable
        assert self.link.reachable

    def has(self, errand: Errand) -> bool:
        """Whether it is this replica's."""
        return errand in self._errands

    async def crash(self) -> None:
        """End all that it is at."""
        for errand in self._errands:
            await errand.crash()
        self._errands.clear()

    async def close(self) -> None:
        await self.crash()
        await self.documents.close()
        await self.link.close()
        await self.state.close()
        await self.database.close()

    def reading(self, user_id: str, *stops: str) -> Errand:
        """Begin a read that stops where `stops` say."""
        return self._begin(self._read(user_id), stops)

    def writing(self, *user_ids: str, stops: Sequence[str] = ()) -> Errand:
        """Begin a write that changes users, in one transaction."""
        return self._begin(self._write(*user_ids), stops)

    def erasing(self, user_id: str, *stops: str) -> Errand:
        """Begin to erase a user."""
        return self._begin(self._erase(user_id), stops)

    def refusing(self, user_id: str, *stops: str) -> Errand:
        """Begin a write that is rolled back."""
        return self._begin(self._refuse(user_id), stops)

    def _begin(self, work: Coroutine[Any, Any, int | None], stops: Sequence[str]) -> Errand:
        errand = Errand(work, stops)
        self._errands.append(errand)
        return errand

    async def read(self, user_id: str) -> int | None:
        """Read the version that is answered, or None."""
        return await self.reading(user_id).finish()

    async def write(self, *user_ids: str) -> int | None:
        """Change users, and return the first one's version."""
        return await self.writing(*user_ids).finish()

    async def write_cut_off(self, user_id: str) -> int | None:
        """Change a user while Redis cannot be reached, and return the version."""
        self.link.cut = True
        try:
            return await self.write(user_id)
        finally:
            self.link.cut = False

    async def _read(self, user_id: str) -> int | None:
        try:
            return (await self.documents.get(user_id)).version
        except UserNotFound:
            return None

    async def _refuse(self, user_id: str) -> int | None:
        with contextlib.suppress(_Refused):
            async with self.documents.write(user_id) as write:
                await write.lock_user(user_id, None)
                await _rename(write, user_id)
                raise _Refused
        return None

    async def _write(self, user_id: str, *others: str) -> int | None:
        async with self.documents.write(user_id) as write:
            await write.lock_names(uuid4().bytes)
            await write.lock_user(user_id, None)
            await _rename(write, user_id)
            for other in others:
                await write.lock_user(other, None)
                await _rename(write, other)
            return await write.conclude(lambda: write.document.version)

    async def _erase(self, user_id: str) -> int | None:
        async with self.documents.write(user_id) as write:
            await write.lock_user(user_id, None)
            await repository.erase_user(write.connection, user_id)
            write.changed(user_id, ChangeKind.USER_DELETED)
            return await write.conclude(lambda: None)


class _Refused(Exception):
    """What takes a write back."""


async def _rename(write: Write, user_id: str) -> None:
    await repository.update_user(write.connection, user_id, {"name": uuid4().hex})
    write.changed(user_id, ChangeKind.USER_UPDATED)


class World:
    """Replicas, and what a test sees and does beside them."""

    def __init__(self, settings: Settings, stored: redis.asyncio.Redis) -> None:
        self.settings = settings
        self.stored = stored
        self.replicas: list[Replica] = []
        self._database = Database(settings)

    async def replica(self, settings: Settings | None = None) -> Replica:
        """Start a replica, if need be with settings of its own."""
        replica = Replica(settings or self.settings)
        self.replicas.append(replica)
        await replica.open()
        return replica

    async def user(self, bucket: int = 0) -> str:
        """Make a user at version 1, of whom nothing is cached.

        In one bucket, unless the test says otherwise: what leaves one user's copies behind does so
        with those of all.
        """
        user_id = str(uuid4())[:-2] + f"{bucket:02x}"
        await self._execute(
            insert(users).values(
                id=user_id,
                version=1,
                name="name",
                email=user_id,
                email_key=user_id,
                created_at=func.now(),
                updated_at=func.now(),
            ),
            insert(preferences).values(user_id=user_id, email=True, push=True),
        )
        return user_id

    async def age(self, seconds: float) -> None:
        """Let the last raise of each generation be `seconds` longer ago; the replicas look."""
        for replica in self.replicas:
            current = replica.state._current
            replica.state._current = dataclasses.replace(
                current,
                generations=tuple(
                    known._replace(quiet_until=known.quiet_until - seconds)
                    for known in current.generations
                ),
            )
        await self.step_clock(seconds)

    async def step_clock(self, seconds: float) -> None:
        """Let the clock of Postgres step, but no time pass; the replicas look."""
        column = cache_generations.c.raised_at
        interval = text(":seconds * interval '1 s'").bindparams(bindparam("seconds", seconds))
        await self._execute(update(cache_generations).values(raised_at=column - interval))
        await self.look()

    async def committed(self, user_id: str) -> int | None:
        """The version in the database, or None for who was erased."""
        async with self._database.reading() as connection:
            found = await connection.execute(
                select(users.c.version).where(users.c.id == user_id, users.c.deleted_at.is_(None))
            )
            return found.scalar_one_or_none()

    async def restart(self, number: int) -> None:
        """Kill a replica, and start it anew."""
        await self.replicas[number].close()
        self.replicas[number] = Replica(self.settings)
        await self.replicas[number].open()

    async def look(self) -> None:
        """Let every replica look at the shared state, as each does twice a second."""
        for replica in self.replicas:
            await replica.state.look()

    async def generation(self, bucket: int) -> int:
        """The generation of a bucket in the database."""
        number = select(cache_generations.c.generation).where(cache_generations.c.bucket == bucket)
        async with self._database.reading() as connection:
            return int(await connection.scalar(number) or 0)

    @asynccontextmanager
    async def locked_generation(self, bucket: int) -> AsyncIterator[None]:
        """Let whoever would raise the generation of a bucket wait."""
        row = select(cache_generations).where(cache_generations.c.bucket == bucket)
        connection = await self._database.connect()
        try:
            await connection.execute(row.with_for_update())
            yield
        finally:
            await connection.close()

    async def waiting(self, number: int) -> None:
        """Return when so many statements wait for a lock."""
        waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        async with asyncio.timeout(PATIENCE), self._database.reading() as connection:
            while await connection.scalar(waiting) != number:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def key(self, user_id: str) -> str:
        """The key under which all replicas look for a document, once they have looked."""
        epoch, bucket = self.replicas[0].state.epoch, bucket_of(user_id)
        generation = await self.generation(bucket)
        return f"user-service:{epoch}:{hash_tag(bucket)}:{generation}:{user_id}"

    async def is_up_to_date(self, replica: Replica, user_id: str) -> bool:
        """Whether a replica looks for a user's document under the key where it is now."""
        return replica.cache._key(user_id) == await self.key(user_id)

    async def evict(self, user_id: str) -> None:
        """Let Redis forget what it holds of a user."""
        await self.stored.delete(await self.key(user_id))

    async def cached(self, user_id: str) -> int | str:
        """What lies in the cache of a user: a version, "lease", "marker" or "nothing"."""
        return await self.held(await self.key(user_id))

    async def held(self, key: str) -> int | str:
        """What lies under a key: a version, "lease", "marker" or "nothing"."""
        async with self.stored.pipeline(transaction=False) as pipe:
            pipe.type(key)
            pipe.get(key)
            kind, value = await pipe.execute(raise_on_error=False)
        if kind == b"hash":
            return "marker"
        if value is None:
            return "nothing"
        return int(value.split()[0][1:]) if value[:1] == b"D" else "lease"

    async def _execute(self, *statements: Any) -> None:
        connection = await self._database.connect()
        try:
            for statement in statements:
                await connection.execute(statement)
            await connection.commit()
        finally:
            await connection.close()

    async def close(self) -> None:
        for replica in self.replicas:
            await replica.close()
        await self._database.close()


@asynccontextmanager
async def a_world(settings: Settings) -> AsyncIterator[World]:
    """A world without a replica yet, in no quiet time."""
    async with redis.asyncio.Redis.from_url(settings.redis_url) as stored:
        world = World(settings, stored)
        await world.age(60)
        with stops_in_sql():
            try:
                yield world
            finally:
                await world.close()
