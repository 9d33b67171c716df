"""The paths of the API, and what the client calls what is done there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from user_service_schemas import Scope

STREAM = "changes.stream"

_PATHS: Mapping[str, Mapping[str, str]] = {
    "/api/v1/users": {"GET": "users.list", "POST": "users.create"},
    "/api/v1/users/lookup": {"POST": "users.lookup"},
    "/api/v1/users/batch": {"POST": "users.get_many"},
    "/api/v1/users/{user}": {
        "GET": "users.get",
        "PATCH": "users.update",
        "PUT": "users.update",
        "DELETE": "users.delete",
    },
    "/api/v1/users/{user}/password": {"PUT": "users.set_password"},
    "/api/v1/users/{user}/preferences": {
        "GET": "preferences.get",
        "PATCH": "preferences.update",
        "PUT": "preferences.update",
    },
    "/api/v1/users/{user}/preferences/history": {"GET": "preferences.history"},
    "/api/v1/users/{user}/suppression": {"DELETE": "users.lift_suppression"},
    "/api/v1/users/{user}/devices": {"GET": "devices.list", "POST": "devices.register"},
    "/api/v1/users/{user}/devices/{device}": {
        "PATCH": "devices.update",
        "DELETE": "devices.remove",
    },
    "/api/v1/deliveries/resolve": {"POST": "deliveries.resolve"},
    "/api/v1/feedback": {"POST": "feedback.report"},
    "/api/v1/credentials/verify": {"POST": "credentials.verify"},
    "/api/v1/changes": {"GET": "changes.list"},
    "/api/v1/changes/stream": {"GET": STREAM},
    "/health": {"GET": "health"},
    "/health/live": {"GET": "health.live"},
    "/health/ready": {"GET": "health.ready"},
}
_PATTERNS = [
    (re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", path)), methods)
    for path, methods in _PATHS.items()
]

SCOPES: Mapping[str, Scope] = {
    "users.create": Scope.USERS_WRITE,
    "users.get": Scope.USERS_READ,
    "users.list": Scope.USERS_LIST,
    "users.lookup": Scope.USERS_READ,
    "users.get_many": Scope.USERS_READ,
    "users.update": Scope.USERS_WRITE,
    "users.delete": Scope.USERS_WRITE,
    "users.set_password": Scope.CREDENTIALS_WRITE,
    "users.lift_suppression": Scope.USERS_WRITE,
    "credentials.verify": Scope.CREDENTIALS_VERIFY,
    "preferences.get": Scope.USERS_READ,
    "preferences.update": Scope.PREFERENCES_WRITE,
    "preferences.history": Scope.USERS_READ,
    "devices.list": Scope.USERS_READ,
    "devices.register": Scope.DEVICES_WRITE,
    "devices.update": Scope.DEVICES_WRITE,
    "devices.remove": Scope.DEVICES_WRITE,
    "deliveries.resolve": Scope.USERS_READ,
    "feedback.report": Scope.FEEDBACK_WRITE,
    "changes.list": Scope.CHANGES_READ,
    STREAM: Scope.CHANGES_READ,
}
"""What a service key needs; the others need none."""

OPERATIONS = frozenset(name for methods in _PATHS.values() for name in methods.values())


class Match(NamedTuple):
    """What a path is for. `operation` is None where the path does not take the method."""

    operation: str | None
    allowed: frozenset[str]
    user_id: str
    device_id: str


def plain(path: str) -> str:
    """Return a path without the slashes that mean nothing."""
    return re.sub("/+", "/", path).rstrip("/") or "/"


def find_route(method: str, path: str) -> Match | None:
    """Return what a `plain` path is for; None: nothing is there."""
    asked = "GET" if method == "HEAD" else method
    for pattern, methods in _PATTERNS:
        if found := pattern.fullmatch(path):
            ids = found.groupdict()
            return Match(
                methods.get(asked),
                frozenset({*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])}),
                ids.get("user", ""),
                ids.get("device", ""),
            )
    return None
