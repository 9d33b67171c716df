"""The change feed: what was committed, in an order in which nothing is skipped."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from msgspec import Meta

from ._base import Response


class ChangeKind(StrEnum):
    """What was changed. `password.updated` is the one kind that raises no version."""

    USER_CREATED = "user.created"
    USER_UPDATED = "user.updated"
    USER_DELETED = "user.deleted"
    PREFERENCES_UPDATED = "preferences.updated"
    DEVICE_REGISTERED = "device.registered"
    DEVICE_UPDATED = "device.updated"
    DEVICE_REMOVED = "device.removed"
    DEVICE_MOVED = "device.moved"
    ADDRESS_SUPPRESSED = "address.suppressed"
    ADDRESS_RESTORED = "address.restored"
    PASSWORD_UPDATED = "password.updated"


class Change(Response, frozen=True):
    """One committed change of a user. No personal data travels in it.

    `position` is its place in the feed, and the cursor with which one goes on behind it. Of one
    user, versions never go back; a change may come twice, never not at all.
    """

    position: str
    user_id: str
    version: int
    kind: Annotated[
        str, Meta(extra_json_schema={"x-extensible-enum": [kind.value for kind in ChangeKind]})
    ]
    at: datetime
    actor: str | None


class Changes(Response, frozen=True):
    """A page of the feed; `next` is the cursor to go on with, also when there is nothing yet."""

    items: tuple[Change, ...]
    next: str


class Heartbeat(Response, frozen=True):
    """Says that a stream is alive, and up to which time the feed is complete.

    Both times are of the same clock: `now - through` is how far behind the feed is.
    """

    through: datetime
    now: datetime


class Reset(Response, frozen=True):
    """What a stream cannot be continued from, `epoch` or `age`: what is cached may be outdated."""

    reason: str
