"""What a user wants to get, when and where: preferences as they are shown, kept and changed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ._base import Request, Response, freeze
from .fields import CategoryName, Instant, TimeOfDay, ZoneName

MAX_CATEGORIES = 100


class Channels(Response, frozen=True, gc=False, omit_defaults=True):
    """The effective switches of one category.

    `required` names the channels whose switch is on and cannot be switched off; it is left out
    where there are none.
    """

    email: bool
    push: bool
    required: tuple[str, ...] = ()


class Preferences(Response, frozen=True, omit_defaults=True):
    """A user's preferences, as shown in the document.

    `effective_timezone` is `timezone`, or the service's default where that is null or unknown.
    `catalogued` says that the service has a catalogue of categories: then `categories` are all
    there are. Without one it is left out, other names are free, and what is not said is on.
    """

    email: bool
    push: bool
    quiet_hours_start: str | None
    quiet_hours_end: str | None
    timezone: str | None
    effective_timezone: str
    muted_until: datetime | None
    categories: Mapping[str, Channels]
    catalogued: bool = False

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "categories", freeze(self.categories))


class Choices(Response, frozen=True):
    """What the user has said, as kept: only the category switches that were named.

    `Preferences` is derived from it and from the service's settings.
    """

    email: bool = True
    push: bool = True
    quiet_hours_start: str | None = None
    quiet_hours_end: str | None = None
    timezone: str | None = None
    muted_until: datetime | None = None
    categories: Mapping[str, Mapping[str, bool]] = {}

    def __post_init__(self) -> None:
        frozen = freeze({name: freeze(said) for name, said in self.categories.items()})
        msgspec.structs.force_setattr(self, "categories", frozen)


class CategoryUpdate(Request, frozen=True):
    """A change of one category: an omitted channel keeps its switch, null forgets it."""

    email: bool | None | UnsetType = UNSET
    push: bool | None | UnsetType = UNSET


class Consent(Request, frozen=True):
    """Where a change of preferences comes from, kept in the history as proof."""

    source: Annotated[
        str, Meta(min_length=1, max_length=128, description="Such as `settings_page`.")
    ]
    policy_version: (
        Annotated[str, Meta(min_length=1, max_length=128, description="Such as `2026-05`.")] | None
    ) = None


class PreferencesUpdate(Request, frozen=True):
    """A change of preferences. What is omitted keeps its value, null clears what can be cleared."""

    email: bool | UnsetType = UNSET
    push: bool | UnsetType = UNSET
    quiet_hours_start: TimeOfDay | None | UnsetType = UNSET
    quiet_hours_end: TimeOfDay | None | UnsetType = UNSET
    timezone: ZoneName | None | UnsetType = UNSET
    muted_until: Instant | None | UnsetType = UNSET
    categories: dict[CategoryName, CategoryUpdate | None] | None | UnsetType = UNSET
    consent: Consent | UnsetType = UNSET


class PreferenceChange(Response, frozen=True):
    """One preference that was changed; `field` is a path such as `categories.marketing.email`."""

    field: str
    before: bool | str | None
    after: bool | str | None


class PreferencesRevision(Response, frozen=True):
    """An entry of the consent history: who changed what, when, and through which source."""

    version: int
    at: datetime
    actor: str | None
    source: str | None
    policy_version: str | None
    changes: tuple[PreferenceChange, ...]
