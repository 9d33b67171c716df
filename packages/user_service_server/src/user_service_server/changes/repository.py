"""The SQL of the change feed."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import asyncpg
from sqlalchemy import Integer, bindparam, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from user_service_schemas import Change

from ..storage.direct import Direct, Fields
from ..storage.tables import changes

_FEED_STATE = Direct(
    text("""
    SELECT last_position, pruned_position, complete_through, clock_timestamp() AS now,
        EXISTS (SELECT FROM changes WHERE position IS NULL) AS is_waiting
    FROM change_feed
""")
)
# The function has a lock of its own and looks for the changes after it has got it; see where it is
# made, in the migrations. Through PgBouncer Postgres sets it no limit, and the driver's is enough:
# it waits for nobody but `prune`.
_NUMBER = Direct(
    text("""
    SELECT now_last AS last_position, now_pruned AS pruned_position,
        now_through AS complete_through, clock_timestamp() AS now,
        numbered = :limit AS is_waiting, numbered
    FROM number_changes(:limit)
    WHERE numbered IS NOT NULL
""")
)
_c = changes.c
_READ = Direct(
    select(_c.position, _c.user_id, _c.version, _c.kind, _c.at, _c.actor)
    .where(_c.position > bindparam("after"))
    .order_by(_c.position)
    .limit(bindparam("limit", type_=Integer))
)
_PRUNE = text("""
    WITH oldest AS (
        SELECT position, bool_and(at < clock_timestamp() - make_interval(days => :days))
            OVER (ORDER BY position) AS old
        FROM changes WHERE position > (SELECT pruned_position FROM change_feed)
        ORDER BY position
        LIMIT :limit
    ), pruned AS (
        DELETE FROM changes USING oldest
        WHERE changes.position = oldest.position AND oldest.old
        RETURNING changes.position
    ), counted AS (
        SELECT count(*) AS n, max(position) AS last FROM pruned
    )
    UPDATE change_feed SET pruned_position = greatest(pruned_position, counted.last)
    FROM counted
    RETURNING counted.n
""")


class FeedState(NamedTuple):
    """How far the feed goes. Times are Postgres'."""

    last_position: int
    pruned_position: int
    complete_through: datetime
    now: datetime
    is_waiting: bool
    """Whether there are changes that have no position yet."""


async def read_feed_state(connection: asyncpg.Connection) -> FeedState:
    """Read how far the feed goes."""
    (row,) = await _FEED_STATE.fetch(connection, {})
    return _state(row)


async def number_changes(
    connection: asyncpg.Connection, limit: int
) -> tuple[FeedState, int] | None:
    """Give positions to committed changes; None if another process is at it.

    Returns how far the feed goes then, and how many there were.
    """
    rows = await _NUMBER.fetch(connection, {"limit": limit})
    return (_state(rows[0]), rows[0]["numbered"]) if rows else None


def _state(row: Fields) -> FeedState:
    return FeedState(*(row[field] for field in FeedState._fields))


async def read_changes(
    connection: asyncpg.Connection, epoch: str, after: int, limit: int
) -> list[Change]:
    """Read changes behind a position, in the order of the feed."""
    rows = await _READ.fetch(connection, {"after": after, "limit": limit})
    return [
        Change(
            position=f"{epoch}.{row['position']}",
            user_id=str(row["user_id"]),
            version=row["version"],
            kind=row["kind"],
            at=row["at"],
            actor=row["actor"],
        )
        for row in rows
    ]


async def prune_changes(connection: AsyncConnection, days: int, limit: int) -> int:
    """Delete up to `limit` changes that are older than `days`, oldest first; returns how many."""
    return int(await connection.scalar(_PRUNE, {"days": days, "limit": limit}) or 0)
