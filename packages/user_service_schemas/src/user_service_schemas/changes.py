"""The kinds of committed changes that the change log tells of."""

from __future__ import annotations

from enum import StrEnum


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
