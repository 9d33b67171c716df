"""The document: how a user is read in one statement, encoded, and told from other copies."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import asyncpg
import msgspec
from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Text,
    any_,
    bindparam,
    cast,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY, UUID, aggregate_order_by
from sqlalchemy.ext.asyncio import AsyncConnection
from user_service_schemas import (
    RULES,
    Choices,
    Device,
    Preferences,
    User,
    effective_preferences,
)

from ..settings import Settings
from .direct import Direct, Fields
from .tables import change_feed, devices, preferences, service_state, users

T = TypeVar("T")

_ID = UUID(as_uuid=False)
_decode_devices = msgspec.json.Decoder(tuple[Device, ...]).decode
decode_user = msgspec.json.Decoder(User).decode
_encode = msgspec.json.Encoder().encode


def is_one_of(
    column: ColumnElement[T], values: Sequence[T] | BindParameter[Sequence[T]]
) -> ColumnElement[bool]:
    """Select by ids, or digests: one array, and so one statement however many they are.

    As the result of a subquery: of a parameter's array Postgres knows the length, and expects ten
    elsewhere. So it would plan the statement anew each time, which takes longer than to run it (of
    Postgres' CPU 250 µs for a document, and as it is 100).
    """
    of = ARRAY(column.type)
    array = values if isinstance(values, BindParameter) else cast(list(values), of)
    return column == any_(cast(select(array).scalar_subquery(), of))


class StoredDocument(msgspec.Struct, frozen=True, gc=False):
    """A document as it lies in the cache and goes to the socket: encoded, its version beside."""

    version: int
    body: bytes


class Document(msgspec.Struct, frozen=True):
    """A document that was just read, for those who need its parts."""

    user: User

    @property
    def version(self) -> int:
        """The user's version."""
        return self.user.version

    def stored(self) -> StoredDocument:
        """Return the encoded form."""
        return StoredDocument(version=self.user.version, body=_encode(self.user))


_active_devices = (
    select(
        func.coalesce(
            cast(
                func.json_agg(
                    aggregate_order_by(
                        func.json_build_object(
                            *(literal_column("'id'"), devices.c.id),
                            *(literal_column("'token'"), devices.c.token),
                            *(literal_column("'platform'"), devices.c.platform),
                            *(literal_column("'app'"), devices.c.app),
                            *(literal_column("'active'"), devices.c.active),
                            *(literal_column("'registered_at'"), devices.c.registered_at),
                        ),
                        devices.c.registered_at.desc(),
                        devices.c.id.desc(),
                    )
                ),
                Text,
            ),
            literal_column("'[]'"),
        )
    )
    .where(devices.c.user_id == users.c.id, devices.c.active)
    .scalar_subquery()
)

DOCUMENT = (
    select(
        users.c.id,
        users.c.external_id,
        users.c.name,
        users.c.email,
        users.c.phone,
        users.c.locale,
        users.c.email_deliverable,
        users.c.version,
        users.c.created_at,
        users.c.updated_at,
        preferences.c.email.label("wants_email"),
        preferences.c.push,
        preferences.c.quiet_hours_start,
        preferences.c.quiet_hours_end,
        preferences.c.timezone,
        preferences.c.muted_until,
        preferences.c.categories,
        _active_devices.label("devices"),
    )
    .join_from(users, preferences)
    .where(users.c.deleted_at.is_(None))
)
"""Reads documents, of which `DocumentShape.document` makes one of a row."""
_BY_ID = DOCUMENT.where(is_one_of(users.c.id, bindparam("ids", type_=ARRAY(_ID))))
_READ = Direct(_BY_ID)


class Snapshot(NamedTuple):
    """Documents, and the last position of the change feed and the epoch when they were like this.

    All of one statement: of a later one, a replica that goes on meanwhile would show too much.
    """

    documents: dict[str, Document]
    position: int
    epoch: str


_SNAPSHOT = Direct(
    _BY_ID.add_columns(
        select(change_feed.c.last_position).scalar_subquery().label("position"),
        select(service_state.c.epoch).scalar_subquery().label("epoch"),
    )
)


class DocumentShape:
    """The settings that shape a document, and `format`, the digest of shape and settings."""

    def __init__(self, settings: Settings) -> None:
        self._default_timezone = settings.default_timezone
        self._catalogue = settings.categories
        shape = _encode(
            [msgspec.json.schema(User), RULES, settings.default_timezone, settings.categories]
        )
        self.format = hashlib.sha256(shape).hexdigest()[:8]

    async def read(
        self, connection: AsyncConnection, *where: ColumnElement[bool], limit: int | None = None
    ) -> list[Document]:
        """Read the documents of the users that `where` selects, by ascending id."""
        statement = DOCUMENT.where(*where).order_by(users.c.id).limit(limit)
        found = await connection.execute(statement)
        return [self.document(row) for row in found.mappings()]

    async def read_by_id(
        self, connection: asyncpg.Connection, ids: Sequence[str]
    ) -> dict[str, Document]:
        """Read the documents of `ids`; who is not there is left out."""
        read = map(self.document, await _READ.fetch(connection, {"ids": ids}))
        return {document.user.id: document for document in read}

    async def read_snapshot(
        self, connection: asyncpg.Connection, ids: Sequence[str]
    ) -> Snapshot | None:
        """Read the documents of `ids`, and of when they are; None if nobody is there."""
        rows = await _SNAPSHOT.fetch(connection, {"ids": ids})
        if not rows:
            return None
        read = map(self.document, rows)
        found = {document.user.id: document for document in read}
        return Snapshot(found, rows[0]["position"], rows[0]["epoch"])

    def document(self, row: Fields) -> Document:
        """Return the document that was read in a row."""
        return Document(
            User(
                id=str(row["id"]),
                external_id=row["external_id"],
                name=row["name"],
                email=row["email"],
                phone=row["phone"],
                locale=row["locale"],
                email_deliverable=row["email_deliverable"],
                preferences=self.preferences(choices_in(row)),
                devices=_decode_devices(row["devices"]),
                version=row["version"],
                rules=RULES,
                created_at=row["created_at"],
                updated_at=row["updated_at"],
            )
        )

    def registered(
        self,
        user_id: str,
        columns: Mapping[str, Any],
        choices: Choices,
        *,
        email_deliverable: bool,
        at: datetime,
    ) -> Document:
        """Return the document that a user begins with, of the columns that were set."""
        return Document(
            User(
                id=user_id,
                external_id=columns.get("external_id"),
                name=columns["name"],
                email=columns["email"],
                phone=columns.get("phone"),
                locale=columns.get("locale"),
                email_deliverable=email_deliverable,
                preferences=self.preferences(choices),
                devices=(),
                version=1,
                rules=RULES,
                created_at=at,
                updated_at=at,
            )
        )

    def preferences(self, choices: Choices) -> Preferences:
        """Return the preferences that the document shows of what a user has said."""
        return effective_preferences(choices, self._default_timezone, self._catalogue)


def choices_in(row: Fields) -> Choices:
    """Return what the user has said, of a row with a document."""
    return Choices(
        email=row["wants_email"],
        push=row["push"],
        quiet_hours_start=row["quiet_hours_start"],
        quiet_hours_end=row["quiet_hours_end"],
        timezone=row["timezone"],
        muted_until=row["muted_until"],
        categories=row["categories"],
    )


_TAG = re.compile(r'(?:W/)?"([0-9a-f]+)\.([0-9a-f]+)\.([0-9]{1,18})"')


class EntityTags:
    """The tags of a request's `If-Match` or `If-None-Match` (RFC 9110, section 13.1).

    A tag is `"<epoch>.<format>.<version>"`. A `W/` before it is passed over: proxies that
    compress put it there, and it is the version that is compared, not the bytes.
    """

    def __init__(self, header: str) -> None:
        self._any = header.strip() == "*"
        self._tags = _TAG.findall(header)

    def name_version(self, epoch: str, version: int) -> bool:
        """Whether one of the tags is of this version, in whatever format (`If-Match`)."""
        return self._any or any(tag[0] == epoch and int(tag[2]) == version for tag in self._tags)

    def name_representation(self, etag: str) -> bool:
        """Whether one of the tags is of this very representation (`If-None-Match`)."""
        return self._any or any('"{}.{}.{}"'.format(*tag) == etag for tag in self._tags)
