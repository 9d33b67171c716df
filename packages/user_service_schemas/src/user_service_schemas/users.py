"""The user: the one document that everything hangs on, and the requests that change it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from ._base import Request, Response
from .devices import Device
from .fields import Email, ExternalId, Locale, Name, Password, Phone, UserId
from .preferences import Preferences, PreferencesUpdate

MAX_BATCH = 1000

RULES = 1
"""The generation of the delivery rules that this package knows (api.md, section 6)."""


class User(Response, frozen=True):
    """A user: profile, preferences and active devices, under one `version`.

    `devices` are the active ones, newest registration first. Every committed change of any part
    raises `version` by one; of two copies the one with the higher version is the newer.
    """

    id: str
    external_id: str | None
    name: str
    email: str
    phone: str | None
    locale: str | None
    email_deliverable: bool
    preferences: Preferences
    devices: tuple[Device, ...]
    version: int
    rules: int
    created_at: datetime
    updated_at: datetime


class CreateUser(Request, frozen=True):
    """Register a user. Preferences that are not named are: email and push on, no quiet hours."""

    name: Name
    email: Email
    password: Password | None = None
    phone: Phone | None = None
    external_id: ExternalId | None = None
    locale: Locale | None = None
    preferences: PreferencesUpdate = PreferencesUpdate()


class UserUpdate(Request, frozen=True):
    """Change a profile. What is omitted keeps its value, null clears what can be cleared."""

    name: Name | UnsetType = UNSET
    email: Email | UnsetType = UNSET
    phone: Phone | None | UnsetType = UNSET
    external_id: ExternalId | None | UnsetType = UNSET
    locale: Locale | None | UnsetType = UNSET


class PasswordUpdate(Request, frozen=True):
    """Set a new password; with `current_password`, only if that is the current one."""

    password: Password
    current_password: Annotated[str, Meta(max_length=1024)] | None = None


class LookupUsers(Request, frozen=True):
    """Find users by exactly one of these. They travel in the body: a URL ends up in logs."""

    email: Email | UnsetType = UNSET
    phone: Phone | UnsetType = UNSET
    external_id: ExternalId | UnsetType = UNSET

    def __post_init__(self) -> None:
        if sum(value is not UNSET for value in (self.email, self.phone, self.external_id)) != 1:
            raise ValueError("Exactly one of email, phone and external_id is expected")


class FoundUsers(Response, frozen=True):
    """The answer to a lookup: nobody, one user, or several that share a telephone number."""

    users: tuple[User, ...]


class BatchUsers(Request, frozen=True):
    """Read many users at once."""

    ids: Annotated[
        list[UserId],
        Meta(max_length=MAX_BATCH, extra={"expected": f"at most {MAX_BATCH} ids"}),
    ]


class BatchOfUsers(Response, frozen=True):
    """The answer to a batch: the users in the order they were asked for, once each."""

    users: tuple[User, ...]
    missing: tuple[str, ...]
