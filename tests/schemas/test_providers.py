"""What providers answer, in our words: every code that the table names, and those it does not."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from user_service_schemas import (
    DEACTIVATING,
    EmailFeedback,
    PushFeedback,
    ReportFeedback,
    convert_request,
    from_apns,
    from_fcm,
    from_ses,
    from_smtp,
    from_webpush,
)

from .strategies import json_values, steadily

SENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
FCM = "type.googleapis.com/google.firebase.fcm.v1.FcmError"
BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"


def fcm(status: int, message: str, *details: dict[str, Any]) -> dict[str, Any]:
    return {"error": {"code": status, "message": message, "status": "X", "details": [*details]}}


def code(name: str) -> dict[str, Any]:
    return {"@type": FCM, "errorCode": name}


def field(name: str) -> dict[str, Any]:
    return {"@type": BAD_REQUEST, "fieldViolations": [{"field": name, "description": "Invalid"}]}


def push(reason: Any, at: datetime) -> PushFeedback:
    return PushFeedback(token="a token", reason=reason, at=at)


def forms_of(body: Any) -> list[Any]:
    """Return an answer decoded, as text and as bytes; what is no JSON as it is."""
    if not isinstance(body, dict):
        return [body]
    return [body, json.dumps(body), json.dumps(body).encode()]


INVALID = "Request contains an invalid argument."
NOT_OF_FCM = "The registration token is not a valid FCM registration token"
FCM_ANSWERS: dict[str, tuple[int, Any, str | None]] = {
    "sent": (200, {"name": "projects/x/messages/1"}, None),
    "UNREGISTERED": (
        404,
        fcm(404, "Requested entity was not found.", code("UNREGISTERED")),
        "unregistered",
    ),
    "a project that is not found": (404, fcm(404, "Requested entity was not found."), None),
    "SENDER_ID_MISMATCH": (
        403,
        fcm(403, "SenderId mismatch", code("SENDER_ID_MISMATCH")),
        "mismatched",
    ),
    "PERMISSION_DENIED": (403, fcm(403, "Permission denied"), None),
    "a bad token by its field": (
        400,
        fcm(400, INVALID, code("INVALID_ARGUMENT"), field("message.token")),
        "unregistered",
    ),
    "a bad token by FCM's message": (
        400,
        fcm(400, NOT_OF_FCM, code("INVALID_ARGUMENT")),
        "unregistered",
    ),
    "a bad payload by its field": (
        400,
        fcm(400, INVALID, code("INVALID_ARGUMENT"), field("message.data[0].value")),
        None,
    ),
    "no recipient": (
        400,
        fcm(
            400, "Recipient of the message is not set.", field("message"), code("INVALID_ARGUMENT")
        ),
        None,
    ),
    "a bad request about something": (400, fcm(400, INVALID, code("INVALID_ARGUMENT")), None),
    "a bad request about nothing": (400, fcm(400, INVALID), None),
    "that message from elsewhere": (400, fcm(400, NOT_OF_FCM), None),
    "a code of another service": (
        400,
        fcm(400, INVALID, {"@type": "x", "errorCode": "UNREGISTERED"}),
        None,
    ),
    "QUOTA_EXCEEDED": (429, fcm(429, "Quota", code("QUOTA_EXCEEDED")), None),
    "UNAVAILABLE": (503, fcm(503, "Unavailable", code("UNAVAILABLE")), None),
    "INTERNAL": (500, fcm(500, "Internal", code("INTERNAL")), None),
    "THIRD_PARTY_AUTH_ERROR": (401, fcm(401, "APNs", code("THIRD_PARTY_AUTH_ERROR")), None),
    "a page of HTML": (502, b"<!DOCTYPE html>", None),
    "nothing": (500, None, None),
}


@pytest.mark.parametrize(("status", "body", "reason"), FCM_ANSWERS.values(), ids=FCM_ANSWERS)
def test_fcm(status: int, body: Any, reason: str | None) -> None:
    for form in (
        (body, json.dumps(body), json.dumps(body).encode()) if isinstance(body, dict) else [body]
    ):
        said = from_fcm(status, form, token="a token", at=SENT)
        assert said == (reason and push(reason, SENT))


KNOWN = datetime(2025, 12, 24, 18, 0, 0, 123000, tzinfo=UTC)
KNOWN_MS = 1_766_599_200_123
APNS_ANSWERS: dict[str, tuple[int, Any, str | None, datetime]] = {
    "sent": (200, None, None, SENT),
    "Unregistered": (410, {"reason": "Unregistered", "timestamp": KNOWN_MS}, "unregistered", KNOWN),
    "ExpiredToken": (410, {"reason": "ExpiredToken", "timestamp": KNOWN_MS}, "expired", KNOWN),
    "ExpiredToken without a time": (410, {"reason": "ExpiredToken"}, "expired", SENT),
    "a time beyond time": (
        410,
        {"reason": "Unregistered", "timestamp": 10**18},
        "unregistered",
        SENT,
    ),
    "BadDeviceToken": (400, {"reason": "BadDeviceToken"}, "mismatched", SENT),
    "DeviceTokenNotForTopic": (400, {"reason": "DeviceTokenNotForTopic"}, "mismatched", SENT),
    "BadTopic": (400, {"reason": "BadTopic"}, None, SENT),
    "MissingDeviceToken": (400, {"reason": "MissingDeviceToken"}, None, SENT),
    "PayloadTooLarge": (413, {"reason": "PayloadTooLarge"}, None, SENT),
    "ExpiredProviderToken": (403, {"reason": "ExpiredProviderToken"}, None, SENT),
    "BadCertificateEnvironment": (403, {"reason": "BadCertificateEnvironment"}, None, SENT),
    "TooManyRequests": (429, {"reason": "TooManyRequests"}, None, SENT),
    "Shutdown": (503, {"reason": "Shutdown"}, None, SENT),
    "a reason with another status": (400, {"reason": "Unregistered"}, None, SENT),
    "410 that says nothing": (410, b"", None, SENT),
}


@pytest.mark.parametrize(
    ("status", "body", "reason", "at"), APNS_ANSWERS.values(), ids=APNS_ANSWERS
)
def test_apns(status: int, body: Any, reason: str | None, at: datetime) -> None:
    for form in forms_of(body):
        said = from_apns(status, form, token="a token", at=SENT)
        assert said == (reason and push(reason, at))


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (404, "expired"),
        (410, "unregistered"),
        *((status, None) for status in (200, 201, 202, 301, 400, 401, 403, 413, 429, 500, 503)),
    ],
)
def test_webpush(status: int, reason: str | None) -> None:
    token = '{"endpoint": "https://push.example/1"}'
    said = from_webpush(status, token=token, at=SENT)
    assert said == (reason and PushFeedback(token=token, reason=reason, at=SENT))  # type: ignore[arg-type]


def bounce(type_: str, sub_type: str, *addresses: str) -> dict[str, Any]:
    recipients = [{"emailAddress": address, "status": "5.1.1"} for address in addresses]
    said = {
        "bounceType": type_,
        "bounceSubType": sub_type,
        "bouncedRecipients": recipients,
        "timestamp": "2025-12-24T18:00:00.123Z",
    }
    return {"notificationType": "Bounce", "bounce": said, "mail": {"destination": [*addresses]}}


def complaint(type_: str | None, *addresses: str) -> dict[str, Any]:
    said: dict[str, Any] = {
        "complainedRecipients": [{"emailAddress": address} for address in addresses],
        "timestamp": "2025-12-24T18:00:00.123Z",
    }
    if type_:
        said["complaintFeedbackType"] = type_
    return {"notificationType": "Complaint", "complaint": said}


JANE, JOE = "jane@example.com", "joe@example.com"
SES_NOTIFICATIONS: dict[str, tuple[dict[str, Any], str | None]] = {
    "Permanent General": (bounce("Permanent", "General", JANE), "hard_bounce"),
    "Permanent NoEmail": (bounce("Permanent", "NoEmail", JANE), "hard_bounce"),
    "Permanent Suppressed": (bounce("Permanent", "Suppressed", JANE), "hard_bounce"),
    "Permanent OnAccountSuppressionList": (
        bounce("Permanent", "OnAccountSuppressionList", JANE),
        "hard_bounce",
    ),
    "Transient General": (bounce("Transient", "General", JANE), "soft_bounce"),
    "Transient MailboxFull": (bounce("Transient", "MailboxFull", JANE), "soft_bounce"),
    "Transient MessageTooLarge": (bounce("Transient", "MessageTooLarge", JANE), None),
    "Transient ContentRejected": (bounce("Transient", "ContentRejected", JANE), None),
    "Transient AttachmentRejected": (bounce("Transient", "AttachmentRejected", JANE), None),
    "Undetermined": (bounce("Undetermined", "Undetermined", JANE), "soft_bounce"),
    "a type that is new": (bounce("Novel", "General", JANE), None),
    "abuse": (complaint("abuse", JANE), "complaint"),
    "fraud": (complaint("fraud", JANE), "complaint"),
    "other": (complaint("other", JANE), "complaint"),
    "a complaint that says no more": (complaint(None, JANE), "complaint"),
    "not-spam": (complaint("not-spam", JANE), None),
    "auth-failure": (complaint("auth-failure", JANE), None),
    "virus": (complaint("virus", JANE), None),
    "Delivery": ({"notificationType": "Delivery", "delivery": {}}, None),
    "Open": ({"eventType": "Open", "open": {}}, None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize(
    ("notification", "reason"), SES_NOTIFICATIONS.values(), ids=SES_NOTIFICATIONS
)
def test_ses(notification: dict[str, Any], reason: str | None) -> None:
    expected = (
        () if reason is None else (EmailFeedback(address=JANE, reason=reason, at=KNOWN),)  # type: ignore[arg-type]
    )
    text = json.dumps(notification)
    assert from_ses(notification, at=SENT) == expected
    assert from_ses(text, at=SENT) == expected
    assert from_ses({"Type": "Notification", "Message": text}, at=SENT) == expected
    event = {**notification, "eventType": notification.get("notificationType", "")}
    event.pop("notificationType", None)
    if "open" not in event:
        assert from_ses(event, at=SENT) == expected


def test_ses_can_name_several_and_with_a_name() -> None:
    said = from_ses(bounce("Permanent", "General", JANE, f"Joe <{JOE}>", JANE, "nobody"), at=SENT)
    assert [item.address for item in said] == [JANE, JOE]


@pytest.mark.parametrize("time", ["", "yesterday", "2026-01-01T00:00:00"])
def test_ses_without_a_time_is_of_when_it_came(time: str) -> None:
    notification = bounce("Permanent", "General", JANE)
    notification["bounce"]["timestamp"] = time
    assert [item.at for item in from_ses(notification, at=SENT)] == [SENT]


@pytest.mark.parametrize(
    ("reply", "enhanced", "reason"),
    [
        (550, "5.1.1", "hard_bounce"),
        (550, "5.1.2", "hard_bounce"),
        (553, "5.1.3", "hard_bounce"),
        (550, "5.1.6", "hard_bounce"),
        (556, "5.1.10", "hard_bounce"),
        (550, "5.2.1", "hard_bounce"),
        (552, "5.2.2", "soft_bounce"),
        (552, "5.2.3", None),
        (552, "5.3.4", None),
        (501, "5.1.7", None),
        (550, "5.5.0", None),
        (554, "5.6.0", None),
        (550, "5.7.1", None),
        (550, "5.7.26", None),
        (554, "5.0.0", None),
        (450, "4.2.1", "soft_bounce"),
        (452, "4.2.2", "soft_bounce"),
        (451, "4.4.1", "soft_bounce"),
        (451, "4.7.1", None),
        (550, None, "hard_bounce"),
        (551, None, "hard_bounce"),
        (553, "", "hard_bounce"),
        (450, None, "soft_bounce"),
        (452, None, "soft_bounce"),
        (552, None, "soft_bounce"),
        (421, None, None),
        (451, None, None),
        (554, None, None),
        (250, "2.1.5", None),
        (250, None, None),
    ],
)
def test_smtp(reply: int, enhanced: str | None, reason: str | None) -> None:
    said = from_smtp(reply, enhanced, address=JANE, at=SENT)
    assert said == (reason and EmailFeedback(address=JANE, reason=reason, at=SENT))  # type: ignore[arg-type]


@steadily
@given(st.integers(100, 599), json_values | st.binary() | st.text())
def test_an_answer_that_nobody_expects_says_nothing(status: int, body: Any) -> None:
    for form in (body, json.dumps(body) if not isinstance(body, bytes) else body):
        if isinstance(form, bytes | str | dict):
            assert from_fcm(status, form, token="t", at=SENT) is None
            assert from_apns(status, form, token="t", at=SENT) is None
            assert from_ses(form, at=SENT) == ()


def test_what_is_understood_can_be_reported() -> None:
    items = [
        *(from_fcm(s, body, token="t", at=SENT) for s, body, _ in FCM_ANSWERS.values()),
        *(from_apns(s, body, token="t", at=SENT) for s, body, _, _ in APNS_ANSWERS.values()),
        *(said for n, _ in SES_NOTIFICATIONS.values() for said in from_ses(n, at=SENT)),
    ]
    sent = [
        {
            "channel": item.__struct_config__.tag,
            **{name: getattr(item, name) for name in item.__struct_fields__},
        }
        for item in items
        if item is not None
    ]
    assert len(sent) > 20
    received = convert_request(json.loads(json.dumps({"items": sent}, default=str)), ReportFeedback)
    assert received.items == [item for item in items if item is not None]


def test_only_what_blames_the_token_deactivates() -> None:
    assert {"unregistered", "expired"} == DEACTIVATING
