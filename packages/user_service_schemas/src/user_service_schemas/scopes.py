"""What a service key may be allowed to do (api.md, section 3)."""

from __future__ import annotations

from enum import StrEnum


class Scope(StrEnum):
    """What a caller's service key needs for a route."""

    USERS_READ = "users:read"
    USERS_WRITE = "users:write"
    USERS_LIST = "users:list"
    """To read everybody, page by page."""
    PREFERENCES_WRITE = "preferences:write"
    DEVICES_WRITE = "devices:write"
    FEEDBACK_WRITE = "feedback:write"
    CREDENTIALS_WRITE = "credentials:write"
    """To set passwords."""
    CREDENTIALS_VERIFY = "credentials:verify"
    """To ask whether a password is right."""
    CHANGES_READ = "changes:read"
