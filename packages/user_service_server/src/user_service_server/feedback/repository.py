"""The SQL of feedback: what it is about is read, and changed, for a thousand reports at once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import msgspec
from sqlalchemy import func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection
from user_service_schemas import PreferenceChange

from ..storage.database import lock_key
from ..storage.document import is_one_of
from ..storage.tables import suppressed_addresses, users

_LARGE_REPORTS = 0x75736662  # "usfb": one report with very many names at a time

_LOCK = text("SELECT pg_advisory_xact_lock(CAST(:name AS bigint))")
_TOKENS = """
    SELECT token_digest, CAST(id AS text) AS id, CAST(user_id AS text) AS user_id, active,
        last_seen_at
    FROM devices
    WHERE token_digest = ANY (CAST(:digests AS bytea[]))
"""
_READ_TOKENS = text(_TOKENS)
_LOCK_TOKENS = text(_TOKENS + "ORDER BY id FOR NO KEY UPDATE")
# When somebody opted in again by themselves: a registration with its defaults is no such word.
_READ_ADDRESSES = text("""
    SELECT asked.email_key, CAST(users.id AS text) AS user_id, preferences.email AS wants_email,
        suppressed_addresses.at AS suppressed_at, suppressed_addresses.lifted_at,
        (
            SELECT max(at) FROM preference_history
            WHERE user_id = users.id
                AND changes @> '[{"field": "email", "before": false, "after": true}]'
        ) AS opted_in_at
    FROM unnest(CAST(:keys AS text[]), CAST(:digests AS bytea[])) AS asked (email_key, digest)
    LEFT JOIN users ON users.email_key = asked.email_key COLLATE "C"
    LEFT JOIN preferences ON preferences.user_id = users.id
    LEFT JOIN suppressed_addresses ON suppressed_addresses.digest = asked.digest
""")
_SUPPRESS = text("""
    INSERT INTO suppressed_addresses (digest, reason, at)
    SELECT * FROM unnest(
        CAST(:digests AS bytea[]), CAST(:reasons AS text[]), CAST(:ats AS timestamptz[])
    )
    ON CONFLICT (digest) DO UPDATE
    SET reason = excluded.reason, at = excluded.at, lifted_at = NULL
""")
_OPT_OUT = text("""
    WITH opted_out AS (
        SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:versions AS bigint[]))
            AS opted_out (user_id, version)
    ), switched AS (
        UPDATE preferences SET email = false FROM opted_out
        WHERE preferences.user_id = opted_out.user_id
    )
    INSERT INTO preference_history (user_id, version, at, actor, source, changes)
    SELECT user_id, version, clock_timestamp(), CAST(:actor AS text), :source,
        CAST(:changes AS jsonb)
    FROM opted_out
""")
_OPTED_OUT = msgspec.json.encode([PreferenceChange(field="email", before=True, after=False)])
# Of one minute more than an hour: never more than the limit in any hour.
_COUNTS = text("""
    SELECT clock_timestamp() AS now, array_agg(minute ORDER BY minute) AS minutes,
        array_agg(applied ORDER BY minute) AS applied
    FROM feedback_counts
    WHERE caller = :caller
        AND minute >= date_trunc('minute', clock_timestamp() - interval '1 hour')
""")
_COUNT = text("""
    WITH over AS (
        DELETE FROM feedback_counts
        WHERE caller = :caller AND minute < clock_timestamp() - interval '2 hours'
    )
    INSERT INTO feedback_counts AS counted (caller, minute, applied)
    VALUES (:caller, date_trunc('minute', clock_timestamp()), :applied)
    ON CONFLICT (caller, minute) DO UPDATE SET applied = counted.applied + excluded.applied
""")


class Subject(NamedTuple):
    """A device, as far as feedback about its token goes."""

    id: str
    user_id: str
    active: bool
    last_seen_at: datetime


class Address(NamedTuple):
    """An address, and what its user wants, as far as feedback about it goes."""

    user_id: str | None
    wants_email: bool | None
    opted_in_at: datetime | None
    suppressed_at: datetime | None
    lifted_at: datetime | None


class Counts(NamedTuple):
    """How many reports of a caller took effect, minute by minute, oldest first."""

    now: datetime
    by_minute: list[tuple[datetime, int]]


async def lock_large_reports(connection: AsyncConnection) -> None:
    """Wait until no other report with very many names is under way.

    Each name is a place in Postgres' table of locks, which all share: 6400 by default.
    """
    await connection.execute(_LOCK, {"name": _LARGE_REPORTS})


async def read_tokens(
    connection: AsyncConnection, digests: Sequence[bytes], *, lock: bool = False
) -> dict[bytes, Subject]:
    """Read the devices of locked tokens; `lock` them if their users are locked."""
    if not digests:
        return {}
    statement = _LOCK_TOKENS if lock else _READ_TOKENS
    rows = await connection.execute(statement, {"digests": list(digests)})
    return {
        row.token_digest: Subject(row.id, row.user_id, row.active, row.last_seen_at) for row in rows
    }


async def read_addresses(
    connection: AsyncConnection, names: Mapping[str, bytes]
) -> dict[str, Address]:
    """Read what locked addresses are, by key; `names` has the name of each."""
    if not names:
        return {}
    rows = await connection.execute(
        _READ_ADDRESSES, {"keys": list(names), "digests": list(names.values())}
    )
    return {
        row.email_key: Address(
            row.user_id, row.wants_email, row.opted_in_at, row.suppressed_at, row.lifted_at
        )
        for row in rows
    }


async def suppress(
    connection: AsyncConnection, reports: Mapping[bytes, tuple[str, datetime]]
) -> None:
    """Suppress locked addresses: by name, for what reason and since when."""
    reasons, ats = zip(*reports.values(), strict=True)
    await connection.execute(
        _SUPPRESS, {"digests": list(reports), "reasons": list(reasons), "ats": list(ats)}
    )


async def read_email_key(connection: AsyncConnection, user_id: str) -> str | None:
    """Read under which key a user's address is found, without a lock; None: no such user."""
    key: str | None = await connection.scalar(
        select(users.c.email_key).where(users.c.id == user_id)
    )
    return key


async def lift(connection: AsyncConnection, name: bytes) -> None:
    """Let a locked user's address be tried again."""
    await connection.execute(
        update(suppressed_addresses)
        .where(suppressed_addresses.c.digest == name, suppressed_addresses.c.lifted_at.is_(None))
        .values(lifted_at=func.clock_timestamp())
    )


async def set_deliverable(
    connection: AsyncConnection, user_ids: Sequence[str], deliverable: bool
) -> None:
    """Note of locked users whether their addresses may be tried."""
    await connection.execute(
        update(users).where(is_one_of(users.c.id, user_ids)).values(email_deliverable=deliverable)
    )


async def opt_out(
    connection: AsyncConnection, versions: Mapping[str, int], *, source: str, actor: str | None
) -> None:
    """Switch email off for locked users, and say so in the history of each, by its version."""
    await connection.execute(
        _OPT_OUT,
        {
            "ids": list(versions),
            "versions": list(versions.values()),
            "actor": actor,
            "source": source,
            "changes": _OPTED_OUT.decode(),
        },
    )


async def lock_counts(connection: AsyncConnection, caller: str) -> Counts:
    """Lock and read what a caller's reports did within the hour. The last lock but the cache's."""
    digest = hashlib.sha256(b"feedback:" + caller.encode()).digest()
    await connection.execute(_LOCK, {"name": lock_key(digest)})
    # In a later statement, which sees what was committed until the lock was got.
    row = (await connection.execute(_COUNTS, {"caller": caller})).one()
    return Counts(row.now, list(zip(row.minutes or (), row.applied or (), strict=True)))


async def count(connection: AsyncConnection, caller: str, applied: int) -> None:
    """Count what a caller's report is about to do."""
    await connection.execute(_COUNT, {"caller": caller, "applied": applied})
