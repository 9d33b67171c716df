"""The SQL of recorded answers, by which a repeated write finds what the first one got."""

from __future__ import annotations

import hashlib

import msgspec
from sqlalchemy import delete, func, select, text, tuple_
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


_TRY_LOCK = text("SELECT pg_try_advisory_xact_lock(CAST(:name AS bigint))")


async def find(connection: AsyncConnection, caller: str, key: str) -> RecordedAnswer | None:
    """Read what a caller's key got in the last 24 hours."""
    c = recorded_answers.c
    found = await connection.execute(
        select(c.digest, c.status, c.headers, c.body).where(
            c.caller == caller,
            c.key == key,
            c.at > func.now() - func.make_interval(0, 0, 0, 0, KEPT_HOURS),
        )
    )
    row = found.first()
    if row is None:
        return None
    headers = [(name, value) for name, value in row.headers]
    return RecordedAnswer(digest=row.digest, status=row.status, headers=headers, body=row.body)


async def try_lock(connection: AsyncConnection, caller: str, key: str) -> bool:
    """Lock a caller's key until the end of the transaction; False if another has it.

    A repeat that waited on a unique index instead would only hold a connection.
    """
    digest = hashlib.sha256(b"\0".join([b"repeat", caller.encode(), key.encode()])).digest()
    name = int.from_bytes(digest[:8], "big", signed=True)
    return bool(await connection.scalar(_TRY_LOCK, {"name": name}))


async def record(
    connection: AsyncConnection,
    caller: str,
    key: str,
    user_id: str | None,
    answer: RecordedAnswer,
) -> None:
    """Keep the answer of a locked key, in place of one that is older than 24 hours.

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
    await connection.execute(
        insert(recorded_answers)
        .values(caller=caller, key=key, **values)
        .on_conflict_do_update(constraint="pk_recorded_answers", set_=values)
    )


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
