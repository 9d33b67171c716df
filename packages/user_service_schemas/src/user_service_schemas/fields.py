"""The constrained types of single fields, shared by server, client and OpenAPI.

Each says in `extra["expected"]` what it wants in words, because a regular expression is no answer
to a person.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

UUID_PATTERN = "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"
CATEGORY_PATTERN = r"^[a-z0-9_.-]{1,64}$"

Channel: TypeAlias = Literal["email", "push"]
CHANNELS: tuple[Channel, ...] = ("email", "push")

UserId: TypeAlias = Annotated[
    str,
    Meta(
        pattern=UUID_PATTERN,
        description="A user's id, a UUID (RFC 9562, version 7).",
        extra={"expected": "a UUID"},
        extra_json_schema={"format": "uuid"},
    ),
]
Name: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=200, description="The name to address the user by.")
]
Email: TypeAlias = Annotated[
    str,
    Meta(
        min_length=3,
        max_length=254,
        pattern=r"^[^@\s\ufeff]+@[^@\s\ufeff]+$",  # in other dialects `\s` has U+FEFF, too
        description="An email address (RFC 5321, RFC 6531), shown as it was written.",
        extra={"expected": "an email address of at most 254 characters"},
        extra_json_schema={"format": "email"},
    ),
]
Phone: TypeAlias = Annotated[
    str,
    Meta(
        pattern=r"^\+[1-9][0-9]{1,14}$",
        description="A telephone number in E.164 form.",
        extra={"expected": "a telephone number in E.164 form, such as +48221234567"},
    ),
]
ExternalId: TypeAlias = Annotated[
    str,
    Meta(min_length=1, max_length=128, description="The id the user has in your own system."),
]
Locale: TypeAlias = Annotated[
    str,
    Meta(
        min_length=2,
        max_length=35,
        pattern=r"^[A-Za-z0-9]+(-[A-Za-z0-9]+)*$",
        description="A language tag (BCP 47), such as `pl-PL`.",
        extra={"expected": "a BCP 47 language tag, such as pl-PL"},
    ),
]
Password: TypeAlias = Annotated[
    str,
    Meta(
        min_length=8,
        max_length=128,
        description="A password; any characters, not trimmed.",
        extra={"expected": "a password of 8 to 128 characters"},
        extra_json_schema={"format": "password"},
    ),
]
TimeOfDay: TypeAlias = Annotated[
    str,
    Meta(
        pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$",
        description="A wall-clock time of the user's zone, `HH:MM`.",
        extra={"expected": "a time of day as HH:MM, 00:00 to 23:59"},
    ),
]
ZoneName: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=64,
        description="An IANA time zone, such as `Europe/Warsaw`.",
    ),
]
Instant: TypeAlias = Annotated[
    datetime,
    Meta(
        tz=True,
        description="An instant with its offset (RFC 3339).",
        extra={"expected": "a time with its offset (RFC 3339), such as 2026-01-02T03:04:05Z"},
    ),
]
CategoryName: TypeAlias = Annotated[
    str,
    Meta(
        pattern=CATEGORY_PATTERN,
        description="A kind of message, such as `marketing`.",
        extra={"expected": "a category name of 1 to 64 characters out of a-z, 0-9, _ . -"},
    ),
]
Token: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=4096,
        description="What the push gateway gave the device: an FCM or APNs token, or a web-push "
        "subscription as JSON.",
    ),
]
Priority: TypeAlias = Literal["normal", "urgent", "critical"]
Platform: TypeAlias = Literal["web", "ios", "android"]
MAX_APP = 128
AppName: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_APP,
        description="Tells several apps of one user apart, such as `com.example.app:sandbox`.",
    ),
]
AnyPlatform: TypeAlias = Annotated[
    str,
    Meta(
        description="`web`, `ios` or `android`; a newer server may know more.",
        extra_json_schema={"x-extensible-enum": ["web", "ios", "android"]},
    ),
]
