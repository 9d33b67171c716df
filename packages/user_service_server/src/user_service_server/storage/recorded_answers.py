"""The SQL of recorded answers, by which a repeated write finds what the first one got."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from sqlalchemy import BigInteger, Row, bindparam, delete, func, select, true, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from .tables import recorded_answers

KEPT_HOURS = 24


class RecordedAnswer(msgspec.Struct, frozen=True):
    """An answer as it was given; `digest` is of the request that it was given to."""

    digest: bytes
    status: int
    headers: list[tuple[str, str]]
    body: bytes


_c = recorded_answers.c
_FIND = select(_c.digest, _c.status, _c.headers, _c.body).where(
    _c.caller == bindparam("caller"),
    _c.key == bindparam("key"),
    _c.at > func.now() - func.make_interval(0, 0, 0, 0, KEPT_HOURS),
)
_found = _FIND.subquery()
_try_lock = select(
    func.pg_try_advisory_xact_lock(bindparam("name", type_=BigInteger)).label("is_mine")
).subquery()
_LOCK_AND_FIND = select(_try_lock.c.is_mine, _found).select_from(
    _try_lock.outerjoin(_found, true())
)


async def find(connection: AsyncConnection, caller: str, key: str) -> RecordedAnswer | None:
    """Read what a caller's key got in the last 24 hours."""
    found = await connection.execute(_FIND, {"caller": caller, "key": key})
    row = found.first()
    return None if row is None else _answer(row)


async def lock_and_find(
    connection: AsyncConnection, caller: str, key: str
) -> tuple[bool, RecordedAnswer | None]:
    """Lock a caller's key until the end of the transaction, and read what it got.

    Returns False first if another has it: a repeat that waited on a unique index instead would only
    hold a connection. One statement sees what was there before it had the lock, so what is not
    found may have come meanwhile: `record` looks again.
    """
    digest = hashlib.sha256(b"\0".join([b"repeat", caller.encode(), key.encode()])).digest()
    name = int.from_bytes(digest[:8], "big", signed=True)
    found = await connection.execute(_LOCK_AND_FIND, {"name": name, "caller": caller, "key": key})
    row = found.one()
    return row.is_mine, None if row.digest is None else _answer(row)


def _answer(row: Row[*tuple[Any, ...]]) -> RecordedAnswer:
    headers = [(name, value) for name, value in row.headers]
    return RecordedAnswer(digest=row.digest, status=row.status, headers=headers, body=row.body)


async def record(
    connection: AsyncConnection,
    caller: str,
    key: str,
    user_id: str | None,
    answer: RecordedAnswer,
) -> bool:
    """Keep the answer of a locked key, in place of one that is older than 24 hours.

    False if there is a newer one, which came before the lock was got.

    It is forgotten when `user_id` is erased; None, if it holds nothing of anybody.
    """
    values = {
        "digest": answer.digest,
        "status": answer.status,
        "headers": answer.headers,
        "body": answer.body,
        "user_id": user_id,
        "at": func.now(),
    }
    kept = await connection.execute(
        insert(recorded_answers)
        .values(caller=caller, key=key, **values)
        .on_conflict_do_update(
            constraint="pk_recorded_answers",
            set_=values,
            where=_c.at <= func.now() - func.make_interval(0, 0, 0, 0, KEPT_HOURS),
        )
        .returning(_c.key)
    )
    return kept.first() is not None


async def forget(connection: AsyncConnection, user_id: str) -> None:
    """Delete the answers about a locked user: they hold personal data."""
    await connection.execute(delete(recorded_answers).where(recorded_answers.c.user_id == user_id))


async def prune(connection: AsyncConnection, limit: int) -> int:
    """Delete up to `limit` answers that are older than 24 hours; returns how many."""
    c = recorded_answers.c
    old = (
        select(c.caller, c.key)
        .where(c.at < func.now() - func.make_interval(0, 0, 0, 0, KEPT_HOURS))
        .limit(limit)
    )
    deleted = await connection.execute(
        delete(recorded_answers).where(tuple_(c.caller, c.key).in_(old))
    )
    return deleted.rowcount
