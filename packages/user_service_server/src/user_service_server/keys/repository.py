"""The SQL of service keys. What is stored cannot be used: a digest of the secret (SHA-256).

The secret has 256 bits of chance, so that a fast digest is enough, and none that depends on
SECRET_KEY, so that its change locks nobody out.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, bindparam, func, insert, or_, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ..storage.tables import service_keys

ANYBODY = "anonymous"
"""The name of who calls without a key, where none is needed. No key has it."""

_ID_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_NOTE_USED = text("""
    UPDATE service_keys SET last_used_at = greatest(last_used_at, used.at)
    FROM unnest(CAST(:ids AS text[]), CAST(:times AS timestamptz[])) AS used (id, at)
    WHERE service_keys.id = used.id
""")


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key as it is stored. It has `ended` when it is revoked or expired, by Postgres' clock.

    After a rotation it is revoked in the future, when the grace is over.
    """

    name: str
    secret_digest: bytes
    scopes: Sequence[str]
    expires_at: datetime | None
    ended: bool


def digest_secret(secret: str) -> bytes:
    """Return what is stored of a secret."""
    return hashlib.sha256(secret.encode()).digest()


async def find_key(connection: AsyncConnection, key_id: str) -> StoredKey | None:
    """Read a key."""
    c = service_keys.c
    found = await connection.execute(
        select(
            c.name,
            c.secret_digest,
            c.scopes,
            c.expires_at,
            (func.least(c.revoked_at, c.expires_at) <= func.now()).label("ended"),
        ).where(c.id == key_id)
    )
    row = found.first()
    if row is None:
        return None
    return StoredKey(
        row.name, bytes(row.secret_digest), row.scopes, row.expires_at, bool(row.ended)
    )


async def create_key(
    connection: AsyncConnection, name: str, scopes: Sequence[str], expires_in: timedelta | None
) -> str:
    """Store a new key and return it: nobody can be told it again."""
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(12))
    secret = secrets.token_hex(32)
    await connection.execute(
        insert(service_keys).values(
            id=key_id,
            name=name,
            secret_digest=digest_secret(secret),
            scopes=list(scopes),
            created_at=func.now(),
            expires_at=None if expires_in is None else func.now() + expires_in,
        )
    )
    return f"usk_{key_id}_{secret}"


async def list_keys(connection: AsyncConnection) -> Sequence[Row[*tuple[Any, ...]]]:
    """Read all keys, oldest first, without their digests."""
    c = service_keys.c
    columns = (c.id, c.name, c.scopes, c.created_at, c.expires_at, c.revoked_at, c.last_used_at)
    return (await connection.execute(select(*columns).order_by(c.created_at, c.id))).all()


async def revoke_key(connection: AsyncConnection, key_id: str, after: timedelta) -> bool:
    """Revoke a key, now or after a grace; False if there is none, or it is revoked already."""
    c = service_keys.c
    at = func.now() + bindparam("after", after)
    revoked = await connection.execute(
        update(service_keys)
        .where(c.id == key_id, or_(c.revoked_at.is_(None), c.revoked_at > at))
        .values(revoked_at=at)
        .returning(c.id)
    )
    return revoked.first() is not None


async def read_to_rotate(connection: AsyncConnection, key_id: str) -> Row[Any, Any] | None:
    """Lock and read a key that is in force, to make another like it."""
    c = service_keys.c
    found = await connection.execute(
        select(c.name, c.scopes).where(c.id == key_id, c.revoked_at.is_(None)).with_for_update()
    )
    return found.first()


async def note_used(connection: AsyncConnection, used: Mapping[str, datetime]) -> None:
    """Note when keys were used last."""
    await connection.execute(_NOTE_USED, {"ids": list(used), "times": list(used.values())})
