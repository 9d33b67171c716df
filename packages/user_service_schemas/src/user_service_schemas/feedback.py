"""What senders report of what the providers said (api.md, section 5)."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from ._base import Request, Response
from .fields import Email, Instant, Token

MAX_FEEDBACK = 1000


PushReason: TypeAlias = Literal["unregistered", "expired", "mismatched", "rejected"]
EmailReason: TypeAlias = Literal["hard_bounce", "soft_bounce", "complaint"]

DEACTIVATING: frozenset[PushReason] = frozenset({"unregistered", "expired"})
"""The reasons that blame the token; the others are counted, and change nothing by default."""


class PushFeedback(Request, tag_field="channel", tag="push", frozen=True):
    """A push gateway's word on a token.

    `unregistered` and `expired` deactivate the device. `mismatched` blames the sender's set-up (a
    sandbox token sent to production, another project's or app's key), `rejected` the message.
    """

    token: Token
    reason: PushReason
    at: Instant


class EmailFeedback(Request, tag_field="channel", tag="email", frozen=True):
    """A mail provider's word on an address.

    A `hard_bounce` suppresses the address, a `complaint` is an opt-out of email; a `soft_bounce` is
    counted.
    """

    address: Email
    reason: EmailReason
    at: Instant


FeedbackItem: TypeAlias = PushFeedback | EmailFeedback


class ReportFeedback(Request, frozen=True):
    """Up to 1000 reports at once."""

    items: Annotated[
        list[FeedbackItem],
        Meta(max_length=MAX_FEEDBACK, extra={"expected": f"at most {MAX_FEEDBACK} items"}),
    ]


class FeedbackResult(Response, frozen=True):
    """What a report did: `applied`, `ignored` (seen since, or known already) or `unknown`."""

    result: str
