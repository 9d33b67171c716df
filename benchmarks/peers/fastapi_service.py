"""Owns the peer: the same recipient directory on FastAPI, Pydantic, SQLAlchemy's ORM and Redis.

    DATABASE_URL=postgresql+asyncpg://… REDIS_URL=… PORT=… python fastapi_service.py

It is written as a competent engineer would who wants it fast, and knows these libraries well; the
README beside it says what was done for that, and what each of it gave. It imports nothing of ours
and runs in an environment of its own: `fastapi.txt`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import gc
import hashlib
import logging
import os
import sys
import unicodedata
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar
from uuid import UUID
from zoneinfo import available_timezones

import uvicorn
from argon2 import PasswordHasher
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    EmailStr,
    Field,
    StringConstraints,
)
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import (
    ForeignKey,
    Index,
    Text,
    and_,
    bindparam,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
)
from sqlalchemy.orm.attributes import set_committed_value
from starlette.exceptions import HTTPException
from uuid_utils.compat import uuid7

CACHE_TTL = 300
"""Seconds that a document stays in Redis."""
MAX_ACTIVE_DEVICES = 20
MAX_CATEGORIES = 100
RULES = 1
"""What our service says of its delivery rules, which the peer does not have."""
JSON = "application/json"
# Of 16 or 64 concurrent requests, those that miss or write hold a connection for a part of their
# time. More would only wait in PostgreSQL, which has the same two cores.
POOL_SIZE = 20

T = TypeVar("T")
_log = logging.getLogger("peer")


# What is kept


class Base(DeclarativeBase):
    """Every time has its zone, a string no bound but the request's, and JSON is binary."""

    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own form
        datetime: TIMESTAMP(timezone=True),
        str: Text(),
        dict[str, dict[str, bool]]: JSONB(),
    }


class User(Base):
    __tablename__ = "users"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    external_id: Mapped[str | None] = mapped_column(unique=True)
    name: Mapped[str]
    email: Mapped[str]
    email_key: Mapped[str] = mapped_column(unique=True)
    phone: Mapped[str | None]
    locale: Mapped[str | None]
    email_deliverable: Mapped[bool]
    password_hash: Mapped[str | None]
    version: Mapped[int]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]

    preferences: Mapped[Preferences] = relationship(lazy="raise")
    devices: Mapped[list[Device]] = relationship(
        primaryjoin=lambda: and_(Device.user_id == User.id, Device.active),
        order_by=lambda: (Device.registered_at.desc(), Device.id.desc()),
        lazy="raise",
        viewonly=True,
    )

    @property
    def rules(self) -> int:
        return RULES


class Preferences(Base):
    __tablename__ = "preferences"

    user_id: Mapped[UUID] = mapped_column(ForeignKey(User.id), primary_key=True)
    email: Mapped[bool]
    push: Mapped[bool]
    quiet_hours_start: Mapped[str | None]
    quiet_hours_end: Mapped[str | None]
    timezone: Mapped[str | None]
    muted_until: Mapped[datetime | None]
    categories: Mapped[dict[str, dict[str, bool]]]

    @property
    def effective_timezone(self) -> str:
        return self.timezone or "UTC"


class Device(Base):
    __tablename__ = "devices"
    __table_args__ = (Index("ix_devices_user_id", "user_id"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey(User.id))
    token: Mapped[str]
    token_digest: Mapped[bytes] = mapped_column(unique=True)
    platform: Mapped[str]
    app: Mapped[str | None]
    active: Mapped[bool]
    inactive_reason: Mapped[str | None]
    registered_at: Mapped[datetime]
    last_seen_at: Mapped[datetime]


# Statements are made once, so that SQLAlchemy need not look at their parts again. A user has few
# devices: that the rows of a join repeat the user costs less than a second statement does.
_WHOLE = (joinedload(User.preferences, innerjoin=True), joinedload(User.devices))
_BY_ID = select(User).where(User.id == bindparam("user_id")).options(*_WHOLE)
_BY_EMAIL = select(User).where(User.email_key == bindparam("email_key")).options(*_WHOLE)
# A page's devices come at once in a second statement, since LIMIT counts the rows of a join.
_PARTS = (joinedload(User.preferences, innerjoin=True), selectinload(User.devices))
_PAGE = select(User).order_by(User.id).limit(bindparam("count")).options(*_PARTS)
_PAGE_AFTER = _PAGE.where(User.id > bindparam("after"))
_LOCKED_WITH_PREFERENCES = (
    select(User)
    .where(User.id == bindparam("user_id"))
    .options(joinedload(User.preferences, innerjoin=True))
    .with_for_update(of=User)
)
# All that a registration has to know, in one round trip.
_LOCKED_WITH_TOKEN = (
    select(
        User,
        Device,
        select(func.count())
        .where(Device.user_id == bindparam("user_id"), Device.active)
        .correlate(None)
        .scalar_subquery(),
    )
    .outerjoin(Device, Device.token_digest == bindparam("token_digest"))
    .where(User.id == bindparam("user_id"))
    .with_for_update(of=User)
)


# What is said


class Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class ShownChannels(Answer):
    email: bool = True
    push: bool = True


class ShownPreferences(Answer):
    email: bool
    push: bool
    quiet_hours_start: str | None
    quiet_hours_end: str | None
    timezone: str | None
    effective_timezone: str
    muted_until: datetime | None
    categories: dict[str, ShownChannels]


class ShownDevice(Answer):
    id: UUID
    token: str
    platform: str
    app: str | None
    active: bool
    registered_at: datetime


class ShownDeviceDetails(ShownDevice):
    last_seen_at: datetime
    inactive_reason: str | None


class ShownUser(Answer):
    id: UUID
    external_id: str | None
    name: str
    email: str
    phone: str | None
    locale: str | None
    email_deliverable: bool
    preferences: ShownPreferences
    devices: list[ShownDevice]
    version: int
    rules: int
    created_at: datetime
    updated_at: datetime


class FoundUsers(Answer):
    users: list[ShownUser]


class UserPage(Answer):
    items: list[ShownUser]
    next_cursor: str | None


class FieldError(Answer):
    field: str
    message: str


class Error(Answer):
    code: str
    details: list[FieldError] = []
    request_id: str | None = None


class Envelope(Answer, Generic[T]):
    success: bool
    data: T
    message: str
    error: Error | None


# What is asked


def _is_a_zone(name: str) -> str:
    if name not in _ZONES:
        raise ValueError("this is not an IANA time zone")
    return name


_ZONES = available_timezones()
Zone: TypeAlias = Annotated[str, AfterValidator(_is_a_zone)]
TimeOfDay: TypeAlias = Annotated[str, Field(pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$")]
CategoryName: TypeAlias = Annotated[str, Field(pattern=r"^[a-z0-9_.-]{1,64}$")]
Password: TypeAlias = Annotated[
    str, StringConstraints(min_length=8, max_length=128, strip_whitespace=False)
]


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)


class CategoryUpdate(Asked):
    email: bool | None = None
    push: bool | None = None


class Consent(Asked):
    source: str
    policy_version: str | None = None


class PreferencesUpdate(Asked):
    """What is omitted keeps its value; `model_fields_set` tells it from null."""

    email: bool = True
    push: bool = True
    quiet_hours_start: TimeOfDay | None = None
    quiet_hours_end: TimeOfDay | None = None
    timezone: Zone | None = None
    muted_until: AwareDatetime | None = None
    categories: dict[CategoryName, CategoryUpdate | None] | None = None
    consent: Consent | None = None


class CreateUser(Asked):
    name: Annotated[str, Field(min_length=1, max_length=200)]
    email: EmailStr
    password: Password
    phone: Annotated[str, Field(pattern=r"^\+[1-9][0-9]{1,14}$")] | None = None
    external_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    locale: Annotated[str, Field(pattern="^[A-Za-z0-9]+(-[A-Za-z0-9]+)*$")] | None = None
    preferences: PreferencesUpdate = PreferencesUpdate()


class RegisterDevice(Asked):
    token: Annotated[str, Field(min_length=1, max_length=4096)]
    platform: Literal["web", "ios", "android"]
    app: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    active: bool = True


class LookupUsers(Asked):
    email: EmailStr


class Refused(HTTPException):
    """An answer that is an error, with its code."""

    def __init__(self, status: int, code: str, message: str, *details: FieldError) -> None:
        super().__init__(status, message)
        self.code = code
        self.details = details


class UserNotFound(Refused):
    def __init__(self) -> None:
        super().__init__(404, "user_not_found", "No user has this id.")


# What is done


class Cached:
    """Documents as they are sent, in Redis, each under its ETag: a hit decodes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def get(self, user_id: UUID) -> tuple[str, bytes] | None:
        try:
            kept: bytes | None = await self._redis.get(f"user:{user_id}")  # type: ignore[assignment]  # not decoded
        except RedisError as error:
            _log.warning("not read from Redis: %s", error)
            return None
        if kept is None:
            return None
        etag, _, body = kept.partition(b"\n")
        return etag.decode(), body

    async def put(self, user_id: UUID, etag: str, body: bytes) -> None:
        try:
            await self._redis.set(f"user:{user_id}", b"%b\n%b" % (etag.encode(), body), CACHE_TTL)
        except RedisError as error:
            _log.warning("not kept in Redis: %s", error)

    async def drop(self, *user_ids: UUID) -> None:
        """Delete what a write has made old: whoever read it before may still put it back."""
        try:
            await self._redis.delete(*(f"user:{user_id}" for user_id in user_ids))
        except RedisError as error:
            _log.warning("not deleted in Redis: %s", error)


class Directory:
    """Users, their preferences and their devices."""

    def __init__(self, engine: AsyncEngine, cached: Cached) -> None:
        # A read is one statement or two, whose BEGIN and ROLLBACK would be as many round trips.
        reading = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._reading = async_sessionmaker(reading, expire_on_commit=False)
        self._writing = async_sessionmaker(engine, expire_on_commit=False)
        self._cached = cached
        self._hasher = PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)
        self._hashing = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "argon2")

    async def get(self, user_id: UUID) -> tuple[str, bytes]:
        """Return a user's ETag and the answer, from Redis or else from PostgreSQL."""
        if (kept := await self._cached.get(user_id)) is not None:
            return kept
        async with self._reading() as session:
            found = await session.scalars(_BY_ID, {"user_id": user_id})
            user = found.unique().one_or_none()
        if user is None:
            raise UserNotFound
        etag, body = etag_of(user), render(ShownUser.model_validate(user), "User retrieved")
        await self._cached.put(user_id, etag, body)
        return etag, body

    async def find(self, email: str) -> Sequence[User]:
        async with self._reading() as session:
            return (await session.scalars(_BY_EMAIL, {"email_key": key_of(email)})).unique().all()

    async def list_after(self, after: UUID | None, count: int) -> Sequence[User]:
        async with self._reading() as session:
            if after is None:
                return (await session.scalars(_PAGE, {"count": count})).all()
            return (await session.scalars(_PAGE_AFTER, {"after": after, "count": count})).all()

    async def register(self, asked: CreateUser) -> ShownUser:
        loop = asyncio.get_running_loop()
        # Hashed before a connection is taken, which would be held for 18 ms.
        password_hash = await loop.run_in_executor(self._hashing, self._hasher.hash, asked.password)
        now, user_id = datetime.now(UTC), uuid7()
        preferences = Preferences(
            user_id=user_id,
            email=True,
            push=True,
            quiet_hours_start=None,
            quiet_hours_end=None,
            timezone=None,
            muted_until=None,
            categories={},
        )
        merge(preferences, asked.preferences)
        user = User(
            id=user_id,
            external_id=asked.external_id,
            name=asked.name,
            email=asked.email,
            email_key=key_of(asked.email),
            phone=asked.phone,
            locale=asked.locale,
            email_deliverable=True,
            password_hash=password_hash,
            version=1,
            created_at=now,
            updated_at=now,
            preferences=preferences,
        )
        try:
            async with self._writing.begin() as session:
                session.add(user)
        except IntegrityError as error:
            if "external_id" in str(error.orig):
                raise Refused(
                    409, "external_id_taken", "Another user has this external id."
                ) from None
            raise Refused(409, "email_taken", "Another user has this email.") from None
        set_committed_value(user, "devices", [])
        return ShownUser.model_validate(user)

    async def update_preferences(
        self, user_id: UUID, asked: PreferencesUpdate
    ) -> tuple[User, Preferences]:
        async with self._writing.begin() as session:
            user = await session.scalar(_LOCKED_WITH_PREFERENCES, {"user_id": user_id})
            if user is None:
                raise UserNotFound
            merge(user.preferences, asked)
            is_changed = session.is_modified(user.preferences)
            if is_changed:
                touch(user)
        if is_changed:
            await self._cached.drop(user_id)
        return user, user.preferences

    async def register_device(
        self, user_id: UUID, asked: RegisterDevice
    ) -> tuple[User, Device, bool]:
        """Register a token, or see it again; returns whether it is new to the user."""
        digest = hashlib.sha256(asked.token.encode()).digest()
        changed: set[UUID] = set()
        try:
            async with self._writing.begin() as session:
                found = await session.execute(
                    _LOCKED_WITH_TOKEN, {"user_id": user_id, "token_digest": digest}
                )
                if (row := found.one_or_none()) is None:
                    raise UserNotFound
                user, device, active = row
                is_new = device is None or device.user_id != user_id
                if device is not None and is_new:
                    await self._take_away(session, device)
                    changed.add(device.user_id)
                now = datetime.now(UTC)
                joins = asked.active and (is_new or not device.active)
                if joins and active >= MAX_ACTIVE_DEVICES:
                    await self._evict(session, user_id)
                if is_new:
                    device = Device(id=uuid7(), user_id=user_id, token_digest=digest)
                    session.add(device)
                if is_new or joins:
                    device.registered_at = now
                device.token, device.platform = asked.token, asked.platform
                device.app, device.active = asked.app, asked.active
                device.inactive_reason = None if asked.active else "deactivated"
                if is_new or session.is_modified(device):
                    touch(user)
                    changed.add(user_id)
                device.last_seen_at = now
        except IntegrityError:
            raise Refused(409, "conflict", "This token is being registered. Try again.") from None
        if changed:
            await self._cached.drop(*changed)
        return user, device, is_new

    @staticmethod
    async def _take_away(session: AsyncSession, device: Device) -> None:
        """Take a token from its owner: the last login wins."""
        await session.delete(device)
        await session.flush()
        await session.execute(
            update(User)
            .where(User.id == device.user_id)
            .values(version=User.version + 1, updated_at=func.now()),
            execution_options={"synchronize_session": False},
        )

    @staticmethod
    async def _evict(session: AsyncSession, user_id: UUID) -> None:
        """Make room for one more active device."""
        least_recently_seen = (
            select(Device.id)
            .where(Device.user_id == user_id, Device.active)
            .order_by(Device.last_seen_at.desc(), Device.id.desc())
            .offset(MAX_ACTIVE_DEVICES - 1)
        )
        await session.execute(
            update(Device)
            .where(Device.id.in_(least_recently_seen))
            .values(active=False, inactive_reason="evicted"),
            execution_options={"synchronize_session": False},
        )


def merge(preferences: Preferences, asked: PreferencesUpdate) -> None:
    """Change what was named, and nothing else."""
    for name in asked.model_fields_set - {"categories", "consent"}:
        setattr(preferences, name, getattr(asked, name))
    if "categories" in asked.model_fields_set:
        # Another dict: SQLAlchemy compares it with the one before.
        said = {} if asked.categories is None else dict(preferences.categories)
        for name, category in (asked.categories or {}).items():
            if category is None:
                said.pop(name, None)
                continue
            switches = {**said.get(name, {}), **category.model_dump(exclude_unset=True)}
            said[name] = {channel: on for channel, on in switches.items() if on is not None}
        preferences.categories = said
    start, end = preferences.quiet_hours_start, preferences.quiet_hours_end
    if (start is None) != (end is None):
        raise invalid("quiet_hours_end", "Both ends of the quiet hours are expected, or neither.")
    if start is not None and start == end:
        raise invalid("quiet_hours_end", "The ends of the quiet hours must differ.")
    if len(preferences.categories) > MAX_CATEGORIES:
        raise invalid("categories", f"At most {MAX_CATEGORIES} categories are expected.")


def touch(user: User) -> None:
    """Raise the version of a locked user."""
    user.version += 1
    user.updated_at = datetime.now(UTC)


def key_of(email: str) -> str:
    return unicodedata.normalize("NFC", email).lower()


def etag_of(user: User | ShownUser) -> str:
    return f'"{user.version}"'


def render(data: Answer, message: str) -> bytes:
    """Return the body of an answer: Pydantic's Rust writes it, and FastAPI is not asked to."""
    envelope: Envelope[Any] = Envelope(success=True, data=data, message=message, error=None)
    return envelope.model_dump_json().encode()


def answer(
    data: Answer, message: str, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(render(data, message), status, headers, JSON)


def invalid(field: str, message: str) -> Refused:
    return Refused(
        422,
        "validation_failed",
        "The request has fields that are not valid.",
        FieldError(field=field, message=message),
    )


async def refuse(_request: Request, refused: Exception) -> Response:
    """Answer an error in the envelope, an unknown route's and a bad body's included."""
    assert isinstance(refused, HTTPException)
    if not isinstance(refused, Refused):
        code = {404: "route_not_found", 405: "method_not_allowed"}.get(refused.status_code, "error")
        refused = Refused(refused.status_code, code, refused.detail)
    error = Error(code=refused.code, details=list(refused.details))
    envelope: Envelope[Any] = Envelope(
        success=False, data=None, message=refused.detail, error=error
    )
    return Response(envelope.model_dump_json(), refused.status_code, media_type=JSON)


async def refuse_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if any(one["type"] == "json_invalid" for one in error.errors()):
        return await refuse(request, Refused(400, "malformed_json", "The body is not valid JSON."))
    if any(one["loc"] == ("path", "user_id") for one in error.errors()):
        return await refuse(request, UserNotFound())
    details = [
        FieldError(field=".".join(map(str, one["loc"][1:])) or "body", message=one["msg"])
        for one in error.errors()
    ]
    message = "The request has fields that are not valid."
    return await refuse(request, Refused(422, "validation_failed", message, *details))


# What is served


def create_app(database_url: str, redis_url: str) -> FastAPI:
    """Return the application; its lifespan makes the tables that are not there."""
    engine = create_async_engine(database_url, pool_size=POOL_SIZE, max_overflow=0)
    # A time limit costs redis-py a `wait_for` of each call, twice.
    redis = Redis.from_url(redis_url, socket_timeout=None, socket_connect_timeout=None)
    directory = Directory(engine, Cached(redis))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        gc.collect()
        gc.freeze()
        yield
        await redis.aclose()
        await engine.dispose()

    # Without its documentation, whose routes would be tried before ours, and its telemetry.
    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        exception_handlers={HTTPException: refuse, RequestValidationError: refuse_invalid},
    )

    # The hottest first: routes are tried in this order.
    @app.get("/api/v1/users/{user_id}")
    async def get_user(user_id: UUID, request: Request) -> Response:
        etag, body = await directory.get(user_id)
        headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == etag:
            return Response(None, 304, headers)
        return Response(body, 200, headers, JSON)

    @app.patch("/api/v1/users/{user_id}/preferences")
    async def update_preferences(user_id: UUID, asked: PreferencesUpdate) -> Response:
        user, preferences = await directory.update_preferences(user_id, asked)
        shown = ShownPreferences.model_validate(preferences)
        return answer(shown, "Preferences updated", headers={"ETag": etag_of(user)})

    @app.post("/api/v1/users/{user_id}/devices")
    async def register_device(user_id: UUID, asked: RegisterDevice) -> Response:
        user, device, is_new = await directory.register_device(user_id, asked)
        shown = ShownDeviceDetails.model_validate(device)
        message = "Device registered" if is_new else "Device updated"
        return answer(shown, message, 201 if is_new else 200, {"ETag": etag_of(user)})

    @app.post("/api/v1/users/")
    async def create_user(asked: CreateUser) -> Response:
        user = await directory.register(asked)
        headers = {"Location": f"/api/v1/users/{user.id}", "ETag": etag_of(user)}
        return answer(user, "User registered", 201, headers)

    @app.post("/api/v1/users/lookup")
    async def lookup_users(asked: LookupUsers) -> Response:
        found = await directory.find(asked.email)
        users = [ShownUser.model_validate(user) for user in found]
        return answer(FoundUsers(users=users), "Users looked up")

    @app.get("/api/v1/users")
    async def list_users(
        limit: Annotated[int, Query(ge=1, le=200)] = 50, cursor: str | None = None
    ) -> Response:
        try:
            after = None if cursor is None else UUID(bytes=base64.urlsafe_b64decode(cursor))
        except (ValueError, binascii.Error):
            message = "This cursor was not issued by this listing."
            raise Refused(400, "invalid_cursor", message) from None
        found = await directory.list_after(after, limit + 1)
        users = [ShownUser.model_validate(user) for user in found[:limit]]
        more = len(found) > limit
        next_cursor = base64.urlsafe_b64encode(users[-1].id.bytes).decode() if more else None
        return answer(UserPage(items=users, next_cursor=next_cursor), "Users listed")

    @app.get("/health/ready")
    async def is_ready() -> Response:
        return answer(Answer(), "Ready")

    return app


def main() -> None:
    """Serve as the environment says, until a signal ends it."""
    options: dict[str, Any] = {
        "loop": "uvloop",
        "http": "httptools",
        "ws": "none",
        "access_log": False,
        "log_level": "warning",
        "proxy_headers": False,
        "server_header": False,
        "timeout_keep_alive": 75,
    }
    app = create_app(os.environ["DATABASE_URL"], os.environ["REDIS_URL"])
    if sys.platform == "linux":
        # As the service does: nothing on its core is interrupted because something was woken.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), **options)


if __name__ == "__main__":
    main()
