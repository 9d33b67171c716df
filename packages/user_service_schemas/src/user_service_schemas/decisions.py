"""The decision: may a message go to a user now? A pure function of the document and an instant.

Server and client run this same code. What the server's settings have to do with it is in the
document: the effective switches, which of them are required, and whether there is a catalogue.
"""

from __future__ import annotations

import re
from datetime import datetime

from .catalogue import Catalogue
from .deliveries import Decision, DeliveryDevice, Reason, Verdict
from .envelope import FieldError
from .errors import RuleViolation
from .explanations import Question, explain_nobody, explain_user
from .fields import CATEGORY_PATTERN, CHANNELS, MAX_APP, Channel, Priority
from .preferences import Preferences
from .quiet_hours import in_utc, instant_of, muted_until, quiet_until, seconds_of, window_of
from .users import RULES, User
from .zones import UTC_ZONE, find_zone

_PRIORITIES = ("normal", "urgent", "critical")
_CATEGORY = re.compile(CATEGORY_PATTERN)

# Plain strings: of a StrEnum, `.value` costs what the rest of a rule does.
_ALLOW, _DEFER, _SUPPRESS = (v.value for v in Verdict)
_USER_NOT_FOUND = Reason.USER_NOT_FOUND.value
_EMAIL_UNDELIVERABLE = Reason.EMAIL_UNDELIVERABLE.value
_NO_ACTIVE_DEVICE = Reason.NO_ACTIVE_DEVICE.value
_CHANNEL_OPTED_OUT = Reason.CHANNEL_OPTED_OUT.value
_CATEGORY_OPTED_OUT = Reason.CATEGORY_OPTED_OUT.value
_MUTED = Reason.MUTED.value
_QUIET_HOURS = Reason.QUIET_HOURS.value
_ALLOWED = Reason.ALLOWED.value


class UnknownRules(ValueError):
    """A document was made for other delivery rules than these: ask the server to decide."""


def is_decidable(user: User) -> bool:
    """Whether `decide` judges this document as the service does that made it.

    It does not if that has other rules, or if the user's quiet hours are in a zone that the zone
    database here does not have (yet): then ask the service.
    """
    preferences = user.preferences
    return user.rules == RULES and (
        preferences.quiet_hours_start is None
        or find_zone(preferences.effective_timezone) is not None
    )


def check_delivery(
    channel: str, category: str | None, priority: str, catalogue: Catalogue | None
) -> None:
    """Refuse what a sender must not ask for, before any recipient is looked at.

    `critical` passes over what users want, so a catalogue allows it for its `required` categories
    alone, on the channels on which they are required, and not without a category.

    Raises:
        RuleViolation: `details` names `channel`, `category` or `priority`.
    """
    _check_words(channel, priority)
    known = category is not None and catalogue is not None and category in catalogue.categories
    if category is not None and not known:
        _check_free_category(category, catalogued=catalogue is not None)
    if priority == "critical" and catalogue is not None:
        _check_critical(
            required=known and category is not None and catalogue.requires(category, channel)
        )


def decide(
    user: User | None,
    channel: Channel,
    at: datetime,
    *,
    category: str | None = None,
    priority: Priority = "normal",
    app: str | None = None,
    explain: bool = False,
    user_id: str = "",
) -> Decision:
    """Decide whether a message may go to a user at an instant.

    The rules are those of api.md, section 6; the first that holds decides. A deferral is to the
    first instant at or after `at` at which the user is neither muted nor in quiet hours, in UTC.

    Args:
        user: The document, or None where there is no such user; then give the `user_id`.
        channel: `email` or `push`.
        at: An aware datetime.
        category: The kind of message, as the user's preferences name it.
        priority: `urgent` passes over muting and quiet hours, `critical` over opt-outs too.
        app: For push: only that app's devices count.
        explain: Whether to tell of each rule what it says.

    Raises:
        RuleViolation: the sender's mistake, by its field: a channel or priority that there is not,
            an `at` without an offset, an `app` that is no name, a category that is not in the
            catalogue, or `critical` where that is refused (see `check_delivery`).
        UnknownRules: the document is of a service with other rules; see `is_decidable`.
    """
    if channel not in CHANNELS or priority not in _PRIORITIES:
        _check_words(channel, priority)
    if at.tzinfo is None:
        raise _violation("at", "Expected a time with its offset.")
    if app is not None and not 1 <= len(app) <= MAX_APP:
        raise _violation("app", f"Expected 1 to {MAX_APP} characters.")
    if user is None:
        if category is not None:  # in no catalogue, as far as is known without a document
            _check_free_category(category, catalogued=False)
        return Decision(
            user_id=user_id,
            decision=_SUPPRESS,
            reason=_USER_NOT_FOUND,
            deferred_until=None,
            email=None,
            devices=(),
            version=None,
            explanation=explain_nobody(channel) if explain else (),
        )
    if user.rules != RULES:
        raise UnknownRules(f"the document is of rules {user.rules}, and these are {RULES}")

    preferences = user.preferences
    switches = None
    required = False
    if category is not None:
        switches = preferences.categories.get(category)
        if switches is None:
            _check_free_category(category, catalogued=preferences.catalogued)
        else:
            required = channel in switches.required
    if priority == "critical" and preferences.catalogued:
        _check_critical(required=required)

    # Loops, not comprehensions: before Python 3.12 each of those costs as much as three rules.
    devices: list[DeliveryDevice] = []
    if channel == "push":
        for d in user.devices:
            if d.active and (app is None or d.app == app):
                device = DeliveryDevice(id=d.id, token=d.token, platform=d.platform, app=d.app)
                devices.append(device)
        is_reachable, unreachable = bool(devices), _NO_ACTIVE_DEVICE
        is_on = preferences.push
        category_is_on = switches is None or switches.push
    else:
        is_reachable, unreachable = user.email_deliverable, _EMAIL_UNDELIVERABLE
        is_on = preferences.email
        category_is_on = switches is None or switches.email

    verdict, reason, until = _ALLOW, _ALLOWED, None
    if not is_reachable:
        verdict, reason = _SUPPRESS, unreachable
    elif not is_on and priority != "critical" and not required:
        verdict, reason = _SUPPRESS, _CHANNEL_OPTED_OUT
    elif not category_is_on and priority != "critical" and not required:
        verdict, reason = _SUPPRESS, _CATEGORY_OPTED_OUT
    elif priority == "normal" and (
        preferences.muted_until is not None or preferences.quiet_hours_start is not None
    ):
        muted, until = _held(preferences, at)
        if until is not None:
            verdict, reason = _DEFER, _MUTED if muted else _QUIET_HOURS

    is_allowed = verdict == _ALLOW
    return Decision(
        user_id=user.id,
        decision=verdict,
        reason=reason,
        deferred_until=until,
        email=user.email if is_allowed and channel == "email" else None,
        devices=tuple(devices) if is_allowed else (),
        version=user.version,
        explanation=explain_user(
            user, Question(channel, at, category, priority, app, required), verdict, reason, until
        )
        if explain
        else (),
    )


def _held(preferences: Preferences, at: datetime) -> tuple[bool, datetime | None]:
    """Return whether a user is muted, and until when muting and quiet hours hold a message."""
    muted = muted_until(preferences.muted_until, at)
    window = window_of(preferences.quiet_hours_start, preferences.quiet_hours_end)
    until = None
    if window is not None:
        zone = find_zone(preferences.effective_timezone) or UTC_ZONE
        until = quiet_until(window, zone, seconds_of(at if muted is None else muted))
    if until is not None:
        return muted is not None, instant_of(until)
    return (False, None) if muted is None else (True, in_utc(muted))


def _check_words(channel: str, priority: str) -> None:
    if channel not in CHANNELS:
        raise _violation("channel", f"Expected one of {', '.join(CHANNELS)}.")
    if priority not in _PRIORITIES:
        raise _violation("priority", f"Expected one of {', '.join(_PRIORITIES)}.")


def _check_free_category(category: str, *, catalogued: bool) -> None:
    if catalogued:
        raise _violation("category", "This category is not known.")
    if not _CATEGORY.fullmatch(category):
        raise _violation(
            "category", "Expected a category name of 1 to 64 characters out of a-z, 0-9, _ . -"
        )


def _check_critical(*, required: bool) -> None:
    if not required:
        raise _violation(
            "priority", "Critical is for categories that are required on this channel alone."
        )


def _violation(field: str, message: str) -> RuleViolation:
    return RuleViolation(FieldError(field=field, message=message))
