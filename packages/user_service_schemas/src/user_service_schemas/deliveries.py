"""May I deliver now: what a sender asks, and the decision it gets (api.md, section 6)."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from msgspec import Meta

from ._base import Request, Response
from .fields import AnyPlatform, AppName, CategoryName, Channel, Instant, Priority, UserId

MAX_RECIPIENTS = 1000


class Verdict(StrEnum):
    """What a sender does with a message. A newer server may say one that is not here."""

    ALLOW = "allow"
    DEFER = "defer"
    SUPPRESS = "suppress"


class Reason(StrEnum):
    """The rule that decided, in the order in which they are tried."""

    USER_NOT_FOUND = "user_not_found"
    EMAIL_UNDELIVERABLE = "email_undeliverable"
    NO_ACTIVE_DEVICE = "no_active_device"
    CHANNEL_OPTED_OUT = "channel_opted_out"
    CATEGORY_OPTED_OUT = "category_opted_out"
    MUTED = "muted"
    QUIET_HOURS = "quiet_hours"
    ALLOWED = "allowed"


AnyReason = Annotated[
    str,
    Meta(extra_json_schema={"x-extensible-enum": [reason.value for reason in Reason]}),
]


class ResolveDeliveries(Request, frozen=True):
    """Ask for up to 1000 recipients whether a message may go to each of them.

    `at` is now where it is null. `app` is for push: only that app's devices count.
    """

    channel: Channel
    user_ids: Annotated[
        list[UserId],
        Meta(max_length=MAX_RECIPIENTS, extra={"expected": f"at most {MAX_RECIPIENTS} ids"}),
    ]
    category: CategoryName | None = None
    app: AppName | None = None
    priority: Priority = "normal"
    at: Instant | None = None
    explain: bool = False


class DeliveryDevice(Response, frozen=True, gc=False):
    """A device to push to."""

    id: str
    token: str
    platform: AnyPlatform
    app: str | None


class Explanation(Response, frozen=True, gc=False):
    """What one rule says, in words for a support person.

    `verdict` is the decision's where the rule decided; else `no` (it does not apply), `holds` (it
    would, had an earlier one not decided), `passed_over` (it does not count for this priority or
    category) or `unknown` (there is no user to judge).
    """

    rule: AnyReason
    verdict: Annotated[
        str,
        Meta(
            extra_json_schema={
                "x-extensible-enum": [*Verdict, "no", "holds", "passed_over", "unknown"]
            }
        ),
    ]
    why: str


class Decision(Response, frozen=True, gc=False, omit_defaults=True):
    """Whether a message may go to a user now.

    Where to is told with `allow` alone: the `email`, or the `devices`, newest first. Whoever
    defers asks again when the time has come, for by then the user may have opted out, and the token
    may be somebody else's. `version` is that of the document that was judged, null without one.
    """

    user_id: str
    decision: Annotated[
        str, Meta(extra_json_schema={"x-extensible-enum": [verdict.value for verdict in Verdict]})
    ]
    reason: AnyReason
    deferred_until: datetime | None
    email: str | None
    devices: tuple[DeliveryDevice, ...]
    version: int | None
    explanation: tuple[Explanation, ...] = ()
