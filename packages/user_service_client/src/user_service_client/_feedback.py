"""`client.feedback`: what the providers said of tokens and addresses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Unpack

import msgspec
from user_service_schemas import (
    Envelope,
    FeedbackItem,
    FeedbackResult,
    ReportFeedback,
    from_apns,
    from_fcm,
    from_ses,
    from_smtp,
    from_webpush,
)

from user_service_client._calls import Call, Calls, CreateOptions, batches

MAX_KEY = 255
"""Characters of an idempotency key."""

_RESULTS = msgspec.json.Decoder(Envelope[tuple[FeedbackResult, ...]])


class Feedback:
    """Reports, and how a provider's answer becomes one.

    `from_fcm`, `from_apns`, `from_webpush`, `from_ses` and `from_smtp` return what is to be
    reported, or nothing where neither the token nor the address is to blame.
    """

    from_apns = staticmethod(from_apns)
    from_fcm = staticmethod(from_fcm)
    from_ses = staticmethod(from_ses)
    from_smtp = staticmethod(from_smtp)
    from_webpush = staticmethod(from_webpush)

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def report(
        self, items: Iterable[FeedbackItem], **options: Unpack[CreateOptions]
    ) -> tuple[FeedbackResult, ...]:
        """Report what providers said, and return what each report did, in their order.

        Reporting twice changes nothing. More than 1000 are reported in several requests, one after
        the other; `timeout` is the deadline of each.

        Raises:
            RateLimited: so many devices would be switched off that something must be wrong; ask
                whoever runs the service.
        """
        key = options.get("idempotency_key")
        results: list[FeedbackResult] = []
        for number, some in enumerate(batches(list(items))):
            if key is not None and number:  # each request is a write of its own
                options["idempotency_key"] = _key_of_part(key, number)
            body = ReportFeedback(items=some)
            call = Call(
                "feedback.report", "POST", "/api/v1/feedback", body=body, is_write=True, **options
            )
            answered = (await self._calls.send(call)).data(_RESULTS)
            results.extend(answered)
        return tuple(results)


def _key_of_part(key: str, number: int) -> str:
    """Return the key of a further request: always the same one, and no longer than one may be."""
    made = f"{key}.{number}"
    if len(made) <= MAX_KEY:
        return made
    return f"{hashlib.sha256(key.encode()).hexdigest()}.{number}"
