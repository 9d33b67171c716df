"""What providers answer, in our words: which answers blame the token or the address.

What blames neither (an outage, a limit, the message, a wrong credential) is no feedback: None.

| provider | answer | feedback |
|---|---|---|
| FCM | `UNREGISTERED` (404) | `unregistered` |
| FCM | `INVALID_ARGUMENT` (400) that blames the token | `unregistered` |
| FCM | `SENDER_ID_MISMATCH` (403) | `mismatched` |
| APNs | `Unregistered` (410), with the time at which it was so | `unregistered` |
| APNs | `ExpiredToken` (410), with the time, where it is told | `expired` |
| APNs | `BadDeviceToken` (400): malformed, or of the other environment | `mismatched` |
| APNs | `DeviceTokenNotForTopic` (400): another app's | `mismatched` |
| Web Push | 404: the subscription has expired | `expired` |
| Web Push | 410: the user has unsubscribed | `unregistered` |
| SES | bounce `Permanent` | `hard_bounce` |
| SES | bounce `Transient` or `Undetermined`, the message not blamed | `soft_bounce` |
| SES | complaint (not `not-spam`, `auth-failure` or `virus`) | `complaint` |
| SMTP | 5.1.1, 5.1.2, 5.1.3, 5.1.6, 5.1.10, 5.2.1 | `hard_bounce` |
| SMTP | 4.x.x but 4.7.x (a policy); 5.2.2 (the mailbox is full) | `soft_bounce` |
| SMTP | without an enhanced code: 550, 551, 553 | `hard_bounce` |
| SMTP | without an enhanced code: 450, 452, 552 | `soft_bounce` |

Sources:

- FCM: https://firebase.google.com/docs/reference/fcm/rest/v1/ErrorCode,
  https://firebase.google.com/docs/cloud-messaging/error-codes (forms of `INVALID_ARGUMENT`),
  https://firebase.google.com/docs/cloud-messaging/manage-tokens (which to delete)
- APNs:
  https://developer.apple.com/documentation/usernotifications/handling-notification-responses-from-apns,
  https://developer.apple.com/forums/thread/807380 (what `BadDeviceToken` may mean)
- Web Push: https://www.rfc-editor.org/rfc/rfc8030#section-7.3 (404),
  https://mozilla-services.github.io/autopush-rs/errors.html (404 and 410)
- SES: https://docs.aws.amazon.com/ses/latest/dg/notification-contents.html
- SMTP: https://www.rfc-editor.org/rfc/rfc3463#section-3,
  https://www.rfc-editor.org/rfc/rfc5321#section-4.2.3,
  https://www.rfc-editor.org/rfc/rfc7505#section-4 (5.1.10)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parseaddr
from typing import TypeAlias, TypeVar

import msgspec

from .feedback import EmailFeedback, EmailReason, PushFeedback, PushReason

Body: TypeAlias = bytes | str | Mapping[str, object] | None
"""What a provider answered: the bytes, or the JSON that they were decoded into."""

T = TypeVar("T", bound=msgspec.Struct)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def from_fcm(status: int, body: Body, *, token: str, at: datetime) -> PushFeedback | None:
    """Return what an answer of FCM's HTTP v1 API says about a token.

    `INVALID_ARGUMENT` is also what a bad message gets. It blames the token in the two forms that
    Google documents: a violation of the field `message.token`, or an error of FCM itself (not of
    the request's form) with the message that the token is none of FCM's.

    Args:
        status: The HTTP status.
        body: The answer's JSON.
        token: What was sent to.
        at: When it was sent. A device that was seen since is not deactivated.
    """
    if status < 400:
        return None
    error = _read(body, _FcmAnswer).error
    codes = {detail.error_code for detail in error.details if detail.type.endswith(".FcmError")}
    reason: PushReason | None = None
    if "UNREGISTERED" in codes:
        reason = "unregistered"
    elif "SENDER_ID_MISMATCH" in codes:
        reason = "mismatched"
    elif status == 400 and (
        any(v.field == "message.token" for d in error.details for v in d.field_violations)
        or ("INVALID_ARGUMENT" in codes and error.message.strip(" .") == _NOT_OF_FCM)
    ):
        reason = "unregistered"
    return reason and PushFeedback(token=token, reason=reason, at=at)


_NOT_OF_FCM = "The registration token is not a valid FCM registration token"


class _FcmViolation(msgspec.Struct):
    field: str = ""


class _FcmDetail(msgspec.Struct, rename="camel"):
    type: str = msgspec.field(name="@type", default="")
    error_code: str = ""
    field_violations: list[_FcmViolation] = []


class _FcmError(msgspec.Struct):
    message: str = ""
    details: list[_FcmDetail] = []


class _FcmAnswer(msgspec.Struct):
    error: _FcmError = msgspec.field(default_factory=_FcmError)


_APNS: Mapping[tuple[int, str], PushReason] = {
    (410, "Unregistered"): "unregistered",
    (410, "ExpiredToken"): "expired",
    (400, "BadDeviceToken"): "mismatched",
    (400, "DeviceTokenNotForTopic"): "mismatched",
}


class _ApnsAnswer(msgspec.Struct):
    reason: str = ""
    timestamp: int | None = None


def from_apns(status: int, body: Body, *, token: str, at: datetime) -> PushFeedback | None:
    """Return what an answer of APNs says about a token.

    With 410 it tells when it knew that the token was no longer valid: that is the feedback's `at`,
    so that a device that registered since stays active.

    Args:
        status: The HTTP status (`:status`).
        body: The answer's JSON.
        token: What was sent to.
        at: When it was sent, for answers that name no time.
    """
    answer = _read(body, _ApnsAnswer)
    reason = _APNS.get((status, answer.reason))
    if reason is None:
        return None
    if answer.timestamp is not None:
        at = _from_milliseconds(answer.timestamp, at)
    return PushFeedback(token=token, reason=reason, at=at)


def _from_milliseconds(timestamp: int, at: datetime) -> datetime:
    try:
        return _EPOCH + timedelta(milliseconds=timestamp)
    except OverflowError:
        return at


def from_webpush(status: int, *, token: str, at: datetime) -> PushFeedback | None:
    """Return what the answer of a push service (RFC 8030) says about a subscription.

    Args:
        status: The HTTP status.
        token: The subscription's JSON, as it was registered.
        at: When it was sent.
    """
    reason: PushReason
    match status:
        case 404:
            reason = "expired"
        case 410:
            reason = "unregistered"
        case _:
            return None
    return PushFeedback(token=token, reason=reason, at=at)


class _SesRecipient(msgspec.Struct, rename="camel"):
    email_address: str = ""


class _SesBounce(msgspec.Struct, rename="camel"):
    bounce_type: str = ""
    bounce_sub_type: str = ""
    bounced_recipients: list[_SesRecipient] = []
    timestamp: str = ""


class _SesComplaint(msgspec.Struct, rename="camel"):
    complained_recipients: list[_SesRecipient] = []
    complaint_feedback_type: str | None = None
    timestamp: str = ""


class _SesNotification(msgspec.Struct, rename="camel"):
    notification_type: str = ""
    event_type: str = ""
    bounce: _SesBounce | None = None
    complaint: _SesComplaint | None = None
    # of the message of SNS that it may come in
    message: str | None = msgspec.field(name="Message", default=None)


_BLAMES_THE_MESSAGE = frozenset({"MessageTooLarge", "ContentRejected", "AttachmentRejected"})
_NO_COMPLAINT = frozenset({"not-spam", "auth-failure", "virus"})


def from_ses(notification: Body, *, at: datetime) -> tuple[EmailFeedback, ...]:
    """Return what a notification of Amazon SES says about addresses: it can name several.

    Args:
        notification: The JSON of a notification or of a published event, also inside of the message
            of SNS that brought it.
        at: When it came, for notifications that name no time.
    """
    said = _read(notification, _SesNotification)
    if said.message is not None:
        said = _read(said.message, _SesNotification)
    kind = said.notification_type or said.event_type
    if kind == "Bounce" and said.bounce is not None:
        reason = _bounce_reason(said.bounce)
        recipients, time = said.bounce.bounced_recipients, said.bounce.timestamp
    elif kind == "Complaint" and said.complaint is not None:
        blamed = said.complaint.complaint_feedback_type not in _NO_COMPLAINT
        reason = "complaint" if blamed else None
        recipients, time = said.complaint.complained_recipients, said.complaint.timestamp
    else:
        return ()
    if reason is None:
        return ()
    when = _from_rfc3339(time, at)
    return tuple(
        EmailFeedback(address=address, reason=reason, at=when)
        for address in dict.fromkeys(_addresses(recipients))
    )


def _bounce_reason(bounce: _SesBounce) -> EmailReason | None:
    if bounce.bounce_type == "Permanent":
        return "hard_bounce"
    blames_address = bounce.bounce_sub_type not in _BLAMES_THE_MESSAGE
    is_soft = bounce.bounce_type in ("Transient", "Undetermined")
    return "soft_bounce" if is_soft and blames_address else None


def _addresses(recipients: list[_SesRecipient]) -> Iterator[str]:
    for recipient in recipients:
        # Bounces may repeat the recipient as the message had it, with a name.
        _, address = parseaddr(recipient.email_address)
        if "@" in address:
            yield address


def _from_rfc3339(time: str, at: datetime) -> datetime:
    try:
        said = datetime.fromisoformat(time)
    except ValueError:
        return at
    return said if said.tzinfo else at


_HARD = frozenset({"5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10", "5.2.1"})


def from_smtp(
    code: int, enhanced: str | None, *, address: str, at: datetime
) -> EmailFeedback | None:
    """Return what an SMTP reply, or a delivery status notification, says about an address.

    The enhanced code is the finer one and decides: a policy (5.7.1) answers 550, too, and says
    nothing about the mailbox.

    Args:
        code: The reply code (RFC 5321), such as 550.
        enhanced: The enhanced code (RFC 3463), such as `5.1.1`, if there is one.
        address: The recipient.
        at: When it was sent.
    """
    reason: EmailReason | None = None
    if enhanced:
        _, _, detail = enhanced.partition(".")
        if enhanced in _HARD:
            reason = "hard_bounce"
        elif enhanced == "5.2.2" or (enhanced.startswith("4.") and not detail.startswith("7.")):
            reason = "soft_bounce"
    elif code in (550, 551, 553):
        reason = "hard_bounce"
    elif code in (450, 452, 552):
        reason = "soft_bounce"
    return reason and EmailFeedback(address=address, reason=reason, at=at)


def _read(body: Body, type_: type[T]) -> T:
    """Return what is expected of an answer; what is not even that says nothing."""
    try:
        if isinstance(body, bytes | str):
            return msgspec.json.decode(body, type=type_)
        return msgspec.convert(body or {}, type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return type_()
