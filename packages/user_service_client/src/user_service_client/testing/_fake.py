"""The fake service: a transport, and what a test does to it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Literal, TypeAlias, TypeVar

import httpx
import msgspec
from msgspec import UNSET, UnsetType
from user_service_schemas import (
    STATUS_OF,
    Catalogue,
    CategoryUpdate,
    CreateUser,
    DeviceDetails,
    EmailFeedback,
    ErrorCode,
    FeedbackItem,
    FeedbackResult,
    Mode,
    Platform,
    PreferencesUpdate,
    RegisterDevice,
    ReportFeedback,
    RuleViolation,
    Scope,
    User,
    UserUpdate,
    convert_request,
)

from ._answers import Answer, Ask, Routes, failure
from ._clock import VirtualClock
from ._directory import Directory
from ._faults import Fault, Route, Script
from ._refusals import MESSAGES, Refusal
from ._routes import find_route

S = TypeVar("S", bound=msgspec.Struct)

PASSWORD = "Correct-Horse-9"
_SECRETS = frozenset({"password", "current_password"})
_OF_STATUS: Mapping[int, ErrorCode] = {
    **{status: code for code, status in STATUS_OF.items()},
    400: ErrorCode.MALFORMED_JSON,
    401: ErrorCode.UNAUTHENTICATED,
    404: ErrorCode.USER_NOT_FOUND,
    409: ErrorCode.IDEMPOTENCY_IN_PROGRESS,
    422: ErrorCode.VALIDATION_FAILED,
    503: ErrorCode.DEPENDENCY_UNAVAILABLE,
}
"""The code that `fail` answers a status with when none is named."""

DeviceOf: TypeAlias = tuple[str, Platform] | RegisterDevice
"""A device for `FakeUserService.user`: token and platform, or all that can be said."""


Categories: TypeAlias = Catalogue | str | Mapping[str, Mapping[str, Mode]]
"""A catalogue of categories, or what the service's setting says: JSON, or that decoded."""


@dataclass(frozen=True)
class AskedRequest:
    """A request that the fake was sent.

    Attributes:
        operation: The client's method, such as `users.get`; None where nothing is.
        method: The HTTP method.
        path: Without the query.
        params: The query.
        headers: All of them. Their `repr` hides the service key.
        body: The decoded body, passwords replaced; None if it is empty or no JSON.
        status: What it was answered with; None if it was not answered.
    """

    operation: str | None
    method: str
    path: str
    params: httpx.QueryParams = field(repr=False)
    headers: httpx.Headers = field(repr=False)
    body: object = field(repr=False)
    status: int | None = None


@dataclass(frozen=True)
class _Failure:
    """Answers with an error."""

    answer: Answer | Refusal
    after_processing: bool


@dataclass(frozen=True)
class _Drop:
    """Drops the connection."""

    after_processing: bool


class FakeUserService(httpx.AsyncBaseTransport):
    """The User Service in memory, as the transport of a `UserServiceClient`.

    It speaks the whole API, so that the client's own retries, cache and decoding run:

        fake = FakeUserService()
        ada = fake.user(name="Ada", push=False, devices=[("apns_token", "ios")])
        async with UserServiceClient("http://users", transport=fake, clock=fake.clock) as client:
            fake.fail(status=503, times=2, route="users.get")
            assert await client.users.get(ada.id) == ada

    Edits (`update_preferences` and the like) raise versions, and reach the clients that follow the
    change stream: `await fake.clock.advance(0)` lets them read it. A fake serves any number of
    clients, also one after the other, of one event loop.

    It differs from the service where a test hardly looks: nobody is limited, nor how much of their
    feedback takes effect; a telephone number, a language tag and an address are judged by their
    form; a handful of passwords are too common; and `/health` says what `lose` has it say.

    Args:
        clock: The time of the fake, which only moves when it is told to; None: a new one.
        default_timezone: The zone of users who have named none, an IANA name.
        password_required: Whether `users.create` needs a password, as the service's setting.
        categories: The catalogue of categories, as the service's setting, such as
            `{"security": {"email": "required", "push": "on"}}`; None: names are free.
        api_keys: The service keys that it knows, each with its scopes, such as
            `{"sender's key": [Scope.USERS_READ]}`; None: whoever calls may do everything.

    Attributes:
        clock: The time of the fake; a client that is given it waits for nothing real.
        feedback: What was reported with `client.feedback.report`, oldest first, without repeats of
            a request. Clear it as you like.
        requests: What the fake was asked, oldest first. Clear it as you like.
    """

    def __init__(
        self,
        *,
        clock: VirtualClock | None = None,
        default_timezone: str = "UTC",
        password_required: bool = True,
        categories: Categories | None = None,
        api_keys: Mapping[str, Iterable[Scope]] | None = None,
    ) -> None:
        self.clock = clock or VirtualClock()
        self.requests: list[AskedRequest] = []
        self._directory = Directory(
            self.clock,
            default_timezone=default_timezone,
            password_required=password_required,
            catalogue=_catalogue(categories),
        )
        keys = None if api_keys is None else {key: frozenset(of) for key, of in api_keys.items()}
        self._routes = Routes(self._directory, self.clock, keys)
        self.feedback: list[FeedbackItem] = self._routes.feedback
        self._faults: Script[_Failure | _Drop] = Script()
        self._delays: Script[float] = Script()
        self._refuses = False
        self._users = 0

    # Users, as a test wants them

    def user(
        self,
        *,
        name: str | None = None,
        email: str | None = None,
        password: str = PASSWORD,
        phone: str | None = None,
        external_id: str | None = None,
        locale: str | None = None,
        push: bool | UnsetType = UNSET,
        preferences: PreferencesUpdate | None = None,
        devices: Iterable[DeviceOf] = (),
        email_deliverable: bool = True,
    ) -> User:
        """Register a user. What is not said has a default that no other user has.

        Args:
            name: 1 to 200 characters.
            email: Unique.
            password: 8 to 128 characters; only a digest of it is kept.
            phone: In E.164 form, such as `+48221234567`.
            external_id: The id in your own system, unique.
            locale: A language tag, such as `pl-PL`.
            push: Short for `preferences=PreferencesUpdate(push=…)`.
            preferences: What is not named is: email and push on, no quiet hours.
            devices: Registered in this order, so the last one is `devices[0]` of the document.
            email_deliverable: False: the address is suppressed.

        Raises:
            ValueError: the service would refuse this; it names every bad field.
        """
        self._users += 1
        said = preferences or PreferencesUpdate()
        request = CreateUser(
            name=f"User {self._users}" if name is None else name,
            email=f"user{self._users}@example.com" if email is None else email,
            password=password,
            phone=phone,
            external_id=external_id,
            locale=locale,
            preferences=said if push is UNSET else msgspec.structs.replace(said, push=push),
        )
        if not email_deliverable:
            self.suppress(request.email)
        with _Editing():
            user = self._directory.register(_checked(request))
        for device in devices:
            if isinstance(device, tuple):
                token, platform = device
                self.register_device(user.id, token, platform)
            else:
                self.register_device(
                    user.id, device.token, device.platform, app=device.app, active=device.active
                )
        return self.document(user.id)

    def document(self, user_id: str) -> User:
        """Return a user's document as it is now, without a request.

        Raises:
            LookupError: nobody has this id.
        """
        with _Editing():
            return self._directory.get(user_id)

    def update_user(
        self,
        user_id: str,
        *,
        name: str | UnsetType = UNSET,
        email: str | UnsetType = UNSET,
        phone: str | UnsetType | None = UNSET,
        external_id: str | UnsetType | None = UNSET,
        locale: str | UnsetType | None = UNSET,
    ) -> User:
        """Change a profile. What is omitted stays, None clears; raises as all edits do.

        Raises:
            LookupError: nobody has this id.
            ValueError: the service would refuse this; it names every bad field.
        """
        request = UserUpdate(
            name=name, email=email, phone=phone, external_id=external_id, locale=locale
        )
        with _Editing():
            return self._directory.update(user_id, _checked(request), None)

    def update_preferences(
        self,
        user_id: str,
        *,
        email: bool | UnsetType = UNSET,
        push: bool | UnsetType = UNSET,
        quiet_hours_start: str | UnsetType | None = UNSET,
        quiet_hours_end: str | UnsetType | None = UNSET,
        timezone: str | UnsetType | None = UNSET,
        muted_until: datetime | UnsetType | None = UNSET,
        categories: Mapping[str, CategoryUpdate | None] | UnsetType | None = UNSET,
    ) -> User:
        """Change preferences, as `client.preferences.update` does; raises as `update_user`."""
        request = PreferencesUpdate(
            email=email,
            push=push,
            quiet_hours_start=quiet_hours_start,
            quiet_hours_end=quiet_hours_end,
            timezone=timezone,
            muted_until=muted_until,
            categories=dict(categories) if isinstance(categories, Mapping) else categories,
        )
        with _Editing():
            self._directory.update_preferences(user_id, _checked(request), None)
            return self._directory.get(user_id)

    def register_device(
        self,
        user_id: str,
        token: str,
        platform: Platform = "ios",
        *,
        app: str | None = None,
        active: bool = True,
    ) -> DeviceDetails:
        """Register a token, which may move here from another user; raises as `update_user`."""
        request = RegisterDevice(token=token, platform=platform, app=app, active=active)
        with _Editing():
            return self._directory.register_device(user_id, _checked(request), None).device

    def update_device(self, user_id: str, device_id: str, *, active: bool) -> DeviceDetails:
        """Switch a device on or off; raises as `update_user`."""
        with _Editing():
            return self._directory.update_device(user_id, device_id, active=active, condition=None)[
                0
            ]

    def remove_device(self, user_id: str, device_id: str) -> None:
        """Remove a device; raises as `update_user`."""
        with _Editing():
            self._directory.remove_device(user_id, device_id, None)

    def delete_user(self, user_id: str) -> None:
        """Erase a user; raises as `update_user`."""
        with _Editing():
            self._directory.erase(user_id, None)
        self._routes.forget(user_id)

    # Feedback and settings

    def suppress(self, address: str) -> None:
        """Suppress an address, whoever has it or will have it, as a hard bounce of now does.

        Raises:
            ValueError: it is no address.
        """
        self.report(EmailFeedback(address=address, reason="hard_bounce", at=self.clock.now()))

    def lift_suppression(self, user_id: str) -> User:
        """Let a user's address be tried again; raises as `update_user`."""
        with _Editing():
            self._directory.lift_suppression(user_id, None)
            return self._directory.get(user_id)

    def report(self, *items: FeedbackItem) -> tuple[FeedbackResult, ...]:
        """Take feedback that another sender reports, and return what each report did.

        Raises:
            ValueError: the service would refuse this; it names every bad field.
        """
        with _Editing():
            return tuple(self._directory.report(_checked(ReportFeedback(items=list(items))).items))

    def use_categories(self, categories: Categories | None) -> None:
        """Have another catalogue, as after a restart with another setting: what users said stays.

        No version rises and no event tells of it: copies of before are no longer confirmed.
        """
        self._directory.use_catalogue(_catalogue(categories))

    # What goes wrong

    def fail(
        self,
        *,
        status: int = 503,
        times: int | None = 1,
        route: Route = None,
        code: ErrorCode | None = None,
        retry_after: float | datetime | None = None,
        after_processing: bool = False,
    ) -> None:
        """Answer the next requests with an error.

        Args:
            status: The HTTP status. One that the service never answers with, such as 502 or 504,
                comes without the envelope, as from a proxy.
            times: How many requests; None: all, until `clear_faults`.
            route: Which requests; see `Route`.
            code: The code of the error, which brings its status along; None: a usual one.
            retry_after: Seconds, rounded up, or an instant, for the header `Retry-After`.
            after_processing: What was asked for is done all the same: a gateway gave up too early.
        """
        code = code or _OF_STATUS.get(status)
        headers = {} if retry_after is None else {"Retry-After": _retry_after(retry_after)}
        if code is None:
            answer: Answer | Refusal = Answer(
                status, {"Content-Type": "text/html", **headers}, b"<h1>The gateway failed</h1>\n"
            )
        else:
            status = STATUS_OF[code]
            answer = Refusal(code, headers=headers)
        self._faults.add(
            Fault("fail", f"status={status}", _Failure(answer, after_processing), times, route)
        )

    def drop(
        self, *, times: int | None = 1, route: Route = None, after_processing: bool = True
    ) -> None:
        """Drop the connection of the next requests, in place of an answer.

        Args:
            times: How many requests; None: all, until `clear_faults`.
            route: Which requests; see `Route`.
            after_processing: What was asked for has happened (nobody but the caller does not know).
                False: it has not, which the caller does not know either.
        """
        said = f"after_processing={after_processing}"
        self._faults.add(Fault("drop", said, _Drop(after_processing), times, route))

    def delay(self, seconds: float, *, times: int | None = 1, route: Route = None) -> None:
        """Answer the next requests late: the clock moves on meanwhile.

        A request that waits for less than that (its time-out for reading) is processed, and raises
        `httpx.ReadTimeout`. Comes on top of `fail` and `drop`.

        Args:
            seconds: How late, in seconds of the fake's clock.
            times: How many requests; None: all, until `clear_faults`.
            route: Which requests; see `Route`.
        """
        self._delays.add(Fault("delay", f"seconds={seconds:g}", seconds, times, route))

    def clear_faults(self) -> None:
        """Forget what `fail`, `drop` and `delay` scripted, used or not."""
        self._faults.clear()
        self._delays.clear()

    def unused_faults(self) -> list[str]:
        """Describe what was scripted and did not happen, or not as often as it was to."""
        return [*self._faults.unused(), *self._delays.unused()]

    def lose(self, *dependencies: Literal["postgres", "redis"]) -> None:
        """Have `/health` say that these are down, and no others; `lose()`: that all is well.

        Everything else is answered as before: see `fail`.
        """
        self._routes.down = frozenset(dependencies)

    def refuse_connections(self) -> None:
        """Be dead: streams break, and nobody can connect, until `accept_connections`."""
        self._refuses = True
        self.break_streams()

    def accept_connections(self) -> None:
        """Be alive again, with all that was there."""
        self._refuses = False

    # The change stream

    def break_streams(self, *, gracefully: bool = False) -> None:
        """End all change streams: the connection breaks, or, `gracefully`, the answer ends."""
        broken = None if gracefully else httpx.ReadError("The fake broke this stream")
        self._directory.feed.break_streams(broken)

    def stall_feed(self) -> None:
        """Have no change come through: heartbeats go on, and their `through` stands still."""
        self._directory.feed.stall()

    def resume_feed(self) -> None:
        """Have the changes come through again, those of meanwhile first."""
        self._directory.feed.go_on()

    def prune_feed(self) -> None:
        """Forget the changes so far: who has not read them is told `reset` (`age`)."""
        self._directory.feed.prune()

    def renew_epoch(self) -> None:
        """Begin another epoch, as after a restore: streams end, and are told `reset`."""
        self._directory.renew_epoch()

    @property
    def open_streams(self) -> int:
        """How many change streams are open."""
        return self._directory.feed.streams

    # The transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer a request, or raise what the connection would end with."""
        ask = Ask.of(request, await request.aread())
        # As with a real connection, others have their turn before the answer comes.
        await asyncio.sleep(0)
        match = find_route(ask.method, ask.path)
        operation = match and match.operation
        number = len(self.requests)
        asked = AskedRequest(
            operation, ask.method, request.url.path, ask.params, ask.headers, _shown(ask.body)
        )
        self.requests.append(asked)
        if self._refuses:
            raise httpx.ConnectError("The fake refuses connections", request=request)
        what = (operation, ask.method, ask.path)
        delay, fault = self._delays.take(*what) or 0.0, self._faults.take(*what)
        patience = _patience(request)
        if delay > patience:
            self._process(ask, fault)
            await self.clock.sleep(patience)
            raise httpx.ReadTimeout("The fake was told to be late", request=request)
        if delay:
            await self.clock.sleep(delay)
        answer = self._process(ask, fault)
        if answer is None:
            raise httpx.ReadError("The fake was told to drop this connection", request=request)
        if number < len(self.requests) and self.requests[number] is asked:
            self.requests[number] = _answered(asked, answer.status)
        return answer.response(ask)

    def _process(self, ask: Ask, fault: _Failure | _Drop | None) -> Answer | None:
        """Do what is asked for, if the fault lets it; returns what the caller gets to see."""
        if fault is None:
            return self._routes.answer(ask)
        if fault.after_processing:
            done = self._routes.answer(ask)
            if done.stream is not None:
                self._directory.feed.unsubscribe(done.stream)
        if isinstance(fault, _Drop):
            return None
        return failure(fault.answer, ask) if isinstance(fault.answer, Refusal) else fault.answer


class _Editing:
    """Turns what the service would refuse into what a test's author is told."""

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Translate."""
        if isinstance(error, RuleViolation):
            raise ValueError(str(error)) from error  # noqa: TRY004 - no matter of types
        if isinstance(error, Refusal):
            details = "; ".join(f"{one.field}: {one.message}" for one in error.details)
            kind = LookupError if error.status == 404 else ValueError
            raise kind(details or MESSAGES[error.code]) from error


def _catalogue(said: Categories | None) -> Catalogue | None:
    """Return a catalogue; raises `ValueError` that names everything that is wrong with it."""
    if said is None or isinstance(said, Catalogue):
        return said
    with _Editing():
        return Catalogue.parse(said if isinstance(said, str) else msgspec.json.encode(said))


def _checked(request: S) -> S:
    """Return the request as the service would read it: trimmed, and judged."""
    return convert_request(msgspec.to_builtins(request), type(request))


def _answered(asked: AskedRequest, status: int) -> AskedRequest:
    return replace(asked, status=status)


def _shown(body: bytes) -> object:
    """Return a decoded body without its passwords, which nobody is to keep."""
    try:
        decoded: object = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if isinstance(decoded, dict):
        return {name: "…" if name in _SECRETS else value for name, value in decoded.items()}
    return decoded


def _patience(request: httpx.Request) -> float:
    """Return for how many seconds a request waits for its answer."""
    limits: object = request.extensions.get("timeout")
    limit = limits.get("read") if isinstance(limits, dict) else None
    return float(limit) if isinstance(limit, (int, float)) else math.inf


def _retry_after(value: float | datetime) -> str:
    if isinstance(value, datetime):
        return format_datetime(value.astimezone(UTC), usegmt=True)
    return str(math.ceil(value))
