"""The SQL of recorded answers, by which a repeated write finds what the first one got."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import asyncpg
import msgspec
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Exists,
    Row,
    bindparam,
    delete,
    exists,
    func,
    literal_column,
    select,
    text,
    true,
    tuple_,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from ..errors import IdempotencyInProgress
from .database import lock_key
from .direct import Direct, row_of
from .tables import recorded_answers

KEPT_HOURS = 24


class RecordedAnswer(msgspec.Struct, frozen=True):
    """An answer as it was given; `digest` is of the request that it was given to."""

    digest: bytes
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class AnswerKey(NamedTuple):
    """Under what the answer to a write is recorded, and how it is made of the write's result."""

    caller: str
    key: str
    answer: Callable[[Any], RecordedAnswer]

    @property
    def name(self) -> bytes:
        """What a write locks to have the key for itself."""
        named = b"\0".join([b"repeat", self.caller.encode(), self.key.encode()])
        return hashlib.sha256(named).digest()


class Recorder(NamedTuple):
    """Who writes, as the change log and the history keep it, and whether a repeat shall find it.

    `actor` is None for the service itself; `key` for a write that will not be repeated.
    """

    actor: str | None = None
    key: AnswerKey | None = None


class AlreadyAnswered(Exception):
    """While this request was on its way, another with the same key was answered."""

    def __init__(self, answer: RecordedAnswer) -> None:
        super().__init__()
        self.answer = answer


_c = recorded_answers.c
_SINCE = func.now() - literal_column(f"make_interval(hours => {KEPT_HOURS})")
_IS_KEPT = _c.at > _SINCE
_FIND = select(_c.digest, _c.status, _c.headers, _c.body).where(
    _c.caller == bindparam("caller"), _c.key == bindparam("key"), _IS_KEPT
)
_found = _FIND.subquery()
_try_lock = select(
    func.pg_try_advisory_xact_lock(bindparam("name", type_=BigInteger)).label("is_mine")
).subquery()
_LOCK_AND_FIND = select(_try_lock.c.is_mine, _found).select_from(
    _try_lock.outerjoin(_found, true())
)


def is_answered(caller: ColumnElement[str], key: ColumnElement[str]) -> Exists:
    """Whether a key has got an answer."""
    return exists().where(_c.caller == caller, _c.key == key, _IS_KEPT)


async def find(connection: AsyncConnection, caller: str, key: str) -> RecordedAnswer | None:
    """Read what a caller's key got in the last 24 hours."""
    found = await connection.execute(_FIND, {"caller": caller, "key": key})
    row = found.first()
    return None if row is None else _answer(row)


async def begin(connection: AsyncConnection, key: AnswerKey) -> None:
    """Lock a key, first of all in a transaction.

    Raises:
        IdempotencyInProgress: another has it.
        AlreadyAnswered
    """
    is_mine, answer = await lock_and_find(connection, key)
    if answer is not None:
        raise AlreadyAnswered(answer)
    if not is_mine:
        raise IdempotencyInProgress


async def lock_and_find(
    connection: AsyncConnection, key: AnswerKey
) -> tuple[bool, RecordedAnswer | None]:
    """Lock a key until the end of the transaction, and read what it got.

    Returns False first if another has it: a repeat that waited on a unique index instead would only
    hold a connection. One statement sees what was there before it had the lock, so what is not
    found may have come meanwhile: `record` looks again.
    """
    found = await connection.execute(
        _LOCK_AND_FIND, {"name": lock_key(key.name), "caller": key.caller, "key": key.key}
    )
    row = found.one()
    return row.is_mine, None if row.digest is None else _answer(row)


def _answer(row: Row[*tuple[Any, ...]]) -> RecordedAnswer:
    headers = [(name, value) for name, value in row.headers]
    return RecordedAnswer(digest=row.digest, status=row.status, headers=headers, body=row.body)


RECORDED = {
    "caller": "text",
    "key": "text",
    "digest": "bytea",
    "status": "smallint",
    "headers": "text",
    "body": "bytea",
}
"""The types of what `recorded` returns."""
KEEP = f"""
    INSERT INTO recorded_answers AS old (caller, key, digest, status, headers, body, user_id, at)
    SELECT caller, key, digest, status, CAST(headers AS jsonb), body, id, now()
    FROM {{about}}
    ON CONFLICT ON CONSTRAINT pk_recorded_answers DO UPDATE
    SET digest = excluded.digest, status = excluded.status, headers = excluded.headers,
        body = excluded.body, user_id = excluded.user_id, at = excluded.at
    WHERE old.at <= {_SINCE}
    RETURNING old.user_id
"""  # noqa: S608 - of constants
"""Keeps answers (`RECORDED`) in place of those that are older than 24 hours; returns no row where
there is a newer one. `about` has them, and each with the `id` of whom it is about."""
_RECORD = Direct(text(KEEP.format(about=f"({row_of({'id': 'uuid', **RECORDED})}) AS about")))


def recorded(key: AnswerKey | None, result: Any) -> dict[str, Any]:
    """Return an answer as `RECORDED` has it; without a key all of it is null."""
    if key is None:
        return dict.fromkeys(RECORDED)
    answer = key.answer(result)
    return {
        "caller": key.caller,
        "key": key.key,
        "digest": answer.digest,
        "status": answer.status,
        "headers": msgspec.json.encode(answer.headers).decode(),
        "body": answer.body,
    }


async def record(
    connection: asyncpg.Connection, key: AnswerKey, user_id: str | None, result: Any
) -> None:
    """Keep the answer to a write whose key is locked, last of all before the commit.

    It is forgotten when `user_id` is erased; None, if it holds nothing of anybody.

    Raises:
        IdempotencyInProgress: another did the same just before this had the lock.
    """
    if not await _RECORD.fetch(connection, {"id": user_id, **recorded(key, result)}):
        raise IdempotencyInProgress


async def forget(connection: AsyncConnection, user_id: str) -> None:
    """Delete the answers about a locked user: they hold personal data."""
    await connection.execute(delete(recorded_answers).where(recorded_answers.c.user_id == user_id))


async def prune(connection: AsyncConnection, limit: int) -> int:
    """Delete up to `limit` answers that are older than 24 hours; returns how many."""
    c = recorded_answers.c
    # Who is just being replaced is passed over: its statement may wait for another of these.
    old = (
        select(c.caller, c.key).where(c.at < _SINCE).limit(limit).with_for_update(skip_locked=True)
    )
    deleted = await connection.execute(
        delete(recorded_answers).where(tuple_(c.caller, c.key).in_(old))
    )
    return deleted.rowcount
