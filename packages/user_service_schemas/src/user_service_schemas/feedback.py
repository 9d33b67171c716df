"""What senders report of what the providers said (api.md, section 5)."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from ._base import Request, Response
from .fields import Email, Instant, Token

MAX_FEEDBACK = 1000


class PushFeedback(Request, tag_field="channel", tag="push", frozen=True):
    """A push gateway's word on a token."""

    token: Token
    reason: Literal["unregistered", "expired", "rejected"]
    at: Instant


class EmailFeedback(Request, tag_field="channel", tag="email", frozen=True):
    """A mail provider's word on an address."""

    address: Email
    reason: Literal["hard_bounce", "soft_bounce", "complaint"]
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
