"""What routes read of a request besides its body: ids, conditions, cursors."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Annotated, TypeAlias

from litestar.params import QueryParameter
from litestar.types import HTTPScope
from user_service_schemas import FieldError

from ..errors import DeviceNotFound, Invalid, InvalidCursor, ServiceError, UserNotFound
from ..storage.document import EntityTags
from .answers import HTTPRequest

UUID_PATTERN = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_UUID = re.compile(UUID_PATTERN)
_VERSION = re.compile("[0-9]{1,18}")


Limit: TypeAlias = Annotated[int, QueryParameter(ge=1, le=200)]
"""How many items a page has."""
PageLimit: TypeAlias = Annotated[int, QueryParameter(ge=1, le=1000)]
"""How many items a page of small items has."""


def header(scope: HTTPScope, name: bytes) -> str | None:
    """Return a header of a request, the first one if it is there more than once.

    `name` is in small letters, as ASGI has them. The headers were made a dictionary once (see
    `observation`): to Litestar that costs 10 µs, and to look through them each time more than this.
    """
    headers: Mapping[bytes, bytes] = scope["state"]["headers"]
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")


def user_id_of(text: str) -> str:
    """Return a user's id as it is kept; raises `UserNotFound`: what is no UUID is nobody's id."""
    return _uuid(text, "user_id", UserNotFound)


def device_id_of(text: str) -> str:
    """Return a device's id as it is kept; raises `DeviceNotFound`."""
    return _uuid(text, "device_id", DeviceNotFound)


def _uuid(text: str, field: str, error: type[ServiceError]) -> str:
    lowered = text.lower()
    if not _UUID.fullmatch(lowered):
        raise error(FieldError(field=field, message="This is not a UUID."))
    return lowered


def if_match(request: HTTPRequest) -> EntityTags | None:
    """Return the tags that a write is conditional on."""
    said = header(request.scope, b"if-match")
    return None if said is None else EntityTags(said)


def min_version(scope: HTTPScope) -> int:
    """Return the version below which a cached copy is not believed (`X-Min-Version`).

    Raises:
        Invalid: it is not a number.
    """
    said = header(scope, b"x-min-version")
    if said is None:
        return 0
    if not _VERSION.fullmatch(said):
        raise Invalid(FieldError(field="X-Min-Version", message="Expected a version number."))
    return int(said)


def encode_cursor(listing: str, position: str) -> str:
    """Return the opaque cursor of a position in a listing."""
    return base64.urlsafe_b64encode(f"{listing}:{position}".encode()).decode().rstrip("=")


def decode_cursor(listing: str, cursor: str | None, pattern: str) -> str | None:
    """Return the position of a cursor that `encode_cursor` made; raises `InvalidCursor`."""
    if cursor is None:
        return None
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        name, _, position = base64.b64decode(padded, b"-_", validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        raise InvalidCursor from None
    if name != listing or not re.fullmatch(pattern, position):
        raise InvalidCursor
    return position
