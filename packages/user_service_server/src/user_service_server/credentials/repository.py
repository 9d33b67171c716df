"""The SQL of credentials."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ..storage.tables import users


async def read_credentials(connection: AsyncConnection, user_id: str) -> Row[Any, Any, Any] | None:
    """Read a user's password hash, and what a password must not be: email and name."""
    found = await connection.execute(
        select(users.c.password_hash, users.c.email, users.c.name).where(
            users.c.id == user_id, users.c.deleted_at.is_(None)
        )
    )
    return found.first()


async def set_password_hash(connection: AsyncConnection, user_id: str, password_hash: str) -> None:
    """Set a locked user's password hash."""
    await connection.execute(
        update(users).where(users.c.id == user_id).values(password_hash=password_hash)
    )


async def read_by_email(connection: AsyncConnection, email_key: str) -> Row[Any, Any] | None:
    """Read the id and the password hash of who has an email."""
    found = await connection.execute(
        select(users.c.id, users.c.password_hash).where(users.c.email_key == email_key)
    )
    return found.first()


async def renew_password_hash(
    connection: AsyncConnection, user_id: str, seen: str, renewed: str
) -> None:
    """Replace a hash by a stronger one of the same password, unless that was changed meanwhile."""
    await connection.execute(
        update(users)
        .where(users.c.id == user_id, users.c.password_hash == seen)
        .values(password_hash=renewed)
    )
