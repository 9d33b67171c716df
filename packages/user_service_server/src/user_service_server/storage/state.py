"""What all servers of one database share: the epoch, and the generations of what is cached.

And which servers of Redis were seen, and the schema that all stand on.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import structlog
from sqlalchemy import func, select, text, update

from ..errors import DependencyUnavailable, Overloaded
from ..logs import describe
from ..metrics import Metrics
from ..periodic import Periodic
from ..settings import Settings
from .buckets import BUCKETS, hash_tag
from .database import Database, connected, create_engine, translated
from .tables import REVISION, cache_generations, service_state

POLL_INTERVAL = 0.5
"""Seconds between two looks: how long a process may not know of a new epoch or generation."""
POLL_TIMEOUT = 1.0
BELIEVED_FOR = 0.9
"""Seconds from the beginning of a look for which what it read is believed: within the second that
is promised. Older it is where the process, its event loop or its machine stood still."""
LOOKS = 2
"""How often is looked anew: one that was under way in a stall may be as old."""
QUIET = 10.0
"""Seconds after a raise of a generation in which nothing of its bucket is filled: longer than a
write that announced itself before may still take (`database.TRANSACTION_TIMEOUT`)."""

_log = structlog.get_logger()

_STATE = text("""
    SELECT epoch, generations, raised_ago
    FROM service_state, (
        SELECT array_agg(generation ORDER BY bucket) AS generations,
            array_agg(
                CAST(extract(epoch FROM clock_timestamp() - raised_at) AS float) ORDER BY bucket
            ) AS raised_ago
        FROM cache_generations
    ) AS cached
""")
# A server of Redis that was never seen: what it holds may be of any time. The very first one holds
# nothing of this epoch. Here and wherever several generations are raised their rows are locked by
# ascending bucket, so that no two wait for each other.
_RECOGNISE = text("""
    WITH recognised AS (
        UPDATE service_state
        SET redis_servers = (array_prepend(CAST(:server AS text), redis_servers))[1:100]
        WHERE NOT CAST(:server AS text) = ANY (redis_servers)
        RETURNING cardinality(redis_servers) > 1 AS is_stranger
    ), locked AS (
        SELECT bucket
        FROM cache_generations, recognised
        WHERE is_stranger AND bucket = ANY (CAST(:buckets AS smallint[]))
        ORDER BY bucket
        FOR UPDATE OF cache_generations
    )
    UPDATE cache_generations SET generation = generation + 1, raised_at = clock_timestamp()
    FROM locked
    WHERE cache_generations.bucket = locked.bucket
    RETURNING cache_generations.bucket, generation
""")
_LEAVE_BEHIND = text("""
    WITH locked AS (
        SELECT bucket
        FROM cache_generations
        JOIN unnest(CAST(:buckets AS smallint[]), CAST(:generations AS bigint[]))
            AS believed (bucket, generation) USING (bucket, generation)
        ORDER BY bucket
        FOR UPDATE OF cache_generations
    )
    UPDATE cache_generations SET generation = generation + 1, raised_at = clock_timestamp()
    FROM locked
    WHERE cache_generations.bucket = locked.bucket
""")
# Before the migrations that this release needs, there is nothing to read, and asking for it would
# be an error in the log of Postgres twice a second.
_IS_MIGRATED = text("SELECT to_regclass('alembic_version') IS NOT NULL")
_REVISION = text("SELECT version_num FROM alembic_version")


def _new_epoch() -> str:
    """Return a new epoch: short, since it is part of every key and ETag."""
    return secrets.token_hex(4)


async def read_epoch(settings: Settings) -> str:
    """Return the epoch of the settings' database."""
    async with connected(settings) as connection:
        found = await connection.execute(select(service_state.c.epoch))
        return str(found.scalar_one())


async def renew_epoch(settings: Settings) -> str:
    """Give the database a new epoch and return it: nothing that was cached before is believed."""
    epoch = _new_epoch()
    async with connected(settings) as connection:
        await connection.execute(update(service_state).values(epoch=epoch))
        # With all generations, since writes under way have announced themselves under the old
        # epoch: until they have ended, nothing is cached.
        bucket = cache_generations.c.bucket
        await connection.execute(select(bucket).order_by(bucket).with_for_update())
        await connection.execute(
            update(cache_generations).values(
                generation=cache_generations.c.generation + 1, raised_at=func.clock_timestamp()
            )
        )
        await connection.commit()
    return epoch


class Generation(NamedTuple):
    """The generation of a bucket, and the time until which nothing of it is cached."""

    number: int = 0
    quiet_until: float = 0.0


@dataclass(frozen=True)
class SharedState:
    """What was read at the last look, with each bucket's generation."""

    epoch: str = ""
    generations: tuple[Generation, ...] = (Generation(),) * BUCKETS
    revision: str | None = None

    @cached_property
    def namespaces(self) -> tuple[str, ...]:
        """What the keys of each bucket's documents begin with; to put it together is costly."""
        return tuple(
            f"user-service:{self.epoch}:{hash_tag(bucket)}:{generation.number}:"
            for bucket, generation in enumerate(self.generations)
        )

    @property
    def schema_is_known(self) -> bool:
        """Whether the schema has what this release needs; a newer one has it, too."""
        return self.revision is not None and self.revision >= REVISION


class StateWatcher:
    """Looks at the shared state twice a second, and so also knows whether Postgres is there.

    It has connections of its own: a pool that is busy must not make Postgres look gone.
    """

    def __init__(self, settings: Settings, database: Database, metrics: Metrics) -> None:
        self._engine = create_engine(settings, pool_size=2).execution_options(
            isolation_level="AUTOCOMMIT"
        )
        self._database = database
        self._raised = metrics.generation_raised
        self._watch = Periodic("state-watcher", self.look, lambda: POLL_INTERVAL)
        self._looking: asyncio.Task[None] | None = None
        self._current = SharedState()
        self._looked_at = -math.inf
        self.latency: float | None = None

    @property
    def epoch(self) -> str:
        """The epoch under which documents are cached and tagged."""
        return self._current.epoch

    def generation(self, bucket: int) -> int:
        """Return the generation under which a bucket's documents are cached."""
        return self._current.generations[bucket].number

    @property
    def namespaces(self) -> Sequence[str]:
        """What the keys of each bucket's documents begin with: `user-service:…:<generation>:`."""
        return self._current.namespaces

    def is_quiet(self, bucket: int) -> bool:
        """Whether nothing of a bucket may be filled, since its generation was raised just now."""
        return time.monotonic() < self._current.generations[bucket].quiet_until

    async def start(self, patience: float) -> None:
        """Wait up to `patience` seconds for Postgres and its schema, then watch on.

        Raises:
            DependencyUnavailable: Postgres did not come, or nobody migrated it.
        """
        deadline = time.monotonic() + patience
        told = ""
        while True:
            await self.look()
            if self._database.reachable and self._current.schema_is_known:
                break
            missing = (
                f"its schema {REVISION} (run: user-service migrate)"
                if self._database.reachable
                else "an answer of Postgres (DATABASE_URL)"
            )
            if time.monotonic() > deadline:
                _log.error("postgres.missing", waited_for=missing, seconds=patience)
                raise DependencyUnavailable
            if missing != told:
                _log.warning("postgres.waiting", waiting_for=missing, up_to_seconds=patience)
                told = missing
            await asyncio.sleep(POLL_INTERVAL)
        self._watch.start()

    @property
    def is_outdated(self) -> bool:
        """Whether to look again before the cache is believed. Without Postgres there is no way."""
        age = time.monotonic() - self._looked_at
        return age > BELIEVED_FOR and self._database.reachable

    async def catch_up(self) -> None:
        """Look as long as what is known is outdated."""
        for _ in range(LOOKS):
            if self.is_outdated:
                await self.look()

    async def look(self) -> None:
        """Look; looks at the same time are one, so that none brings an old state back.

        What cannot be read leaves the last state, and says that Postgres is gone.
        """
        if self._looking is None or self._looking.done():
            # In a context of its own: it is part of no request.
            self._looking = asyncio.create_task(self._look(), name="state-look", context=Context())
        await asyncio.shield(self._looking)

    async def _look(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                await self._read()
            self._looked_at = began
            self.latency = time.monotonic() - began
            reachable = True
        except Exception as error:  # noqa: BLE001 - whatever it is, the watch must go on
            if not isinstance(error, DependencyUnavailable | Overloaded | TimeoutError):
                _log.error("postgres.refuses", **describe(error))
            self.latency = None
            reachable = False
        if reachable != self._database.reachable:
            self._database.reachable = reachable
            _log.warning("postgres.reachable" if reachable else "postgres.unreachable")

    async def _read(self) -> None:
        with translated():
            async with self._engine.connect() as connection:
                revision = None
                if await connection.scalar(_IS_MIGRATED):
                    revision = await connection.scalar(_REVISION)
                if revision is None or revision < REVISION:
                    self._current = SharedState(revision=revision)
                    return
                row = (await connection.execute(_STATE)).one()
        self._current = SharedState(
            epoch=row.epoch,
            generations=self._learn(row.epoch, row.generations, row.raised_ago),
            revision=revision,
        )

    def _learn(
        self, epoch: str, numbers: Sequence[int], raised_ago: Sequence[float]
    ) -> tuple[Generation, ...]:
        """Return each bucket's generation, now that these were read."""
        now = time.monotonic()
        # By Postgres' clock for a process that starts, and for one that goes on by its own: a step
        # of Postgres' clock must not end the quiet time.
        if not self.epoch:
            raised = zip(numbers, raised_ago, strict=True)
            return tuple(Generation(number, now + QUIET - ago) for number, ago in raised)
        if epoch != self.epoch:
            return tuple(Generation(number, now + QUIET) for number in numbers)
        # A lower one was read before a raise that this process has adopted meanwhile.
        return tuple(
            Generation(number, now + QUIET) if number > known.number else known
            for number, known in zip(numbers, self._current.generations, strict=True)
        )

    def adopt(self, generations: Mapping[int, int], reason: str) -> None:
        """Take over buckets' generations that a transaction of this process read or raised."""
        newer = {b: number for b, number in generations.items() if number > self.generation(b)}
        if not newer:
            return
        self._raised.labels(reason).inc(len(newer) / BUCKETS)
        _log.warning("cache.left_behind", buckets=len(newer), of=BUCKETS, reason=reason)
        quiet_until = time.monotonic() + QUIET
        self._current = replace(
            self._current,
            generations=tuple(
                Generation(newer[bucket], quiet_until) if bucket in newer else known
                for bucket, known in enumerate(self._current.generations)
            ),
        )

    async def recognise(self, server: str, buckets: Collection[int]) -> None:
        """Make a server of Redis known; what one that is new to all may hold is left behind.

        `buckets` are those of which it may hold anything.

        Raises:
            OSError: Postgres cannot be reached, so nobody can tell.
        """
        try:
            with translated():
                async with self._engine.connect() as connection:
                    rows = await connection.execute(
                        _RECOGNISE, {"server": server, "buckets": list(buckets)}
                    )
                    raised = {row.bucket: row.generation for row in rows}
        except (DependencyUnavailable, Overloaded) as error:
            raise ConnectionError from error
        if raised:
            self.adopt(raised, "redis_changed")
        else:
            await self.look()

    async def leave_behind(self, generations: Mapping[int, int], reason: str) -> None:
        """Raise the generations of buckets above these, where nobody has.

        What is cached of these buckets is not believed any more.

        Raises:
            DependencyUnavailable, Overloaded
        """
        with translated():
            async with self._engine.connect() as connection:
                await connection.execute(
                    _LEAVE_BEHIND,
                    {"buckets": list(generations), "generations": list(generations.values())},
                )
        self.adopt({bucket: number + 1 for bucket, number in generations.items()}, reason)

    async def close(self) -> None:
        """Stop watching."""
        await self._watch.stop()
        if self._looking is not None:
            await self._looking
        await self._engine.dispose()
