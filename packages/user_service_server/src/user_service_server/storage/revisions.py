"""A write of one user in two statements: one reads, and one writes if nothing has changed since.

The general shape of a write (`documents.Write`) locks before it reads, and so waits for Postgres
up to thirteen times. But most writes change one user at whom nobody else is, or register one. What
is read without a lock is decided on; then one statement locks the user, looks whether it still has
the version that was read, and writes all that belongs to the change, or nothing. So the change is
made to what it was decided on, and its document is known without another read. Whatever is out of
the ordinary (a version that has risen, a key that has an answer, a name that another has or has
locked, a cache that could not be told of a change) is left to the general shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar

import asyncpg
from msgspec.structs import replace
from sqlalchemy import ColumnElement, bindparam, func, select, text
from user_service_schemas import ChangeKind, Choices, User

from .buckets import bucket_of
from .database import Direct, Fields, lock_key
from .document import Document, DocumentShape, choices_in, read_beside
from .recorded_answers import KEEP, Recorder, is_answered, recorded

T = TypeVar("T")

# Locks are taken in the order in which all writes take them: names, the user, devices. None waits
# for a name. Whoever waited for the user sees the rows of before, but not with the version of
# before: that of `users` is looked at again after the wait, and every other change raises it. In
# the moment between the statement's snapshot and a lock on a name another may have had that name:
# `taken` and `kept` meet its row then. Without `taken` nothing is done; what is taken and not kept
# is taken back by the division.
_WRITE = """
    WITH locked AS MATERIALIZED ({locking}),
    taken AS ({taking}), kept AS ({keeping}), raised AS ({raising}),
    logged AS (
        INSERT INTO changes (user_id, version, kind, at, actor)
        SELECT id, version, :kind, clock_timestamp(), :actor FROM raised
    )
    {effects}
    SELECT 1 / (SELECT count(*) FROM raised) FROM taken
"""
_ARE_FREE = """(
    SELECT coalesce(bool_and(pg_try_advisory_xact_lock(name)), true)
    FROM unnest(CAST(:names AS bigint[])) AS name
)"""
_LOCK_THE_USER = f"""
    SELECT id
    FROM users
    WHERE id = CAST(:id AS uuid) AND version = :version AND deleted_at IS NULL
        AND :generation = (SELECT generation FROM cache_generations WHERE bucket = :bucket)
        AND {_ARE_FREE}
    FOR NO KEY UPDATE
"""  # noqa: S608 - of constants
_LOCK_NO_USER = f"SELECT CAST(:id AS uuid) AS id WHERE {_ARE_FREE}"
_IS_TAKEN_AND_KEPT = "CAST(:key AS text) IS NULL OR EXISTS (SELECT FROM kept)"
_RAISE_THE_VERSION = f"""
    UPDATE users
    SET version = users.version + 1, updated_at = :at
    FROM taken
    WHERE users.id = taken.id AND ({_IS_TAKEN_AND_KEPT})
    RETURNING users.id, users.version
"""  # noqa: S608
_BEGIN_WITH_A_VERSION = f"SELECT id, 1 AS version FROM taken WHERE {_IS_TAKEN_AND_KEPT}"  # noqa: S608
_KEEPING = KEEP.format(about="(SELECT id FROM taken WHERE CAST(:key AS text) IS NOT NULL)")


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
    """What a revision does to its domain's tables: a statement made here, and its parameters."""

    statement: Direct
    parameters: Mapping[str, Any]


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


_BESIDE = (
    func.clock_timestamp().label("now"),
    is_answered(bindparam("caller"), bindparam("key")).label("is_answered"),
)


def reading(*beside: ColumnElement[Any]) -> Direct:
    """Return the statement that reads a user to revise, and `beside`."""
    return read_beside(*_BESIDE, *beside)


def looking(*beside: ColumnElement[Any]) -> Direct:
    """Return the statement that reads `beside` to register a user."""
    return Direct(select(*_BESIDE, *beside))


def writing(effects: str = "", *, taking: str = "SELECT id FROM locked") -> Direct:
    """Return the statement that writes a revision.

    `effects` is what a repository does to its tables, further parts of the WITH: from the row that
    `raised` has (the id, and the new version) if the revision takes place. What may meet another's
    row is `taking`: from `locked`, and it returns the user's id if it did not.
    """
    return _statement(_LOCK_THE_USER, taking, _RAISE_THE_VERSION, effects)


def registering(effects: str, *, taking: str) -> Direct:
    """Return the statement that registers a user: `taking` inserts it, otherwise as `writing`."""
    return _statement(_LOCK_NO_USER, taking, _BEGIN_WITH_A_VERSION, effects)


def _statement(locking: str, taking: str, raising: str, effects: str) -> Direct:
    return Direct(
        text(
            _WRITE.format(
                locking=locking, taking=taking, keeping=_KEEPING, raising=raising, effects=effects
            )
        )
    )


async def look(
    connection: asyncpg.Connection, statement: Direct, parameters: Mapping[str, Any]
) -> Fields | None:
    """Read what a registration is decided on; None if `caller` and `key` have an answer."""
    (row,) = await statement.fetch(connection, parameters)
    return None if row["is_answered"] else row


async def read(
    connection: asyncpg.Connection,
    shape: DocumentShape,
    statement: Direct,
    parameters: Mapping[str, Any],
) -> Base | None:
    """Read a user (`id`) to revise; None if there is none, or `caller` and `key` have an answer."""
    rows = await statement.fetch(connection, parameters)
    if not rows or rows[0]["is_answered"]:
        return None
    (row,) = rows
    return Base(shape.document(row), choices_in(row), row["now"], row)


async def write(
    connection: asyncpg.Connection,
    revision: Revision[Any],
    recorder: Recorder,
    generation: int | None,
) -> bool:
    """Write a revision, all of it or nothing: a change under the generation it was announced in.

    A registration (None) is of no generation: nothing of its user can have been cached before.
    """
    user, key = revision.user, recorder.key
    names = (*revision.names, key.name) if key else revision.names
    parameters = {
        "id": user.id,
        "version": user.version - 1,
        "at": user.updated_at,
        "kind": revision.kind.value,
        "actor": recorder.actor,
        "bucket": bucket_of(user.id),
        "generation": generation,
        "names": [lock_key(name) for name in names],
        **recorded(key, revision.result),
        **revision.effects.parameters,
    }
    try:
        return bool(await revision.effects.statement.fetch(connection, parameters))
    except asyncpg.DivisionByZeroError:
        return False
