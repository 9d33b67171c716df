"""The client of the User Service.

    async with UserServiceClient("http://user-service:3001", api_key=key) as client:
        user = await client.users.create(name="Ann", email="ann@example.com", password=password)
        user = await client.users.get(user.id)  # from the client's own copies, once read
        await client.devices.register(user.id, token=token, platform="ios")
        await client.preferences.update(user.id, push=False, timezone=None)  # None clears
        user, etag = await client.users.get_with_etag(user.id)
        await client.users.update(user.id, name="Anna", if_version=etag)  # or VersionMismatch
        batch = await client.users.get_many(ids)  # batch.users in order, batch.missing
        async for user in client.users.list():
            print(user.id, user.preferences.email, [d.token for d in user.devices])

Methods return frozen structs and raise `UserServiceError`s (the tree is in `errors`).
"""

from __future__ import annotations

from msgspec import UNSET, UnsetType
from user_service_schemas import (
    BatchOfUsers,
    CategoryUpdate,
    Change,
    ChangeKind,
    Changes,
    Channel,
    Channels,
    Consent,
    Decision,
    DeliveryDevice,
    Dependency,
    Device,
    DeviceDetails,
    EmailFeedback,
    ErrorCode,
    Explanation,
    FeedbackItem,
    FeedbackResult,
    FieldError,
    Health,
    Platform,
    PreferenceChange,
    Preferences,
    PreferencesRevision,
    PreferencesUpdate,
    Priority,
    PushFeedback,
    Reason,
    UnknownRules,
    User,
    Verdict,
)

from user_service_client._cache import CachedUser, CacheOptions, CacheStats
from user_service_client._calls import (
    ApiKey,
    CallOptions,
    CreateOptions,
    Id,
    ReadOptions,
    WriteOptions,
)
from user_service_client._clock import Clock
from user_service_client._deadline import deadline_scope
from user_service_client._stream import ClientStatus
from user_service_client._transport import TransportFactory
from user_service_client.client import UserServiceClient
from user_service_client.errors import (
    ApiError,
    BadRequest,
    CircuitOpen,
    Conflict,
    DeadlineExceeded,
    DecodeError,
    Forbidden,
    Invalid,
    MaybeProcessed,
    NotFound,
    NotSent,
    RateLimited,
    ServerError,
    Unauthenticated,
    UserServiceError,
    VersionMismatch,
)
from user_service_client.hooks import (
    AttemptEvent,
    CacheEvent,
    CacheResult,
    Hooks,
    RetryEvent,
    StreamEvent,
    StreamState,
    Tracing,
)

__all__ = [
    "UNSET",
    "ApiError",
    "ApiKey",
    "AttemptEvent",
    "BadRequest",
    "BatchOfUsers",
    "CacheEvent",
    "CacheOptions",
    "CacheResult",
    "CacheStats",
    "CachedUser",
    "CallOptions",
    "CategoryUpdate",
    "Change",
    "ChangeKind",
    "Changes",
    "Channel",
    "Channels",
    "CircuitOpen",
    "ClientStatus",
    "Clock",
    "Conflict",
    "Consent",
    "CreateOptions",
    "DeadlineExceeded",
    "Decision",
    "DecodeError",
    "DeliveryDevice",
    "Dependency",
    "Device",
    "DeviceDetails",
    "EmailFeedback",
    "ErrorCode",
    "Explanation",
    "FeedbackItem",
    "FeedbackResult",
    "FieldError",
    "Forbidden",
    "Health",
    "Hooks",
    "Id",
    "Invalid",
    "MaybeProcessed",
    "NotFound",
    "NotSent",
    "Platform",
    "PreferenceChange",
    "Preferences",
    "PreferencesRevision",
    "PreferencesUpdate",
    "Priority",
    "PushFeedback",
    "RateLimited",
    "ReadOptions",
    "Reason",
    "RetryEvent",
    "ServerError",
    "StreamEvent",
    "StreamState",
    "Tracing",
    "TransportFactory",
    "Unauthenticated",
    "UnknownRules",
    "UnsetType",
    "User",
    "UserServiceClient",
    "UserServiceError",
    "Verdict",
    "VersionMismatch",
    "WriteOptions",
    "deadline_scope",
]
