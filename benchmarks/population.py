"""Owns the users in the database of the service: loaded by COPY, as those of `documents` are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable

import asyncpg
from user_service_schemas import User, canonical_email, token_digest

from benchmarks import documents

# Of nobody's password; as long as a real one.
_PASSWORD_HASH = "$argon2id$v=19$m=19456,t=2,p=1$" + "A" * 22 + "$" + "A" * 43
_BATCH = 10_000


async def load(database_url: str, numbers: Iterable[int]) -> None:
    """Load the users with these numbers."""
    connection = await asyncpg.connect(database_url.replace("+asyncpg", ""))
    try:
        numbers = iter(numbers)
        while users := [documents.user(n) for n in itertools.islice(numbers, _BATCH)]:
            for table, columns, rows in (
                ("users", _USERS, map(_user, users)),
                ("preferences", _PREFERENCES, map(_preferences, users)),
                ("devices", _DEVICES, (row for user in users for row in _devices(user))),
            ):
                await connection.copy_records_to_table(table, records=rows, columns=columns)
        await connection.execute("VACUUM ANALYZE")
    finally:
        await connection.close()


_USERS = (
    *("id", "external_id", "name", "email", "email_key", "phone", "locale", "email_deliverable"),
    *("password_hash", "version", "created_at", "updated_at"),
)
_PREFERENCES = (
    *("user_id", "email", "push", "quiet_hours_start", "quiet_hours_end", "timezone"),
    *("muted_until", "categories"),
)
_DEVICES = (
    *("id", "user_id", "token", "token_digest", "platform", "app", "active"),
    *("registered_at", "last_seen_at"),
)


def _user(user: User) -> tuple[object, ...]:
    return (
        *(user.id, user.external_id, user.name, user.email, canonical_email(user.email)),
        *(user.phone, user.locale, user.email_deliverable, _PASSWORD_HASH, user.version),
        *(user.created_at, user.updated_at),
    )


def _preferences(user: User) -> tuple[object, ...]:
    chosen = user.preferences
    categories = {
        name: {"email": channels.email, "push": channels.push}
        for name, channels in chosen.categories.items()
    }
    return (
        *(user.id, chosen.email, chosen.push, chosen.quiet_hours_start, chosen.quiet_hours_end),
        *(chosen.timezone, chosen.muted_until, json.dumps(categories)),
    )


def _devices(user: User) -> Iterable[tuple[object, ...]]:
    for device in user.devices:
        yield (
            *(device.id, user.id, device.token, token_digest(device.token), device.platform),
            *(device.app, device.active, device.registered_at, device.registered_at),
        )
