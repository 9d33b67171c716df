"""The SQL of users."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import asyncpg
from sqlalchemy import (
    Boolean,
    ColumnElement,
    LargeBinary,
    bindparam,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection
from user_service_schemas import Choices, Consent

from ..preferences.repository import BEGINNING, SAID, said_first
from ..storage import revisions
from ..storage.direct import Direct, asking
from ..storage.revisions import Effects
from ..storage.tables import users


def email_name(email_key: str) -> bytes:
    """Return the name under which a write locks an email, and a suppressed one is kept."""
    return hashlib.sha256(b"email:" + email_key.encode()).digest()


def external_id_name(external_id: str) -> bytes:
    """Return the name under which a write locks an external id."""
    return hashlib.sha256(b"external_id:" + external_id.encode()).digest()


def is_deliverable(email_key: str) -> ColumnElement[bool]:
    """Whether mail to an address may be tried; stays true while its name is locked."""
    return _is_deliverable(literal(email_name(email_key)))


def _is_deliverable(name: ColumnElement[bytes]) -> ColumnElement[bool]:
    return func.is_deliverable(name, type_=Boolean)


def by_email(email_key: str) -> ColumnElement[bool]:
    """Select the user who has this email."""
    return users.c.email_key == email_key


def by_phone(phone: str) -> ColumnElement[bool]:
    """Select the users who have this telephone number."""
    return users.c.phone == phone


def by_external_id(external_id: str) -> ColumnElement[bool]:
    """Select the user who has this external id."""
    return users.c.external_id == external_id


def after(user_id: str) -> ColumnElement[bool]:
    """Select the users behind `user_id` in the order of ids, which is that of registration."""
    return users.c.id > user_id


_PERSONAL = ("external_id", "name", "email", "email_key", "phone", "locale", "password_hash")
_EMAIL_NAME = bindparam("email_name", type_=LargeBinary)
_asked = asking(
    {"email_name": "bytea", "email_key": "text", "external_id": "text", **revisions.KEY}
)
LOOK = revisions.looking(
    _asked,
    _is_deliverable(_asked.c.email_name).label("email_deliverable"),
    or_(
        exists().where(users.c.email_key == _asked.c.email_key),
        exists().where(users.c.external_id == _asked.c.external_id),
    ).label("is_taken"),
)
# The function sees what was committed until it is asked, and so all that was done by whoever had
# the lock on the address's name before.
_REGISTER = revisions.registering(
    BEGINNING,
    taking="""
        INSERT INTO users (id, version, created_at, updated_at, email_deliverable, external_id,
            name, email, email_key, phone, locale, password_hash)
        SELECT id, 1, at, at, email_deliverable, its_external_id, its_name, its_email,
            its_email_key, its_phone, its_locale, its_password_hash
        FROM locked
        WHERE is_deliverable(email_name) = email_deliverable
        ON CONFLICT DO NOTHING
        RETURNING id
    """,
    types={
        "email_name": "bytea",
        "email_deliverable": "boolean",
        **{f"its_{column}": "text" for column in _PERSONAL},
        **SAID,
    },
)


def register(
    values: Mapping[str, str | None],
    choices: Choices,
    *,
    email_deliverable: bool,
    consent: Consent | None,
) -> Effects:
    """Return what is written when a user registers, with the beginning of the history.

    Nothing, if the email or the external id is another's, or mail to the address may not be tried
    any more, or again.
    """
    said = {f"its_{column}": values.get(column) for column in _PERSONAL}
    deliverable = {
        "email_name": email_name(str(values["email_key"])),
        "email_deliverable": email_deliverable,
    }
    return Effects(_REGISTER, {**said, **deliverable, **said_first(choices, consent)})


# A plain insert that fails would leave `Key (email)=(…)` in Postgres' log.
_INSERT = Direct(
    insert(users)
    .values(
        id=bindparam("id"),
        version=1,
        created_at=func.now(),
        updated_at=func.now(),
        email_deliverable=_is_deliverable(_EMAIL_NAME),
        **{column: bindparam(column) for column in _PERSONAL},
    )
    .on_conflict_do_nothing()
    .returning(users.c.id)
)


async def insert_user(
    connection: asyncpg.Connection, user_id: str, values: Mapping[str, Any]
) -> bool:
    """Insert a user at version 1; False if the email or the external id is another's."""
    named = {"id": user_id, "email_name": email_name(values["email_key"]), **values}
    return bool(await _INSERT.fetch(connection, named))


async def is_taken(connection: AsyncConnection, by: ColumnElement[bool], user_id: str) -> bool:
    """Whether somebody other than `user_id` is selected by `by`."""
    statement = select(users.c.id).where(by, users.c.id != user_id)
    return (await connection.execute(statement)).first() is not None


async def update_user(connection: AsyncConnection, user_id: str, values: dict[str, Any]) -> None:
    """Set columns of a locked user."""
    await connection.execute(update(users).where(users.c.id == user_id).values(**values))


async def erase_user(connection: AsyncConnection, user_id: str) -> None:
    """Leave of a locked user only that the id existed."""
    await connection.execute(
        update(users)
        .where(users.c.id == user_id)
        .values(deleted_at=func.clock_timestamp(), **dict.fromkeys(_PERSONAL))
    )
