"""A decision in words: what each rule says of a user, for a support person.

It looks at what `decisions.decide` looks at. No address and no token is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import NamedTuple

from .deliveries import Explanation, Reason, Verdict
from .preferences import Preferences
from .quiet_hours import EPOCH, instant_of, muted_until, quiet_until, seconds_of, window_of
from .users import User
from .zones import UTC_ZONE, Zone, find_zone

_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Question(NamedTuple):
    """What was asked; `required` is whether the category is, on this channel."""

    channel: str
    at: datetime
    category: str | None
    priority: str
    app: str | None
    required: bool


class _Said(NamedTuple):
    """What a rule says: whether it holds, and if something passes it over, what does."""

    rule: Reason
    holds: bool
    why: str
    over: str = ""


def explain_nobody(channel: str) -> tuple[Explanation, ...]:
    """Explain the decision about a user who does not exist."""
    unreachable = Reason.NO_ACTIVE_DEVICE if channel == "push" else Reason.EMAIL_UNDELIVERABLE
    opted_out = (Reason.CHANNEL_OPTED_OUT, Reason.CATEGORY_OPTED_OUT)
    unknown = (unreachable, *opted_out, Reason.MUTED, Reason.QUIET_HOURS)
    return (
        Explanation(
            rule=Reason.USER_NOT_FOUND.value,
            verdict=Verdict.SUPPRESS.value,
            why="There is no user with this id.",
        ),
        *(
            Explanation(rule=rule.value, verdict="unknown", why="There is no user to judge.")
            for rule in unknown
        ),
        Explanation(rule=Reason.ALLOWED.value, verdict="no", why="There is nobody to deliver to."),
    )


def explain_user(
    user: User, question: Question, verdict: str, reason: str, until: datetime | None
) -> tuple[Explanation, ...]:
    """Explain a decision: `verdict`, by the rule `reason`, deferred `until`."""
    return tuple(
        Explanation(
            rule=said.rule.value,
            verdict=verdict if said.rule == reason else _verdict(said),
            why=f"{said.why} {said.over}" if said.holds and said.over else said.why,
        )
        for said in _rules(user, question, until)
    )


def _verdict(said: _Said) -> str:
    if not said.holds:
        return "no"
    return "passed_over" if said.over else "holds"


def _rules(user: User, question: Question, until: datetime | None) -> Iterator[_Said]:
    yield _Said(
        Reason.USER_NOT_FOUND, False, f"The user exists; their document is version {user.version}."
    )
    yield _reach(user, question)
    yield _channel(user.preferences, question)
    yield _category(user.preferences, question)
    clock = _Clock(user.preferences)
    yield _muting(user.preferences, question, clock, until)
    yield _quiet_hours(user.preferences, question, clock)
    yield _Said(Reason.ALLOWED, False, "A message is allowed where none of these rules decides.")


def _reach(user: User, question: Question) -> _Said:
    if question.channel == "email":
        why = (
            "Mail can be delivered to the user's address."
            if user.email_deliverable
            else "The user's address is suppressed: a mail provider said that it takes no mail."
        )
        return _Said(Reason.EMAIL_UNDELIVERABLE, not user.email_deliverable, why)
    app = question.app
    active = [device for device in user.devices if device.active]
    count = sum(app is None or device.app == app for device in active)
    why = f"The user has {count or 'no'} active device{'' if count == 1 else 's'}"
    if app is not None:
        why += f" of the app {app}, and {len(active) - count or 'none'} of others"
    return _Said(Reason.NO_ACTIVE_DEVICE, not count, f"{why}.")


def _channel(preferences: Preferences, question: Question) -> _Said:
    is_on = preferences.push if question.channel == "push" else preferences.email
    why = f"The user has {question.channel} as a whole switched {_state(is_on)}."
    return _Said(Reason.CHANNEL_OPTED_OUT, not is_on, why, _over_opt_outs(question))


def _category(preferences: Preferences, question: Question) -> _Said:
    category = question.category
    if category is None:
        return _Said(Reason.CATEGORY_OPTED_OUT, False, "The message has no category.")
    switches = preferences.categories.get(category)
    if switches is None:
        why = f"The user has said nothing about the category {category}: it is on."
        return _Said(Reason.CATEGORY_OPTED_OUT, False, why)
    is_on = switches.push if question.channel == "push" else switches.email
    why = f"The category {category} is switched {_state(is_on)} for {question.channel}."
    return _Said(Reason.CATEGORY_OPTED_OUT, not is_on, why, _over_opt_outs(question))


def _state(is_on: bool) -> str:
    return "on" if is_on else "off"


def _over_opt_outs(question: Question) -> str:
    if question.priority == "critical":
        return "Critical messages pass this over."
    if question.required:
        return f"Messages of the category {question.category} pass this over: it is required."
    return ""


def _over_times(question: Question) -> str:
    if question.priority == "normal":
        return ""
    return f"{question.priority.capitalize()} messages pass this over."


def _muting(
    preferences: Preferences, question: Question, clock: _Clock, until: datetime | None
) -> _Said:
    if preferences.muted_until is None:
        return _Said(Reason.MUTED, False, "The user has not muted messages.")
    muted = muted_until(preferences.muted_until, question.at)
    if muted is None:
        return _Said(Reason.MUTED, False, "The user had muted messages; that is over.")
    why = f"The user has muted messages until {clock.show(muted)} in {clock.zone_name}."
    if until is not None and until > muted:
        why += f" That is in their quiet hours, which then end on {clock.show(until)}."
    return _Said(Reason.MUTED, True, why, _over_times(question))


def _quiet_hours(preferences: Preferences, question: Question, clock: _Clock) -> _Said:
    start, end = preferences.quiet_hours_start, preferences.quiet_hours_end
    if start is None and end is None:
        return _Said(Reason.QUIET_HOURS, False, "The user has no quiet hours.")
    window = window_of(start, end)
    if window is None:
        why = f"Quiet hours from {start} to {end} are no quiet hours."
        return _Said(Reason.QUIET_HOURS, False, why)
    why = (
        f"{clock.doubt}Quiet hours are from {start} to {end} in {clock.zone_name}. "
        f"There it is {clock.show(question.at)},"
    )
    until = quiet_until(window, clock.zone, seconds_of(question.at))
    if until is None:
        return _Said(Reason.QUIET_HOURS, False, f"{why} which is outside of them.")
    why += f" which is inside of them. They end on {clock.show(instant_of(until))}."
    return _Said(Reason.QUIET_HOURS, True, why, _over_times(question))


class _Clock:
    """The wall clock of a user; `doubt` says what is to be known about the choice of its zone."""

    def __init__(self, preferences: Preferences) -> None:
        said, effective = preferences.timezone, preferences.effective_timezone
        self.zone_name = effective
        self.doubt = ""
        zone = find_zone(effective)
        if zone is None:
            self.doubt = f"The time zone {effective} is not known, so UTC is used instead. "
            self.zone_name = "UTC"
        elif said is None:
            self.doubt = f"The user has said no time zone, so the default, {effective}, is used. "
        elif said != effective:
            self.doubt = (
                f"The time zone {said} is not known, so the default, {effective}, is used instead. "
            )
        self.zone: Zone = zone or UTC_ZONE

    def show(self, instant: datetime) -> str:
        """Return what the clock shows, such as `Sunday 2026-03-29 03:00 (UTC+02:00)`."""
        seconds = seconds_of(instant)
        offset = self.zone.span(seconds).offset
        try:
            local = EPOCH + timedelta(seconds=seconds + offset)
        except OverflowError:
            return "an end of the calendar"
        shown = local.replace(tzinfo=None).isoformat(" ", "seconds" if local.second else "minutes")
        size = EPOCH + timedelta(seconds=abs(offset))
        hours = f"{size:%H:%M:%S}".removesuffix(":00")
        return f"{_WEEKDAYS[local.weekday()]} {shown} (UTC{'-' if offset < 0 else '+'}{hours})"
