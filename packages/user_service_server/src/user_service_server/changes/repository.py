"""The SQL of the change feed."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from user_service_schemas import Change

from ..storage.tables import changes

_SEQUENCER = 0x75736663  # "usfc": one sequencer at a time

_FEED_STATE = text("""
    SELECT last_position, pruned_position, complete_through, clock_timestamp() AS now,
        EXISTS (SELECT FROM changes WHERE position IS NULL) AS is_waiting
    FROM change_feed
""")
_TRY_LOCK = text(f"SELECT pg_try_advisory_xact_lock({_SEQUENCER})")
# Versions of one user are committed in their order, so whoever sees a later one sees the earlier
# ones, too: ordered by (user, version), no batch skips one. All that was acknowledged before this
# statement began is in its snapshot, so a batch that takes all makes the feed complete up to then.
_NUMBER = text("""
    WITH waiting AS (
        SELECT id, row_number() OVER (ORDER BY user_id, version, id) AS n
        FROM changes WHERE position IS NULL
        ORDER BY user_id, version, id
        LIMIT :limit
    ), numbered AS (
        UPDATE changes SET position = change_feed.last_position + waiting.n
        FROM waiting, change_feed
        WHERE changes.id = waiting.id
        RETURNING 1
    ), counted AS (
        SELECT count(*) AS n FROM numbered
    )
    UPDATE change_feed
    SET last_position = last_position + counted.n,
        complete_through = CASE WHEN counted.n < :limit THEN statement_timestamp()
            ELSE complete_through END
    FROM counted
    RETURNING counted.n
""")
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


async def read_feed_state(connection: AsyncConnection) -> FeedState:
    """Read how far the feed goes."""
    return FeedState(*(await connection.execute(_FEED_STATE)).one())


async def number_changes(connection: AsyncConnection, limit: int) -> int | None:
    """Give positions to committed changes; None if another process is at it.

    The lock is held to the commit, and the changes are looked for after it was got.
    """
    if not await connection.scalar(_TRY_LOCK):
        return None
    return int(await connection.scalar(_NUMBER, {"limit": limit}) or 0)


async def read_changes(
    connection: AsyncConnection, epoch: str, after: int, limit: int
) -> list[Change]:
    """Read changes behind a position, in the order of the feed."""
    c = changes.c
    rows = await connection.execute(
        select(c.position, c.user_id, c.version, c.kind, c.at, c.actor)
        .where(c.position > after)
        .order_by(c.position)
        .limit(limit)
    )
    return [
        Change(
            position=f"{epoch}.{row.position}",
            user_id=row.user_id,
            version=row.version,
            kind=row.kind,
            at=row.at,
            actor=row.actor,
        )
        for row in rows
    ]


async def prune_changes(connection: AsyncConnection, days: int, limit: int) -> int:
    """Delete up to `limit` changes that are older than `days`, oldest first; returns how many."""
    return int(await connection.scalar(_PRUNE, {"days": days, "limit": limit}) or 0)
