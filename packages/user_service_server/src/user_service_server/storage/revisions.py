"""A write of one user in two statements: one reads, and one writes if nothing has changed since.

The general shape of a write (`documents.Write`) locks before it reads, and so waits for Postgres
up to thirteen times. But most writes change one user at whom nobody else is, or register one. What
is read without a lock is decided on; then one statement locks the user, looks whether it still has
the version that was read, and writes all that belongs to the change, or nothing. So the change is
made to what it was decided on, and its document is known without another read. Whatever is out of
the ordinary (a version that has risen, a key that has an answer, a name that another has or has
locked, a cache that could not be told of a change) is left to the general shape. Many users share
each of the two statements (see `together`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar

from msgspec.structs import replace
from sqlalchemy import ARRAY, CTE, ColumnElement, Select, bindparam, func, select, text
from user_service_schemas import ChangeKind, Choices, User

from .buckets import bucket_of
from .database import lock_key
from .direct import Direct, Fields, rows_of
from .document import DOCUMENT, Document, DocumentShape, choices_in, is_one_of
from .recorded_answers import KEEP, RECORDED, Recorder, is_answered, recorded
from .tables import users
from .together import Asked, Together

T = TypeVar("T")

# Locks are taken in the order in which all writes take them: names, the user, devices. None of them
# is waited for, since the statement is of many users: what is locked is left out. (An insert waits
# for whoever is changing the row that has a unique value already. So who registers with what is
# known to be somebody's does not come here.) Who was changed between the statement's snapshot and
# the lock has not the version of before, which is looked at again with the lock, and which every
# other change raises. In the moment between the snapshot and a lock on a name another may have had
# that name: `taken` and `kept` meet its row then. Without `taken` nothing is done; what is taken
# and not kept is taken back by the division, with all of the statement.
_WRITE = """
    WITH asked AS MATERIALIZED ({asked}),
    locked AS MATERIALIZED ({locking}),
    taken AS ({taking}), kept AS ({keeping}), raised AS ({raising}),
    logged AS (
        INSERT INTO changes (user_id, version, kind, at, actor)
        SELECT id, version, kind, clock_timestamp(), actor FROM raised
    )
    {effects}
    SELECT n, 1 / CAST((SELECT count(*) FROM taken) = (SELECT count(*) FROM raised) AS int)
    FROM taken JOIN asked USING (id)
"""
_ARE_FREE = """(
    SELECT coalesce(bool_and(pg_try_advisory_xact_lock(name)), true)
    FROM unnest(CAST(asked.names AS bigint[])) AS name
)"""
_LOCK_THE_USER = f"""
    SELECT asked.*
    FROM asked JOIN users ON users.id = asked.id AND users.version = asked.version - 1
    WHERE users.deleted_at IS NULL
        AND asked.generation = (
            SELECT generation FROM cache_generations WHERE bucket = asked.bucket
        )
        AND {_ARE_FREE}
    FOR NO KEY UPDATE OF users SKIP LOCKED
"""  # noqa: S608 - of constants
_LOCK_NO_USER = f"SELECT * FROM asked WHERE {_ARE_FREE}"  # noqa: S608
_IS_TAKEN_AND_KEPT = """
    locked.id IN (SELECT id FROM taken)
    AND (locked.key IS NULL OR locked.id IN (SELECT user_id FROM kept))
"""
_RAISE_THE_VERSION = f"""
    UPDATE users
    SET version = locked.version, updated_at = locked.at
    FROM locked
    WHERE users.id = locked.id AND {_IS_TAKEN_AND_KEPT}
    RETURNING locked.*
"""  # noqa: S608
_BEGIN_WITH_A_VERSION = f"SELECT * FROM locked WHERE {_IS_TAKEN_AND_KEPT}"  # noqa: S608
_KEEPING = KEEP.format(about="locked JOIN taken USING (id) WHERE key IS NOT NULL")


class Base(NamedTuple):
    """What a change is decided on: the user, when it was read, and what was read beside."""

    document: Document
    choices: Choices
    at: datetime
    row: Fields

    def changed(self, **fields: Any) -> User:
        """Return the user with these fields, and the next version."""
        user = self.document.user
        return replace(user, version=user.version + 1, updated_at=self.at, **fields)


class Effects(NamedTuple):
    """What a revision does to its domain's tables: a statement made here, and what it is asked."""

    statement: Direct
    said: Mapping[str, Any]


class Revision(NamedTuple, Generic[T]):
    """What shall become of a user, and the result of that; `names` are locked with the user."""

    user: User
    kind: ChangeKind
    effects: Effects
    result: T
    names: tuple[bytes, ...] = ()


class Settled(NamedTuple, Generic[T]):
    """The result of what would change nothing: it is so already, and need not be written."""

    result: T


_ASKED = {
    "version": "bigint",  # the new one
    "at": "timestamptz",
    "kind": "text",
    "actor": "text",
    "bucket": "smallint",
    "generation": "bigint",
    "names": "text",
    **RECORDED,
}


KEY = {"caller": "text", "key": "text"}
"""The types of what each statement is asked that is made by `reading` or `looking`."""


def reading(asked: CTE, *beside: ColumnElement[Any]) -> Direct:
    """Return the statement that reads users to revise, and `beside`."""
    # By the array, too: of the rows alone Postgres may think that it is quicker to read all users.
    ids = bindparam("id", type_=ARRAY(users.c.id.type))
    return _reading(
        DOCUMENT.where(users.c.id == asked.c.id, is_one_of(users.c.id, ids)), asked, *beside
    )


def looking(asked: CTE, *beside: ColumnElement[Any]) -> Direct:
    """Return the statement that reads `beside` to register users."""
    return _reading(select(), asked, *beside)


def _reading(found: Select[Any], asked: CTE, *beside: ColumnElement[Any]) -> Direct:
    key_is_answered = is_answered(asked.c.caller, asked.c.key).label("is_answered")
    now = func.clock_timestamp().label("now")
    return Direct(found.add_columns(asked.c.n, now, key_is_answered, *beside))


def writing(
    effects: str = "", *, taking: str = "SELECT id FROM locked", types: Mapping[str, str]
) -> Direct:
    """Return the statement that writes revisions.

    `effects` is what a repository does to its tables, further parts of the WITH: from `raised`,
    which has a row for each revision that takes place, with all that was asked (`types`, of SQL)
    and the new `version`. What may meet another's row is `taking`: from `locked`, with the same,
    and it returns the ids of the users who did not.
    """
    return _writing(_LOCK_THE_USER, taking, _RAISE_THE_VERSION, effects, types)


def registering(effects: str, *, taking: str, types: Mapping[str, str]) -> Direct:
    """Return the statement that registers users: `taking` inserts them, otherwise as `writing`."""
    return _writing(_LOCK_NO_USER, taking, _BEGIN_WITH_A_VERSION, effects, types)


def _writing(
    locking: str, taking: str, raising: str, effects: str, types: Mapping[str, str]
) -> Direct:
    statement = _WRITE.format(
        asked=rows_of({**_ASKED, **types}),
        locking=locking,
        taking=taking,
        keeping=_KEEPING,
        raising=raising,
        effects=effects,
    )
    return Direct(text(statement))


class Revisions:
    """The two statements of a revision, which those of many users share."""

    def __init__(self, together: Together, shape: DocumentShape) -> None:
        self._together = together
        self._shape = shape
        self._written: set[str | bytes] = set()

    async def look(self, statement: Direct, asked: Asked) -> Fields | None:
        """Read what a registration is decided on; None if `caller` and `key` have an answer."""
        row = await self._together.fetch(statement, asked)
        return None if row is None or row["is_answered"] else row

    async def read(self, statement: Direct, asked: Asked) -> Base | None:
        """Read a user to revise; None if there is none, or `caller` and `key` have an answer."""
        row = await self.look(statement, asked)
        if row is None:
            return None
        return Base(self._shape.document(row), choices_in(row), row["now"], row)

    async def write(
        self, revision: Revision[Any], recorder: Recorder, generation: int | None
    ) -> bool:
        """Write a revision, all or nothing: a change under the generation it was announced in.

        A registration (None) is of no generation: nothing of its user can have been cached before.
        Who comes while the same user, key or other name is being written here is left out: in one
        statement a lock is everyone's, so they would meet, and all that share it be taken back.
        """
        user, key = revision.user, recorder.key
        names = (*revision.names, key.name) if key else revision.names
        written: set[str | bytes] = {user.id, *names}
        if not self._written.isdisjoint(written):
            return False
        self._written |= written
        try:
            row = await self._together.fetch(
                revision.effects.statement,
                {
                    "id": user.id,
                    "version": user.version,
                    "at": user.updated_at,
                    "kind": revision.kind.value,
                    "actor": recorder.actor,
                    "bucket": bucket_of(user.id),
                    "generation": generation,
                    "names": _array(map(lock_key, names)),
                    **recorded(key, revision.result),
                    **revision.effects.said,
                },
            )
        finally:
            self._written -= written
        return row is not None


def _array(numbers: Iterable[int]) -> str:
    """Return an array as SQL reads it: Postgres has no arrays of arrays of different lengths."""
    return f"{{{','.join(map(str, numbers))}}}"
