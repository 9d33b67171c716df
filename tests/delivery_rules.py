"""Owns the table of a delivery's rules: what each answers, by who asks how and of whom.

It is gone through three ways: by the function, by the endpoint, and by the client.
"""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Any

import pytest
from user_service_schemas import Catalogue

NIGHT = datetime(2026, 1, 1, 23, 0, tzinfo=UTC)
MUTED_UNTIL = datetime(2026, 1, 3, 12, 0, tzinfo=UTC)
MORNING = datetime(2026, 1, 2, 7, 0, tzinfo=UTC)

CATALOGUES: dict[str, Catalogue | None] = {
    "none": None,
    "optional": Catalogue.parse('{"news": {"email": "on", "push": "on"}}'),
    "required": Catalogue.parse('{"news": {"email": "required", "push": "required"}}'),
}
CHANNEL_OFF = {"email": False, "push": False}
CATEGORY_OFF = {"categories": {"news": {"email": False, "push": False}}}
MUTED = {"muted_until": MUTED_UNTIL}
QUIET: dict[str, Any] = {"quiet_hours_start": "22:00", "quiet_hours_end": "07:00"}

STATES: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "channel off": CHANNEL_OFF,
    "category off": CATEGORY_OFF,
    "channel and category off": CHANNEL_OFF | CATEGORY_OFF,
    "muted": MUTED,
    "quiet hours": QUIET,
    "muted in quiet hours": MUTED | QUIET,
    "channel off, muted, quiet hours": CHANNEL_OFF | MUTED | QUIET,
    "category off, quiet hours": CATEGORY_OFF | QUIET,
    "unreachable": {},
    "unreachable, everything off and muted": CHANNEL_OFF | CATEGORY_OFF | MUTED | QUIET,
    "unknown": {},
}

# unreachable: email_undeliverable or no_active_device. refused: a mistake of the sender.
TABLE = """
nothing said                    | none     | allowed            | allowed            | allowed
nothing said                    | optional | allowed            | allowed            | refused
nothing said                    | required | allowed            | allowed            | allowed
channel off                     | none     | channel_opted_out  | channel_opted_out  | allowed
channel off                     | optional | channel_opted_out  | channel_opted_out  | refused
channel off                     | required | allowed            | allowed            | allowed
category off                    | none     | category_opted_out | category_opted_out | allowed
category off                    | optional | category_opted_out | category_opted_out | refused
category off                    | required | allowed            | allowed            | allowed
channel and category off        | none     | channel_opted_out  | channel_opted_out  | allowed
channel and category off        | optional | channel_opted_out  | channel_opted_out  | refused
channel and category off        | required | allowed            | allowed            | allowed
muted                           | none     | muted              | allowed            | allowed
muted                           | optional | muted              | allowed            | refused
muted                           | required | muted              | allowed            | allowed
quiet hours                     | none     | quiet_hours        | allowed            | allowed
quiet hours                     | optional | quiet_hours        | allowed            | refused
quiet hours                     | required | quiet_hours        | allowed            | allowed
muted in quiet hours            | none     | muted              | allowed            | allowed
muted in quiet hours            | optional | muted              | allowed            | refused
muted in quiet hours            | required | muted              | allowed            | allowed
channel off, muted, quiet hours | none     | channel_opted_out  | channel_opted_out  | allowed
channel off, muted, quiet hours | optional | channel_opted_out  | channel_opted_out  | refused
channel off, muted, quiet hours | required | muted              | allowed            | allowed
category off, quiet hours       | none     | category_opted_out | category_opted_out | allowed
category off, quiet hours       | optional | category_opted_out | category_opted_out | refused
category off, quiet hours       | required | quiet_hours        | allowed            | allowed
unreachable                     | none     | unreachable        | unreachable        | unreachable
unreachable                     | optional | unreachable        | unreachable        | refused
unreachable                     | required | unreachable        | unreachable        | unreachable
unreachable, everything off and muted | none     | unreachable  | unreachable        | unreachable
unreachable, everything off and muted | optional | unreachable  | unreachable        | refused
unreachable, everything off and muted | required | unreachable  | unreachable        | unreachable
unknown                         | none     | user_not_found     | user_not_found   | user_not_found
unknown                         | optional | user_not_found     | user_not_found     | refused
unknown                         | required | user_not_found     | user_not_found   | user_not_found
"""
VERDICTS = {"allowed": "allow", "muted": "defer", "quiet_hours": "defer"}
UNTIL = {"muted": MUTED_UNTIL, "quiet_hours": MORNING}
UNREACHABLE = {"email": "email_undeliverable", "push": "no_active_device"}


def table() -> list[Any]:
    """Return channel, state, catalogue, priority and reason of every case."""
    params = []
    for line in TABLE.strip().splitlines():
        state, catalogue, *reasons = (cell.strip() for cell in line.split("|"))
        priorities = zip(("normal", "urgent", "critical"), reasons, strict=True)
        for (priority, reason), channel in itertools.product(priorities, ("email", "push")):
            name = f"{channel}, {state}, catalogue {catalogue}, {priority}"
            params.append(pytest.param(channel, state, catalogue, priority, reason, id=name))
    return params


def reason_on(channel: str, reason: str) -> str:
    """Return the reason that a cell of the table means on a channel."""
    return UNREACHABLE[channel] if reason == "unreachable" else reason
