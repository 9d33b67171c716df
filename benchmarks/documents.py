"""Owns the users that are read: of the size and the parts of real ones, and always the same."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from uuid import UUID

import msgspec
from user_service_schemas import Channels, Device, Envelope, Preferences, User

EPOCH = "9f3c21d07a5be846"
FORMAT = "1a2b3c4d"
DOCUMENT_TAG = f"{EPOCH}.{FORMAT}"
"""What a batch says in `X-Document-Tag`."""

WARM = 1000
"""Users that are read again and again; those from here on are read, or changed, now and then."""

_AT = datetime(2026, 3, 14, 15, 9, 26, 535897, UTC)


def user_id(number: int) -> str:
    """Return the id of a user."""
    return str(UUID(int=0x01A205C7_A743_7A16_A135_000000000000 + number * 0x9E3779B1 % 2**48))


def user(number: int) -> User:
    """Return a user with two categories and a device."""
    return User(
        id=user_id(number),
        external_id=f"customer-{number}",
        name=f"Maximiliane Mustermann {number}",
        email=f"maximiliane.{number}@example.com",
        phone=f"+4930{number:08}",
        locale="de-DE",
        email_deliverable=True,
        preferences=Preferences(
            email=True,
            push=True,
            quiet_hours_start="22:00",
            quiet_hours_end="07:00",
            timezone="Europe/Berlin",
            effective_timezone="Europe/Berlin",
            muted_until=None,
            categories={
                "marketing": Channels(email=False, push=True),
                "security": Channels(email=True, push=True),
            },
        ),
        devices=(
            Device(
                id=user_id(number + 1_000_000),
                token=f"{number:08x}" * 20,
                platform="android",
                app="shop",
                active=True,
                registered_at=_AT,
            ),
        ),
        version=7,
        rules=1,
        created_at=_AT,
        updated_at=_AT,
    )


ETAG = f'"{DOCUMENT_TAG}.7"'
"""The ETag of each of them."""


def success(data: bytes) -> bytes:
    """Return the body of an answer."""
    envelope = Envelope(success=True, data=msgspec.Raw(data), message="Done", error=None)
    return msgspec.json.encode(envelope)


def encoded(number: int) -> bytes:
    """Return the JSON of a user."""
    return msgspec.json.encode(user(number))


def batch(users: Iterable[bytes]) -> bytes:
    """Return the body of the answer to a batch."""
    return success(b'{"users":[%b],"missing":[]}' % b",".join(users))
