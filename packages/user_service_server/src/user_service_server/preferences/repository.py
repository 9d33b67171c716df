"""The SQL of preferences and of the consent history."""

from __future__ import annotations

from typing import Any

import asyncpg
import msgspec
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection
from user_service_schemas import (
    Choices,
    Consent,
    PreferenceChange,
    PreferencesRevision,
    preference_changes,
)

from ..storage import revisions
from ..storage.direct import Direct, asking, row_of
from ..storage.revisions import Effects
from ..storage.tables import preference_history, preferences, users

SAID = {
    "email": "boolean",
    "push": "boolean",
    "quiet_hours_start": "text",
    "quiet_hours_end": "text",
    "timezone": "text",
    "muted_until": "timestamptz",
    "categories": "text",
    "source": "text",
    "policy_version": "text",
    "changes": "text",
}
"""PostgreSQL's types of what is said."""
_NOTED = """
    noted AS (
        INSERT INTO preference_history
            (user_id, version, at, actor, source, policy_version, changes)
        SELECT id, version, clock_timestamp(), actor, source, policy_version,
            CAST(changes AS jsonb)
        FROM raised
    )
"""
BEGINNING = f"""
    , said AS (
        INSERT INTO preferences (user_id, email, push, quiet_hours_start, quiet_hours_end,
            timezone, muted_until, categories)
        SELECT id, email, push, quiet_hours_start, quiet_hours_end, timezone, muted_until,
            CAST(categories AS jsonb)
        FROM raised
    ), {_NOTED}
"""  # noqa: S608 - of constants
"""What a registration does to these tables: further parts of a WITH that has the row `raised`, in
which `said_first` is."""
READ = revisions.reading(asking(revisions.KEY))
_SAY = revisions.writing(
    f"""
    , said AS (
        UPDATE preferences
        SET email = raised.email, push = raised.push,
            quiet_hours_start = raised.quiet_hours_start,
            quiet_hours_end = raised.quiet_hours_end, timezone = raised.timezone,
            muted_until = raised.muted_until, categories = CAST(raised.categories AS jsonb)
        FROM raised
        WHERE preferences.user_id = raised.id
    ), {_NOTED}
    """,  # noqa: S608
    types=SAID,
)


def say(
    choices: Choices, changes: tuple[PreferenceChange, ...], consent: Consent | None
) -> Effects:
    """Return what is written when a user says `choices`, with the entry of the history."""
    return Effects(_SAY, _said(choices, changes, consent))


def said_first(choices: Choices, consent: Consent | None) -> dict[str, Any]:
    """Return what a new user says, as `SAID` has it."""
    return _said(choices, preference_changes(None, choices), consent)


def _said(
    choices: Choices, changes: tuple[PreferenceChange, ...], consent: Consent | None
) -> dict[str, Any]:
    return {
        **msgspec.structs.asdict(choices),
        "categories": _to_json(choices.categories),
        "source": consent and consent.source,
        "policy_version": consent and consent.policy_version,
        "changes": _to_json(changes),
    }


def _to_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


_ROW = row_of({"id": "uuid", "version": "bigint", "actor": "text", **SAID})
_BEGIN = Direct(text(f"WITH raised AS ({_ROW}) {BEGINNING} SELECT 1"))


async def insert_choices(
    connection: asyncpg.Connection,
    user_id: str,
    choices: Choices,
    *,
    consent: Consent | None,
    actor: str | None,
) -> None:
    """Insert a new user's preferences, and begin the history with them."""
    said = said_first(choices, consent)
    await _BEGIN.fetch(connection, {"id": user_id, "version": 1, "actor": actor, **said})


async def read_choices(connection: AsyncConnection, user_id: str) -> Choices:
    """Read what a locked user has said."""
    found = await connection.execute(select(preferences).where(preferences.c.user_id == user_id))
    values = dict(found.mappings().one())
    del values["user_id"]
    return Choices(**values)


async def append_history(
    connection: AsyncConnection,
    user_id: str,
    version: int,
    changes: tuple[PreferenceChange, ...],
    *,
    consent: Consent | None,
    actor: str | None,
    choices: Choices | None = None,
) -> None:
    """Append an entry to the consent history; with `choices`, set what the locked user has said."""
    statement = insert(preference_history).values(
        user_id=user_id,
        version=version,
        at=func.clock_timestamp(),
        actor=actor,
        source=consent and consent.source,
        policy_version=consent and consent.policy_version,
        changes=msgspec.to_builtins(changes),
    )
    if choices is not None:
        said = update(preferences).where(preferences.c.user_id == user_id)
        statement = statement.add_cte(said.values(**msgspec.structs.asdict(choices)).cte("said"))
    await connection.execute(statement)


async def read_history(
    connection: AsyncConnection, user_id: str, before: int | None, limit: int
) -> list[tuple[int, PreferencesRevision]] | None:
    """Read entries below the id `before`, newest first, with their ids; None: no such user."""
    h = preference_history.c
    statement = (
        select(preference_history)
        .where(h.user_id == user_id, h.id < before if before is not None else h.id.is_not(None))
        .order_by(h.id.desc())
        .limit(limit)
    )
    rows = (await connection.execute(statement)).all()
    if not rows:
        exists = select(users.c.id).where(users.c.id == user_id, users.c.deleted_at.is_(None))
        if (await connection.execute(exists)).first() is None:
            return None
    return [(row.id, _revision(row)) for row in rows]


def _revision(row: Any) -> PreferencesRevision:
    return PreferencesRevision(
        version=row.version,
        at=row.at,
        actor=row.actor,
        source=row.source,
        policy_version=row.policy_version,
        changes=msgspec.convert(row.changes, tuple[PreferenceChange, ...]),
    )


async def erase(connection: AsyncConnection, user_id: str) -> None:
    """Delete what a locked user has said, and its history."""
    await connection.execute(
        delete(preference_history).where(preference_history.c.user_id == user_id)
    )
    await connection.execute(delete(preferences).where(preferences.c.user_id == user_id))
