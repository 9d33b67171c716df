"""The HTTP of the fake: requests as the service reads them, answers as it writes them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import TypeVar
from uuid import uuid4

import httpx
import msgspec
from user_service_schemas import (
    BatchOfUsers,
    BatchUsers,
    CreateUser,
    Dependency,
    DeviceUpdate,
    Envelope,
    Error,
    ErrorCode,
    FeedbackItem,
    FieldError,
    FoundUsers,
    Health,
    LookupUsers,
    MalformedJSON,
    Page,
    PasswordUpdate,
    PreferencesRevision,
    PreferencesUpdate,
    Probe,
    Problem,
    RegisterDevice,
    ReportFeedback,
    ResolveDeliveries,
    RuleViolation,
    Scope,
    User,
    UserUpdate,
    VerifiedUser,
    VerifyCredentials,
    decode_request,
)

from ._clock import VirtualClock
from ._directory import Condition, Directory
from ._feed import Stream
from ._refusals import Refusal, invalid
from ._routes import SCOPES, find_route, plain

T = TypeVar("T")

KIB = 1024
JSON = "application/json"
PROBLEM = "application/problem+json"
ANSWERS_KEPT = timedelta(hours=24)
NO_STORE = {"Cache-Control": "no-store"}
PRIVATE = {"Cache-Control": "private, no-cache"}
STREAM_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}

_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_KEY = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,253}[\x21-\x7e])?")
_TAG = re.compile(r'(?:W/)?"([0-9a-f]+)\.([0-9a-f]+)\.([0-9]{1,18})"')
_NUMBER = re.compile("-?[0-9]{1,18}")
_encode = msgspec.json.encode


@dataclass
class Ask:
    """A request, as far as it was read."""

    method: str
    path: str
    params: httpx.QueryParams
    headers: httpx.Headers
    body: bytes
    request_id: str
    caller: str = ""
    """The service key, where one is needed."""
    user: str = ""
    device: str = ""

    @classmethod
    def of(cls, request: httpx.Request, body: bytes) -> Ask:
        """Return what is asked."""
        said = request.headers.get("X-Request-ID", "")
        return cls(
            request.method,
            plain(request.url.path),
            request.url.params,
            request.headers,
            body,
            # a new one unless it is fit for a log
            request_id=said if _REQUEST_ID.fullmatch(said) else str(uuid4()),
        )


@dataclass
class Answer:
    """An answer: in the envelope, or a stream."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    stream: Stream | None = None

    def response(self, ask: Ask) -> httpx.Response:
        """Return it as httpx has it."""
        headers = {**self.headers, "X-Request-ID": ask.request_id}
        if self.stream is not None:
            return httpx.Response(self.status, headers=headers, stream=self.stream)
        if self.status not in (204, 304):
            headers["Content-Length"] = str(len(self.body))
        shown = b"" if ask.method == "HEAD" else self.body
        return httpx.Response(self.status, headers=headers, content=shown)


@dataclass
class _Recorded:
    """The answer to a write, kept under its idempotency key."""

    digest: bytes
    answer: Answer
    user_id: str
    at: datetime


def success(
    data: object,
    message: str,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    cache: Mapping[str, str] = NO_STORE,
) -> Answer:
    """Answer with `data` in the envelope."""
    envelope = Envelope(success=True, data=data, message=message, error=None)
    return Answer(status, {**cache, "Content-Type": JSON, **(headers or {})}, _encode(envelope))


def failure(refusal: Refusal, ask: Ask) -> Answer:
    """Answer with an error, in the envelope or as RFC 9457 has it, as the caller accepts."""
    media_type = _preferred(ask.headers.get("Accept", ""))
    if media_type == PROBLEM:
        body = _encode(
            Problem(
                type=f"urn:user-service:error:{refusal.code}",
                title=refusal.title,
                status=refusal.status,
                detail=refusal.message,
                code=refusal.code,
                errors=refusal.details,
                request_id=ask.request_id,
            )
        )
    else:
        error = Error(code=refusal.code, details=refusal.details, request_id=ask.request_id)
        body = _encode(
            Envelope[None](success=False, data=None, message=refusal.message, error=error)
        )
    headers = {**NO_STORE, "Content-Type": media_type, "Vary": "Accept", **refusal.headers}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Answer(refusal.status, headers, body)


class Routes:
    """Answers requests from a directory, as the service's routes do."""

    def __init__(
        self,
        directory: Directory,
        clock: VirtualClock,
        keys: Mapping[str, frozenset[Scope]] | None,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._keys = keys
        self._recorded: dict[tuple[str, str], _Recorded] = {}
        self.feedback: list[FeedbackItem] = []
        self.down: frozenset[str] = frozenset()
        self._handlers: Mapping[str, Callable[[Ask], Answer]] = {
            "users.create": self._create_user,
            "users.get": self._get_user,
            "users.list": self._list_users,
            "users.lookup": self._lookup_users,
            "users.get_many": self._batch_users,
            "users.update": self._update_user,
            "users.delete": self._delete_user,
            "users.set_password": self._set_password,
            "users.lift_suppression": self._lift_suppression,
            "credentials.verify": self._verify_credentials,
            "preferences.get": self._get_preferences,
            "preferences.update": self._update_preferences,
            "preferences.history": self._list_history,
            "devices.list": self._list_devices,
            "devices.register": self._register_device,
            "devices.update": self._update_device,
            "devices.remove": self._remove_device,
            "deliveries.resolve": self._resolve_deliveries,
            "feedback.report": self._report_feedback,
            "changes.list": self._list_changes,
            "changes.stream": self._stream_changes,
            "health": self._get_health,
            "health.live": lambda _: success(Probe(status="alive"), "The process runs"),
            "health.ready": lambda _: success(Probe(status="ready"), "The service takes requests"),
        }

    def answer(self, ask: Ask) -> Answer:
        """Answer a request, with an error if it has to be."""
        try:
            return self._route(ask)
        except Refusal as refusal:
            return failure(refusal, ask)
        except RuleViolation as violation:
            return failure(invalid(violation.details), ask)

    def forget(self, user_id: str) -> None:
        """Forget the recorded answers about a user: they hold personal data."""
        self._recorded = {
            key: kept for key, kept in self._recorded.items() if kept.user_id != user_id
        }

    def _route(self, ask: Ask) -> Answer:
        match = find_route(ask.method, ask.path)
        if match is None:
            raise Refusal(ErrorCode.ROUTE_NOT_FOUND)
        allow = {"Allow": ", ".join(sorted(match.allowed))}
        if ask.method == "OPTIONS":
            return Answer(204, allow)
        if match.operation is None:
            raise Refusal(ErrorCode.METHOD_NOT_ALLOWED, headers=allow)
        if self._keys is not None and match.operation in SCOPES:
            ask.caller = _key_of(ask)
            if ask.caller not in self._keys:
                raise Refusal(ErrorCode.UNAUTHENTICATED)
            if SCOPES[match.operation] not in self._keys[ask.caller]:
                raise Refusal(ErrorCode.FORBIDDEN)
        ask.user, ask.device = match.user_id, match.device_id
        return self._handlers[match.operation](ask)

    # Users

    def _create_user(self, ask: Ask) -> Answer:
        data = self._body(ask, CreateUser)

        def create() -> tuple[Answer, str]:
            user = self._directory.register(data)
            headers = {
                "Location": f"/api/v1/users/{user.id}",
                "ETag": self._directory.etag(user.version),
            }
            return success(user, "User registered", status=201, headers=headers), user.id

        return self._once(ask, create)

    def _get_user(self, ask: Ask) -> Answer:
        user = self._read(ask)
        return self._held(ask, user) or success(
            user,
            "User retrieved",
            headers={"ETag": self._directory.etag(user.version)},
            cache=PRIVATE,
        )

    def _list_users(self, ask: Ask) -> Answer:
        limit = _limit(ask, 50, 200)
        found = self._directory.page(_decode_cursor("users", ask, _UUID), limit + 1)
        page = Page[User](
            items=tuple(found[:limit]),
            next_cursor=_encode_cursor("users", found[limit - 1].id) if found[limit:] else None,
        )
        return success(page, "Users listed")

    def _lookup_users(self, ask: Ask) -> Answer:
        found = self._directory.lookup(self._body(ask, LookupUsers))
        return success(FoundUsers(users=tuple(found)), "Users looked up")

    def _batch_users(self, ask: Ask) -> Answer:
        data = self._body(ask, BatchUsers, KIB * KIB)
        asked = dict.fromkeys(user_id.lower() for user_id in data.ids)
        found = {user_id: self._directory.find(user_id) for user_id in asked}
        batch = BatchOfUsers(
            users=tuple(user for user in found.values() if user is not None),
            missing=tuple(user_id for user_id, user in found.items() if user is None),
        )
        tag = f"{self._directory.epoch}.{self._directory.format}"
        return success(batch, "Users retrieved", headers={"X-Document-Tag": tag})

    def _update_user(self, ask: Ask) -> Answer:
        data, user_id = self._body(ask, UserUpdate), _user_id(ask)

        def update() -> tuple[Answer, str]:
            user = self._directory.update(user_id, data, self._condition(ask))
            headers = {"ETag": self._directory.etag(user.version)}
            return success(user, "User updated", headers=headers), user_id

        return self._once(ask, update)

    def _delete_user(self, ask: Ask) -> Answer:
        user_id = _user_id(ask)

        def delete() -> tuple[Answer, str]:
            self._directory.erase(user_id, self._condition(ask))
            self.forget(user_id)
            return success(None, "User erased"), user_id

        return self._once(ask, delete)

    def _set_password(self, ask: Ask) -> Answer:
        data, user_id = self._body(ask, PasswordUpdate), _user_id(ask)

        def set_password() -> tuple[Answer, str]:
            self._directory.set_password(user_id, data, self._condition(ask))
            return success(None, "Password set"), user_id

        return self._once(ask, set_password)

    def _lift_suppression(self, ask: Ask) -> Answer:
        user_id = _user_id(ask)

        def lift() -> tuple[Answer, str]:
            version_ = self._directory.lift_suppression(user_id, self._condition(ask))
            headers = {"ETag": self._directory.etag(version_)}
            return success(None, "Address restored", headers=headers), user_id

        return self._once(ask, lift)

    def _verify_credentials(self, ask: Ask) -> Answer:
        data = self._body(ask, VerifyCredentials)
        user_id = self._directory.verify(data.email, data.password)
        return success(VerifiedUser(user_id=user_id), "Credentials verified")

    # Preferences

    def _get_preferences(self, ask: Ask) -> Answer:
        user = self._read(ask)
        return self._held(ask, user) or success(
            user.preferences,
            "Preferences retrieved",
            headers={"ETag": self._directory.etag(user.version)},
            cache=PRIVATE,
        )

    def _update_preferences(self, ask: Ask) -> Answer:
        data, user_id = self._body(ask, PreferencesUpdate), _user_id(ask)

        def update() -> tuple[Answer, str]:
            updated, version_ = self._directory.update_preferences(
                user_id, data, self._condition(ask)
            )
            headers = {"ETag": self._directory.etag(version_)}
            return success(updated, "Preferences updated", headers=headers), user_id

        return self._once(ask, update)

    def _list_history(self, ask: Ask) -> Answer:
        limit = _limit(ask, 50, 200)
        before = _decode_cursor("history", ask, "[0-9]{1,18}")
        found = self._directory.history(
            _user_id(ask), None if before is None else int(before), limit + 1
        )
        page = Page[PreferencesRevision](
            items=tuple(revision for _, revision in found[:limit]),
            next_cursor=(
                _encode_cursor("history", str(found[limit - 1][0])) if found[limit:] else None
            ),
        )
        return success(page, "Preference history listed")

    # Devices

    def _list_devices(self, ask: Ask) -> Answer:
        found, version_ = self._directory.devices(_user_id(ask))
        return success(found, "Devices listed", headers={"ETag": self._directory.etag(version_)})

    def _register_device(self, ask: Ask) -> Answer:
        data, user_id = self._body(ask, RegisterDevice), _user_id(ask)

        def register() -> tuple[Answer, str]:
            device, version_, is_new = self._directory.register_device(
                user_id, data, self._condition(ask)
            )
            registered = success(
                device,
                "Device registered" if is_new else "Device updated",
                status=201 if is_new else 200,
                headers={"ETag": self._directory.etag(version_)},
            )
            return registered, user_id

        return self._once(ask, register)

    def _update_device(self, ask: Ask) -> Answer:
        data, user_id, device_id = self._body(ask, DeviceUpdate), _user_id(ask), _device_id(ask)

        def update() -> tuple[Answer, str]:
            device, version_ = self._directory.update_device(
                user_id, device_id, active=data.active, condition=self._condition(ask)
            )
            headers = {"ETag": self._directory.etag(version_)}
            return success(device, "Device updated", headers=headers), user_id

        return self._once(ask, update)

    def _remove_device(self, ask: Ask) -> Answer:
        user_id, device_id = _user_id(ask), _device_id(ask)

        def remove() -> tuple[Answer, str]:
            version_ = self._directory.remove_device(user_id, device_id, self._condition(ask))
            headers = {"ETag": self._directory.etag(version_)}
            return success(None, "Device deleted", headers=headers), user_id

        return self._once(ask, remove)

    # Deliveries and feedback

    def _resolve_deliveries(self, ask: Ask) -> Answer:
        data = self._body(ask, ResolveDeliveries, KIB * KIB)
        return success(self._directory.resolve(data), "Deliveries resolved")

    def _report_feedback(self, ask: Ask) -> Answer:
        data = self._body(ask, ReportFeedback, 8 * KIB * KIB)

        def report() -> tuple[Answer, str]:
            results = self._directory.report(data.items)
            self.feedback.extend(data.items)
            return success(results, "Feedback taken"), ""

        return self._once(ask, report)

    # Changes and health

    def _list_changes(self, ask: Ask) -> Answer:
        limit = _limit(ask, 100, 1000)
        return success(self._directory.feed.read(ask.params.get("after"), limit), "Changes listed")

    def _stream_changes(self, ask: Ask) -> Answer:
        stream = self._directory.feed.subscribe(ask.headers.get("Last-Event-ID"))
        return Answer(200, STREAM_HEADERS, stream=stream)

    def _get_health(self, ask: Ask) -> Answer:
        status = "unhealthy" if "postgres" in self.down else "degraded" if self.down else "healthy"
        health = Health(
            status=status,
            version=version("user-service-client"),
            dependencies={
                name: Dependency(status="down", latency_ms=None)
                if name in self.down
                else Dependency(status="up", latency_ms=0.0)
                for name in ("postgres", "redis")
            },
        )
        message = f"The service is {status}"
        if "postgres" not in self.down:
            return success(health, message)
        code = ErrorCode.DEPENDENCY_UNAVAILABLE
        error = Error(code=code, details=(), request_id=ask.request_id)
        envelope = Envelope(success=False, data=health, message=message, error=error)
        return Answer(503, {**NO_STORE, "Content-Type": JSON}, _encode(envelope))

    # What they share

    def _body(self, ask: Ask, type_: type[T], most: int = 64 * KIB) -> T:
        """Read a body as the service does: strictly, whole, and with every bad field named."""
        if len(ask.body) > most:
            raise Refusal(ErrorCode.BODY_TOO_LARGE)
        if not ask.body:
            message = "The body is empty; a JSON object is expected."
            raise Refusal(ErrorCode.MALFORMED_JSON, message=message)
        if ask.headers.get("Content-Type", "").partition(";")[0].strip().lower() != JSON:
            raise Refusal(ErrorCode.UNSUPPORTED_MEDIA_TYPE)
        try:
            return decode_request(ask.body, type_)
        except MalformedJSON as error:
            raise Refusal(ErrorCode.MALFORMED_JSON) from error
        except RuleViolation as violation:
            judged = self._directory.judge(violation.valid, type_)
            details = {detail.field: detail for detail in (*judged, *violation.details)}
            raise invalid(list(details.values())) from violation

    def _read(self, ask: Ask) -> User:
        user_id, least = _user_id(ask), ask.headers.get("X-Min-Version", "0")
        if not re.fullmatch("[0-9]{1,18}", least):
            raise invalid([FieldError(field="X-Min-Version", message="Expected a version number.")])
        return self._directory.get(user_id)

    def _held(self, ask: Ask, user: User) -> Answer | None:
        held, etag = ask.headers.get("If-None-Match"), self._directory.etag(user.version)
        if held is None:
            return None
        tags = ['"{}.{}.{}"'.format(*tag) for tag in _TAG.findall(held)]
        if held.strip() != "*" and etag not in tags:
            return None
        return Answer(304, {**PRIVATE, "ETag": etag})

    def _condition(self, ask: Ask) -> Condition | None:
        header = ask.headers.get("If-Match")
        if header is None:
            return None
        named = {int(tag[2]) for tag in _TAG.findall(header) if tag[0] == self._directory.epoch}
        return lambda current: header.strip() == "*" or current in named

    def _once(self, ask: Ask, work: Callable[[], tuple[Answer, str]]) -> Answer:
        """Do the work, unless that was done before under the same `Idempotency-Key`."""
        key = ask.headers.get("Idempotency-Key")
        if key is None:
            return work()[0]
        if not _KEY.fullmatch(key):
            message = "Expected 1 to 255 printable characters."
            raise invalid([FieldError(field="Idempotency-Key", message=message)])
        asked = [ask.method, ask.path, ask.headers.get("If-Match", "")]
        digest = hashlib.sha256(b"\0".join([*(part.encode() for part in asked), ask.body])).digest()
        kept = self._recorded.get((ask.caller, key))
        if kept is None or kept.at <= self._clock.now() - ANSWERS_KEPT:
            answer, user_id = work()
            self._recorded[ask.caller, key] = _Recorded(digest, answer, user_id, self._clock.now())
            return answer
        if kept.digest != digest:
            raise Refusal(ErrorCode.IDEMPOTENCY_KEY_REUSED)
        headers = {**kept.answer.headers, "Idempotency-Replayed": "true"}
        return Answer(kept.answer.status, headers, kept.answer.body)


def _key_of(ask: Ask) -> str:
    scheme, _, key = ask.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _user_id(ask: Ask) -> str:
    return _uuid(ask.user, "user_id", ErrorCode.USER_NOT_FOUND)


def _device_id(ask: Ask) -> str:
    return _uuid(ask.device, "device_id", ErrorCode.DEVICE_NOT_FOUND)


def _uuid(text: str, name: str, code: ErrorCode) -> str:
    if not re.fullmatch(_UUID, text.lower()):
        raise Refusal(code, FieldError(field=name, message="This is not a UUID."))
    return text.lower()


def _limit(ask: Ask, default: int, most: int) -> int:
    said = ask.params.get("limit")
    if said is None:
        return default
    if not _NUMBER.fullmatch(said):
        message = "Expected int, got str."
    elif int(said) < 1:
        message = "Expected int >= 1."
    elif int(said) > most:
        message = f"Expected int <= {most}."
    else:
        return int(said)
    raise invalid([FieldError(field="limit", message=message)])


def _encode_cursor(listing: str, position: str) -> str:
    return base64.urlsafe_b64encode(f"{listing}:{position}".encode()).decode().rstrip("=")


def _decode_cursor(listing: str, ask: Ask, pattern: str) -> str | None:
    cursor = ask.params.get("cursor")
    if cursor is None:
        return None
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        name, _, position = base64.b64decode(padded, b"-_", validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        raise Refusal(ErrorCode.INVALID_CURSOR) from None
    if name != listing or not re.fullmatch(pattern, position):
        raise Refusal(ErrorCode.INVALID_CURSOR)
    return position


def _preferred(accept: str) -> str:
    """Return which of our two media types of an error a caller would rather have."""
    ranked = []
    for number, said in enumerate(accept.split(",")):
        name, *parameters = (part.strip().lower() for part in said.split(";"))
        weight = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        if not re.fullmatch(r"[0-9]*\.?[0-9]+", weight):
            weight = "1"
        for media_type in (JSON, PROBLEM):
            if name in (media_type, "application/*", "*/*"):
                specific = 2 if name == media_type else 1 if name == "application/*" else 0
                ranked.append((-float(weight), -specific, number, media_type))
                break
    return min(ranked)[3] if ranked else JSON
