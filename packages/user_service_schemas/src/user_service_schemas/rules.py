"""The pure rules that server and client share: no clock, no I/O.

What makes two emails one address and two tokens one device, how a change of preferences merges,
and what the merged result shows.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime

import idna
import msgspec
from msgspec import UNSET

from .catalogue import Catalogue
from .envelope import FieldError
from .errors import RuleViolation
from .fields import CHANNELS
from .preferences import (
    MAX_CATEGORIES,
    Channels,
    Choices,
    PreferenceChange,
    Preferences,
    PreferencesUpdate,
)
from .zones import time_zones


def canonical_email(email: str) -> str:
    """Return the form in which two spellings of one address are equal.

    `NFC(local part).lower() + "@" + ASCII domain` (api.md, section 4): `lower`, not `casefold`,
    and NFC, not NFKC, since those would make different people one (`faß@` and `fass@`).
    The domain becomes A-labels (RFC 5891, with the mapping of UTS 46).

    >>> canonical_email("John@EXAMPLE.com")
    'john@example.com'

    Raises:
        ValueError: the domain cannot be a domain.
    """
    local, _, domain = email.rpartition("@")
    if not local or not domain:
        raise ValueError("an email address has the form local@domain")
    ascii_domain = idna.encode(domain, uts46=True).decode().lower()
    return f"{unicodedata.normalize('NFC', local).lower()}@{ascii_domain}"


class _Subscription(msgspec.Struct):
    """A web-push subscription, of which only the endpoint names the device (W3C Push API)."""

    endpoint: str


def token_digest(token: str) -> bytes:
    """Return the 32 bytes (SHA-256) by which a token has one owner.

    Of a web-push subscription, which is JSON, the `endpoint` is digested: its keys may be renewed
    while the device stays the same.
    """
    named = token
    if token.startswith("{"):
        # What is not a subscription is a token as it stands.
        with suppress(msgspec.MsgspecError, RecursionError):
            named = msgspec.json.decode(token, type=_Subscription).endpoint
    return hashlib.sha256(named.encode()).digest()


def merge_preferences(
    current: Choices, update: PreferencesUpdate, catalogue: Catalogue | None = None
) -> Choices:
    """Return what `current` becomes by `update`: a forgotten field never opts anybody back in.

    Merges per field and, inside `categories`, per category and channel. Null clears. What was said
    of a category before the catalogue dropped it is kept, and can be forgotten, not changed.

    Raises:
        RuleViolation: the merged result breaks a rule across fields, the zone is unknown, or the
            update names a category that is not in the catalogue or switches off a required one.
    """
    said = {
        name: value
        for name in ("email", "push", "quiet_hours_start", "quiet_hours_end", "timezone")
        if (value := getattr(update, name)) is not UNSET
    }
    refused = tuple(_refused_instants(update))
    if update.muted_until is not UNSET and not refused:
        said["muted_until"] = update.muted_until and update.muted_until.astimezone(UTC)
    if update.categories is not UNSET:
        said["categories"] = _merge_categories(current.categories, update)
    merged = msgspec.structs.replace(current, **said)
    violations = (
        *refused,
        *_violations(merged, catalogue),
        *_refused_categories(current, update, catalogue),
    )
    if violations:
        raise RuleViolation(*violations)
    return merged


def _refused_instants(update: PreferencesUpdate) -> Iterator[FieldError]:
    """Drivers take the ends of the calendar for infinities."""
    if isinstance(update.muted_until, datetime) and not 1970 <= update.muted_until.year <= 9998:
        message = "Expected a time between the years 1970 and 9998."
        yield FieldError(field="muted_until", message=message)


def _merge_categories(
    current: Mapping[str, Mapping[str, bool]], update: PreferencesUpdate
) -> Mapping[str, Mapping[str, bool]]:
    if not isinstance(update.categories, dict):
        return {}
    merged = dict(current)
    for name, change in update.categories.items():
        switches = {} if change is None else dict(merged.get(name, {}))
        for channel in CHANNELS if change is not None else ():
            value = getattr(change, channel)
            if value is None:
                switches.pop(channel, None)
            elif value is not UNSET:
                switches[channel] = value
        if switches:
            merged[name] = switches
        else:
            merged.pop(name, None)
    return merged


def _refused_categories(
    current: Choices, update: PreferencesUpdate, catalogue: Catalogue | None
) -> Iterator[FieldError]:
    if catalogue is None or not isinstance(update.categories, dict):
        return
    for name, change in update.categories.items():
        if name not in catalogue.categories:
            if change is not None or name not in current.categories:
                yield FieldError(field=f"categories.{name}", message="This category is not known.")
            continue
        for channel in CHANNELS if change is not None else ():
            if getattr(change, channel) is False and catalogue.requires(name, channel):
                yield FieldError(
                    field=f"categories.{name}.{channel}",
                    message="This category is required: it cannot be switched off.",
                )


def _violations(choices: Choices, catalogue: Catalogue | None) -> Iterator[FieldError]:
    start, end = choices.quiet_hours_start, choices.quiet_hours_end
    if (start is None) != (end is None):
        missing = "quiet_hours_start" if start is None else "quiet_hours_end"
        yield FieldError(field=missing, message="Quiet hours need both ends, or neither.")
    elif start is not None and start == end:
        yield FieldError(
            field="quiet_hours_end", message="Quiet hours must end at another time than they start."
        )
    if choices.timezone is not None and choices.timezone not in time_zones():
        yield FieldError(field="timezone", message="This is not a known IANA time zone.")
    # A catalogue bounds itself. What it dropped must not stand in the way of what it has.
    if catalogue is None and len(choices.categories) > MAX_CATEGORIES:
        yield FieldError(
            field="categories", message=f"At most {MAX_CATEGORIES} categories can be kept."
        )


def effective_preferences(
    choices: Choices, default_timezone: str, catalogue: Catalogue | None = None
) -> Preferences:
    """Return what the document shows: what was said, and the default where nothing was.

    With a catalogue these are all of its categories and no other; without, they are sorted, so that
    the same choices are shown by the same bytes, wherever they were kept. A zone that the zone
    database no longer has is shown as it was said, and the default is what holds.
    """
    zone = choices.timezone
    return Preferences(
        email=choices.email,
        push=choices.push,
        quiet_hours_start=choices.quiet_hours_start,
        quiet_hours_end=choices.quiet_hours_end,
        timezone=zone,
        effective_timezone=zone if zone is not None and zone in time_zones() else default_timezone,
        muted_until=choices.muted_until,
        categories={
            name: Channels(email=said.get("email", True), push=said.get("push", True))
            for name, said in sorted(choices.categories.items())
        }
        if catalogue is None
        else {
            name: Channels(
                email=catalogue.is_on(name, "email", said.get("email")),
                push=catalogue.is_on(name, "push", said.get("push")),
                required=tuple(c for c in CHANNELS if catalogue.requires(name, c)),
            )
            for name in catalogue.categories
            for said in (choices.categories.get(name, {}),)
        },
        catalogued=catalogue is not None,
    )


def preference_changes(before: Choices | None, after: Choices) -> tuple[PreferenceChange, ...]:
    """Return the single preferences that differ, as the consent history keeps them.

    Before a registration there was nothing: with `before=None`, everything that is set is a change.
    """
    old = {} if before is None else _flat(before)
    new = _flat(after)
    return tuple(
        PreferenceChange(field=field, before=old.get(field), after=new.get(field))
        for field in dict.fromkeys((*new, *old))
        if old.get(field) != new.get(field)
    )


def _flat(choices: Choices) -> dict[str, bool | str | None]:
    until = choices.muted_until
    flat: dict[str, bool | str | None] = {
        "email": choices.email,
        "push": choices.push,
        "quiet_hours_start": choices.quiet_hours_start,
        "quiet_hours_end": choices.quiet_hours_end,
        "timezone": choices.timezone,
        "muted_until": until.isoformat().replace("+00:00", "Z") if until else None,
    }
    for name, said in choices.categories.items():
        flat.update({f"categories.{name}.{channel}": value for channel, value in said.items()})
    return flat
