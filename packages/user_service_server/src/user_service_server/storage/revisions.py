"""A change of one user in two statements: one reads, and one writes if nothing has changed since.

The general shape of a write (`documents.Write`) locks before it reads, and so waits for Postgres
up to thirteen times. But most writes change one user at whom nobody else is. What is read without a
lock is decided on; then one statement locks the user, looks whether it still has the version that
was read, and writes all that belongs to the change, or nothing. So the change is made to what it
was decided on, and its document is known without another read. Whatever is out of the ordinary (a
version that has risen, a key that has an answer, a name that another has locked, a cache that
could not be told) is left to the general shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar

import asyncpg
from msgspec.structs import replace
from sqlalchemy import ColumnElement, bindparam, func, text
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
    WITH locked AS MATERIALIZED (
        SELECT id
        FROM users
        WHERE id = CAST(:id AS uuid) AND version = :version AND deleted_at IS NULL
            AND :generation = (
                SELECT generation FROM cache_generations WHERE bucket = :bucket
            )
            AND (
                SELECT coalesce(bool_and(pg_try_advisory_xact_lock(name)), true)
                FROM unnest(CAST(:names AS bigint[])) AS name
            )
        FOR NO KEY UPDATE
    ), taken AS ({taking}), kept AS ({keeping}), raised AS (
        UPDATE users
        SET version = users.version + 1, updated_at = :at
        FROM taken
        WHERE users.id = taken.id AND (CAST(:key AS text) IS NULL OR EXISTS (SELECT FROM kept))
        RETURNING users.id, users.version
    ), logged AS (
        INSERT INTO changes (user_id, version, kind, at, actor)
        SELECT id, version, :kind, clock_timestamp(), :actor FROM raised
    )
    {effects}
    SELECT 1 / (SELECT count(*) FROM raised) FROM taken
"""
_KEEPING = KEEP.format(about="(SELECT id FROM taken WHERE CAST(:key AS text) IS NOT NULL)")


class Base(NamedTuple):
    """What a revision is decided on: the user, when it was read, and what was read beside."""

    document: Document
    choices: Choices
    at: datetime
    row: Fields

    def changed(self, **fields: Any) -> User:
        """Return the user with these fields, and the next version."""
        user = self.document.user
        return replace(user, version=user.version + 1, updated_at=self.at, **fields)


class Effects(NamedTuple):
    """What a revision does to the tables of its domain: a statement of `writing`, parameters."""

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


def reading(*beside: ColumnElement[Any]) -> Direct:
    """Return the statement that reads a user to revise, and `beside`."""
    return read_beside(
        func.clock_timestamp().label("now"),
        is_answered(bindparam("caller"), bindparam("key")).label("is_answered"),
        *beside,
    )


def writing(effects: str = "", *, taking: str = "SELECT id FROM locked") -> Direct:
    """Return the statement that writes a revision.

    `effects` is what a repository does to its tables, further parts of the WITH: from the row that
    `raised` has (the id, and the new version) if the revision takes place. What may meet another's
    row is `taking`: from `locked`, and it returns the user's id if it did not.
    """
    return Direct(text(_WRITE.format(taking=taking, keeping=_KEEPING, effects=effects)))


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
    connection: asyncpg.Connection, revision: Revision[Any], recorder: Recorder, generation: int
) -> bool:
    """Write a revision that was announced under a generation, all of it or nothing."""
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
