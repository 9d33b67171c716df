"""How documents are read and written: through the cache, and in the one shape of a write."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import asyncpg
from sqlalchemy import ColumnElement, Row, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection
from user_service_schemas import ChangeKind, User

from ..errors import (
    DependencyUnavailable,
    Overloaded,
    ServiceError,
    UserNotFound,
    VersionMismatch,
)
from . import recorded_answers
from .cache import Absent, Announcement, DocumentCache, Outcome
from .database import TRANSACTION_TIMEOUT, Database, driver, lock_key, translated
from .direct import Direct, Fields
from .document import (
    Document,
    DocumentShape,
    EntityTags,
    StoredDocument,
    decode_user,
    is_one_of,
)
from .recorded_answers import Recorder
from .replica import FILL_WITHIN, Replica
from .revisions import Base, Revision, Revisions, Settled
from .state import StateWatcher
from .tables import cache_generations, users
from .waiting import fail, tell

T = TypeVar("T")

UNKNOWN_FOR = 5.0
"""Seconds for which a process remembers that an id is nobody's."""
MAX_UNKNOWN = 10_000
LEAVE_BEHIND_TRIES = 10
FLIGHT_AGE = 0.3
"""Seconds for which a read under way can be joined: on a slow Postgres, what it returns may be
older than what other processes have acknowledged since."""
CONCLUSION_TIMEOUT = 2.0
"""Seconds from the look at the generation to the commit. With the 3 s for which a raise counts for
others, and the 5 s that a commit may take (`database.COMMAND_TIMEOUT`), no more than the time in
which nothing is filled after a raise (`state.QUIET`)."""

# A new user has its version already, and a password's is no change of the document.
_WITHOUT_STEP = frozenset({ChangeKind.USER_CREATED, ChangeKind.PASSWORD_UPDATED})
# In one statement: raise the versions, append the changes, and leave behind what is cached in the
# buckets where the cache could not be told (they come without a generation), or was told under a
# generation that is over. Their rows are locked by ascending bucket, as always (see `state`), and
# one that another has raised meanwhile is left as it is.
_CONCLUDE = Direct(
    text("""
    WITH changed AS (
        SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:kinds AS text[]), CAST(:steps AS int[]))
            AS changed (id, kind, step)
    ), raised AS (
        UPDATE users
        SET version = version + changed.step,
            updated_at = CASE changed.step WHEN 0 THEN updated_at ELSE clock_timestamp() END
        FROM changed
        WHERE users.id = changed.id
        RETURNING users.id, version, kind
    ), logged AS (
        INSERT INTO changes (user_id, version, kind, at, actor)
        SELECT id, version, kind, clock_timestamp(), CAST(:actor AS text) FROM raised
    ), announced AS (
        SELECT * FROM unnest(CAST(:buckets AS smallint[]), CAST(:generations AS bigint[]))
            AS announced (bucket, generation)
    ), untold AS (
        SELECT bucket
        FROM cache_generations JOIN announced USING (bucket)
        WHERE cache_generations.generation IS DISTINCT FROM announced.generation
    ), locked AS (
        SELECT bucket
        FROM cache_generations
        WHERE bucket IN (SELECT bucket FROM untold)
            AND NOT raised_at BETWEEN clock_timestamp() - interval '3 s' AND clock_timestamp()
        ORDER BY bucket
        FOR UPDATE
    ), left_behind AS (
        UPDATE cache_generations SET generation = generation + 1, raised_at = clock_timestamp()
        FROM locked
        WHERE cache_generations.bucket = locked.bucket
    )
    SELECT (SELECT json_object_agg(id, version) FROM raised) AS versions,
        EXISTS (SELECT FROM untold) AS untold
""")
)
_GENERATIONS = select(cache_generations.c.bucket, cache_generations.c.generation)
_ADVISORY_LOCKS = text(
    "SELECT pg_advisory_xact_lock(key) FROM unnest(CAST(:keys AS bigint[])) AS key"
)


class Write:
    """One transaction that may change users; see `Documents.write`."""

    def __init__(
        self,
        documents: Documents,
        connection: AsyncConnection,
        user_id: str | None,
        recorder: Recorder,
    ) -> None:
        self.connection = connection
        self.actor = recorder.actor
        self._user_id = user_id
        self._recorder = recorder
        self.concluded = False
        self._documents = documents
        self._announcement = Announcement()
        self._generations: Mapping[int, int] = {}
        self._kinds: dict[str, ChangeKind] = {}
        self._versions: Mapping[str, int] = {}
        self._committed: Mapping[str, Document] = {}

    async def lock_names(self, *names: bytes) -> None:
        """Lock digests of tokens or emails until the end of the transaction, in one order.

        Before any user: locks are always taken in the order names, users, devices.
        """
        await self.connection.execute(_ADVISORY_LOCKS, {"keys": sorted(map(lock_key, names))})

    async def lock_users(self, *user_ids: str) -> dict[str, Row[Any]]:
        """Announce and lock users, by ascending id; returns the rows of those that exist."""
        await self.announce(*user_ids)
        rows = await self.connection.execute(
            select(users)
            .where(is_one_of(users.c.id, user_ids), users.c.deleted_at.is_(None))
            .order_by(users.c.id)
            .with_for_update(key_share=True)
        )
        return {row.id: row for row in rows}

    async def lock_user(self, user_id: str, if_match: EntityTags | None) -> Row[Any]:
        """Announce and lock one user and return its row.

        Raises:
            UserNotFound: there is no such user.
            VersionMismatch: the user has another version than `if_match` names.
        """
        rows = await self.lock_users(user_id)
        return self.expect(rows, user_id, if_match)

    def expect(
        self, rows: Mapping[str, Row[Any]], user_id: str, if_match: EntityTags | None
    ) -> Row[Any]:
        """Return the user's locked row; raises as `lock_user` does."""
        row = rows.get(user_id)
        if row is None:
            raise UserNotFound
        if if_match and not if_match.name_version(self._documents.epoch, row.version):
            raise VersionMismatch(headers=[("ETag", self._documents.etag(row.version))])
        return row

    async def announce(self, *user_ids: str) -> None:
        """Say in the cache that these users are about to change."""
        await self._documents.cache.announce(user_ids, self._announcement)

    def changed(self, user_id: str, kind: ChangeKind) -> None:
        """Say that the user was changed: its version rises, and the first kind is logged."""
        self._kinds.setdefault(user_id, kind)

    @property
    def document(self) -> User:
        """The user's document as it will be committed; read when the write is concluded."""
        if self._user_id is None:
            raise RuntimeError("a write of no one user has no one document")
        return self._committed[self._user_id].user

    async def conclude(self, result: Callable[[], T]) -> T:
        """Raise the versions and append the changes; then, in a later statement, read.

        One statement for both would return the new version with devices from before the lock.
        Returns what `result` makes of it, which is recorded together with the write.
        """
        async with asyncio.timeout(CONCLUSION_TIMEOUT):
            connection = await driver(self.connection)
            if self._kinds:
                await self._raise_versions(connection)
            self._committed = await self._documents.shape.read_by_id(
                connection, list(self._announcement.keys)
            )
            value = result()
            if key := self._recorder.key:
                await recorded_answers.record(connection, key, self._user_id, value)
        self.concluded = True
        return value

    async def _raise_versions(self, connection: asyncpg.Connection) -> None:
        kinds = self._kinds.values()
        announced = self._announcement.buckets
        (concluded,) = await _CONCLUDE.fetch(
            connection,
            {
                "actor": self.actor,
                "ids": list(self._kinds),
                "kinds": [kind.value for kind in kinds],
                "steps": [int(kind not in _WITHOUT_STEP) for kind in kinds],
                "buckets": list(announced),
                "generations": [
                    said.generation if said.complete else None for said in announced.values()
                ],
            },
        )
        self._versions = concluded["versions"]
        if concluded["untold"]:
            # In a later statement, too: one that waited for another's raise does not see it.
            generations = await self.connection.execute(
                _GENERATIONS.where(cache_generations.c.bucket.in_(announced))
            )
            self._generations = {row.bucket: row.generation for row in generations}

    async def commit(self) -> None:
        """Commit, then let the cache know. Not to be cancelled in between.

        After a commit whose outcome is unknown, the marker stays until it expires, and what is
        cached is left behind: the commit may still come about, after the marker.
        """
        documents = self._documents
        try:
            with translated():
                await self.connection.commit()
        except ServiceError:
            documents.leave_behind_soon(self._announcement.generations)
            raise
        finally:
            documents.wrote(self._announcement.keys)
            await self.connection.close()
        documents.state.adopt(self._generations, "unannounced_write")
        # An erased user has a version, and no document.
        outcomes = {i: Outcome(version, None) for i, version in self._versions.items()}
        outcomes |= {i: Outcome(read.version, read.stored()) for i, read in self._committed.items()}
        await documents.publish(self._announcement, outcomes, is_change=bool(self._kinds))

    async def abandon(self) -> None:
        """Roll back, and take the announcements away."""
        # A connection that cannot even be closed is gone, and its transaction with it.
        with contextlib.suppress(SQLAlchemyError, OSError):
            await self.connection.close()
        await self._documents.cache.publish(self._announcement, {})


class _Flight(NamedTuple):
    """A read of a document that is under way, and who waits for it."""

    user_id: str
    absence: Absent
    began: float
    waiting: list[asyncio.Future[StoredDocument | None]]


class Documents:
    """The users' documents, as one process sees them."""

    def __init__(
        self,
        database: Database,
        state: StateWatcher,
        cache: DocumentCache,
        shape: DocumentShape,
        replica: Replica,
    ) -> None:
        self.cache = cache
        self.shape = shape
        self.state = state
        self.replica = replica
        self._database = database
        self._flights: dict[str, _Flight] = {}
        self._boarding: list[_Flight] = []
        self._unknown: dict[str, float] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._revisions = Revisions(database.together, shape)

    @property
    def epoch(self) -> str:
        """The epoch of the database."""
        return self.state.epoch

    @property
    def tag(self) -> str:
        """What the entity tags of all documents begin with: `<epoch>.<format>`."""
        return f"{self.state.epoch}.{self.shape.format}"

    def etag(self, version: int) -> str:
        """Return the entity tag of a version: `"<epoch>.<format>.<version>"`."""
        return f'"{self.tag}.{version}"'

    async def get(self, user_id: str, min_version: int = 0) -> StoredDocument:
        """Return a user's document, from the cache if it is there.

        A cached copy below `min_version` is passed over.

        Raises:
            UserNotFound: there is no such user.
            DependencyUnavailable: it is not cached, and Postgres cannot be reached.
        """
        if not min_version and self._is_unknown(user_id):
            raise UserNotFound
        cached = await self.cache.get(user_id)
        if isinstance(cached, StoredDocument):
            found: StoredDocument | None = cached
        else:
            found = await self._join_flight(user_id, cached)
        if found is not None and found.version < min_version:
            found = (await self._read_from_primary([user_id])).get(user_id)
        if found is None:
            raise UserNotFound
        return found

    async def get_user(self, user_id: str, min_version: int = 0) -> User:
        """Return a user's decoded document; raises as `get` does."""
        return decode_user((await self.get(user_id, min_version)).body)

    async def get_many(self, ids: Sequence[str]) -> dict[str, StoredDocument]:
        """Return the documents of `ids`; who does not exist is left out.

        Takes one round trip to Redis, and one statement for all that is not cached.
        """
        cached = dict(zip(ids, await self.cache.get_many(ids), strict=True))
        found = {i: doc for i, doc in cached.items() if isinstance(doc, StoredDocument)}
        absent = {
            i: absence
            for i, absence in cached.items()
            if not isinstance(absence, StoredDocument) and not self._is_unknown(i)
        }
        if absent:
            read = await self._load(absent)
            found |= read
            for user_id in absent.keys() - read.keys():
                self._remember_unknown(user_id)
        return found

    async def find(self, *where: ColumnElement[bool], limit: int | None = None) -> list[User]:
        """Return the users that `where` selects, straight from Postgres, by ascending id."""
        async with self._database.reading() as connection:
            found = await self.shape.read(connection, *where, limit=limit)
        return [document.user for document in found]

    @asynccontextmanager
    async def write(
        self,
        user_id: str | None,
        recorder: Recorder = Recorder(),  # noqa: B008 - immutable
    ) -> AsyncIterator[Write]:
        """Run a write of a user, or of many (None), in the one shape that writes have.

        Begin; the block announces and locks, changes, says what `changed`, and concludes (raise
        the versions, append the changes, read the documents, record); then commit, publish.

        Raises:
            Overloaded: it took longer than `TRANSACTION_TIMEOUT`, or a lock was not got.
            DependencyUnavailable: Postgres cannot be reached.
        """
        connection = await self._database.connect()
        write = Write(self, connection, user_id, recorder)
        try:
            async with asyncio.timeout(TRANSACTION_TIMEOUT):
                with translated():
                    if recorder.key:
                        await recorded_answers.begin(connection, recorder.key)
                    yield write
        except BaseException as error:
            await self._to_the_end(write.abandon())
            if isinstance(error, TimeoutError):
                raise Overloaded from error
            raise
        if not write.concluded:
            await self._to_the_end(write.abandon())
            raise RuntimeError("a write must be concluded")
        await self._to_the_end(write.commit())

    async def revise(
        self,
        user_id: str,
        if_match: EntityTags | None,
        recorder: Recorder,
        reading: Direct,
        decide: Callable[[Base], Revision[T] | Settled[T] | None],
        **beside: Any,
    ) -> T | None:
        """Change one user in two statements; None if nothing came of it, and `write` has to.

        `decide` is given what `reading` reads, with the parameters `beside`, and may decline, too.

        Raises:
            Overloaded, DependencyUnavailable: as `write` does; and what `decide` raises.
        """
        if not self._database.limits_statements:
            return None
        asked = {"id": user_id, **_keyed(recorder), **beside}

        def decide_if_it_matches(base: Base) -> Revision[T] | Settled[T] | None:
            version = base.document.version
            if if_match and not if_match.name_version(self.epoch, version):
                return None
            return decide(base)

        revising = self._revise(recorder, reading, asked, decide_if_it_matches)
        # Not to be cancelled: nobody would publish what was committed.
        return await self._to_the_end(revising)

    async def _revise(
        self,
        recorder: Recorder,
        reading: Direct,
        asked: Mapping[str, Any],
        decide: Callable[[Base], Revision[T] | Settled[T] | None],
    ) -> T | None:
        """Read, decide, announce, write and publish."""
        announcement, outcomes = Announcement(), dict[str, Outcome]()
        try:
            base = await self._revisions.read(reading, asked)
            revision = decide(base) if base is not None else None
            if isinstance(revision, Settled):
                # With a key there is an answer to record, and so something to write.
                return None if recorder.key else revision.result
            if revision is None:
                return None
            user = revision.user
            await self.cache.announce([user.id], announcement)
            (said,) = announcement.buckets.values()
            if said.complete and await self._revisions.write(revision, recorder, said.generation):
                outcomes[user.id] = Outcome(user.version, Document(user).stored())
        except DependencyUnavailable:
            if announcement.keys:
                # As after a commit whose outcome is unknown: it may have been one.
                self.leave_behind_soon(announcement.generations)
                self.wrote(announcement.keys)
            raise
        except Exception:
            await self.cache.publish(announcement, {})
            raise
        self.wrote(outcomes)
        await self.publish(announcement, outcomes, is_change=bool(outcomes))
        return revision.result if outcomes else None

    async def enter(
        self,
        user_id: str,
        recorder: Recorder,
        looking: Direct,
        decide: Callable[[Fields], Revision[T] | None],
        **beside: Any,
    ) -> T | None:
        """Register a user in two statements; None if nothing came of it, and `write` has to.

        `decide` is given what `looking` reads, with the parameters `beside`, and may decline.

        Raises:
            Overloaded, DependencyUnavailable: as `write` does.
        """
        if not self._database.limits_statements:
            return None
        asked = {"id": user_id, **_keyed(recorder), **beside}
        entering = self._enter(user_id, recorder, looking, decide, asked)
        return await self._to_the_end(entering)

    async def _enter(
        self,
        user_id: str,
        recorder: Recorder,
        looking: Direct,
        decide: Callable[[Fields], Revision[T] | None],
        asked: Mapping[str, Any],
    ) -> T | None:
        """Announce, look, decide, write and publish.

        Where the cache cannot be told nothing is to be made good, and nothing is stored: nobody had
        what nobody knew of.
        """
        announcement, outcomes = Announcement(), dict[str, Outcome]()
        announcing = self._in_background(self.cache.announce([user_id], announcement))
        revision: Revision[T] | None = None
        try:
            row = await self._revisions.look(looking, asked)
            await announcing
            revision = decide(row) if row is not None else None
            if revision and await self._revisions.write(revision, recorder, None):
                user = revision.user
                outcomes[user_id] = Outcome(user.version, Document(user).stored())
        finally:
            await announcing
            self.wrote([user_id])
            await self.cache.publish(announcement, outcomes)
        return revision.result if revision and outcomes else None

    async def publish(
        self, announcement: Announcement, outcomes: Mapping[str, Outcome], *, is_change: bool
    ) -> None:
        """Let the cache know what was committed; what it cannot be told is left behind."""
        untold = await self.cache.publish(announcement, outcomes)
        # Where it was not announced either, that was made good already.
        unpublished = {
            bucket: said.generation
            for bucket, said in announcement.buckets.items()
            if bucket in untold and said.complete
        }
        if unpublished and is_change:
            try:
                await self.state.leave_behind(unpublished, "unpublished_write")
            except ServiceError:
                self.leave_behind_soon(unpublished)
                raise

    async def _to_the_end(self, ending: Coroutine[Any, Any, T]) -> T:
        """Run the end of a write even if the request that made it is cancelled."""
        return await asyncio.shield(self._in_background(ending))

    def leave_behind_soon(self, generations: Mapping[int, int]) -> None:
        """Leave what buckets hold behind as soon as Postgres can be reached."""

        async def leave_behind() -> None:
            for _ in range(LEAVE_BEHIND_TRIES):
                with contextlib.suppress(ServiceError):
                    await self.state.leave_behind(generations, "unknown_commit")
                    return
                await asyncio.sleep(1)

        self._in_background(leave_behind())

    def wrote(self, ids: Iterable[str]) -> None:
        """Note a commit, or what may have been one."""
        self.replica.wrote(ids)
        self.forget_flights(ids)

    def forget_flights(self, ids: Iterable[str]) -> None:
        """Detach the reads under way, which may be older than what was just committed."""
        for user_id in ids:
            self._flights.pop(user_id, None)
            self._unknown.pop(user_id, None)

    async def _join_flight(self, user_id: str, absence: Absent) -> StoredDocument | None:
        """Read a document from Postgres, once for all who miss it at the same time.

        All flights that begin in one turn of the event loop share their leases, their statement
        and their fills: one call of SQLAlchemy costs more CPU than all the rest of a miss.
        """
        loop = asyncio.get_running_loop()
        flight = self._flights.get(user_id)
        if flight is None or time.monotonic() - flight.began > FLIGHT_AGE:
            if not self._boarding:
                loop.call_soon(self._take_off)
            flight = self._flights[user_id] = _Flight(user_id, absence, time.monotonic(), [])
            self._boarding.append(flight)
        future: asyncio.Future[StoredDocument | None] = loop.create_future()
        flight.waiting.append(future)
        return await future

    def _take_off(self) -> None:
        flights, self._boarding = self._boarding, []
        self._in_background(self._fly(flights))

    async def _fly(self, flights: Sequence[_Flight]) -> None:
        # Who wrote in this very turn has left an earlier flight of the same user behind.
        try:
            found = await self._load({flight.user_id: flight.absence for flight in flights})
        except Exception as error:  # noqa: BLE001 - whatever it is, it is for those who wait
            for flight in flights:
                self._forget(flight)
                fail(flight.waiting, error)
            return
        for flight in flights:
            document = found.get(flight.user_id)
            if self._forget(flight) and document is None:
                self._remember_unknown(flight.user_id)
            tell(flight.waiting, document)

    def _forget(self, flight: _Flight) -> bool:
        """Let nobody join it any more; returns whether anybody could."""
        if self._flights.get(flight.user_id) is not flight:
            return False
        del self._flights[flight.user_id]
        return True

    async def _load(self, absent: Mapping[str, Absent]) -> Mapping[str, StoredDocument]:
        """Read documents from the replica or else from the primary, and cache what may be.

        They are cached while the answer is already on its way.
        """
        leases = await self.cache.lease(absent)
        replicated = {i: read.stored() for i, read in (await self.replica.read(absent)).items()}
        if fill := {i: replicated[i] for i in leases if i in replicated}:
            current = self.replica.settle({i: document.version for i, document in fill.items()})
            self._in_background(self._fill_when_settled(fill, leases, current))
        lacking = [user_id for user_id in absent if user_id not in replicated]
        read = await self._read_from_primary(lacking) if lacking else {}
        if fill := {i: read[i] for i in leases if i in read}:
            self._in_background(self.cache.fill(fill, leases))
        return {**replicated, **read}

    async def _read_from_primary(self, ids: Sequence[str]) -> dict[str, StoredDocument]:
        async with self._database.direct() as connection:
            read = await self.shape.read_by_id(connection, ids)
        return {user_id: document.stored() for user_id, document in read.items()}

    async def _fill_when_settled(
        self,
        documents: Mapping[str, StoredDocument],
        leases: Mapping[str, str],
        current: asyncio.Future[set[str]],
    ) -> None:
        with contextlib.suppress(TimeoutError):
            settled = await asyncio.wait_for(current, FILL_WITHIN)
            await self.cache.fill({i: documents[i] for i in settled}, leases)

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _is_unknown(self, user_id: str) -> bool:
        until = self._unknown.get(user_id)
        if until is None:
            return False
        if time.monotonic() < until:
            return True
        del self._unknown[user_id]
        return False

    def _remember_unknown(self, user_id: str) -> None:
        if len(self._unknown) >= MAX_UNKNOWN:
            del self._unknown[next(iter(self._unknown))]
        self._unknown[user_id] = time.monotonic() + UNKNOWN_FOR

    async def close(self) -> None:
        """Wait for the ends of writes, and for what is being filled."""
        await asyncio.gather(*self._background, return_exceptions=True)


def _keyed(recorder: Recorder) -> dict[str, str | None]:
    """Return the parameters by which `revisions` sees whether a key has an answer."""
    key = recorder.key
    return {"caller": key and key.caller, "key": key and key.key}
