"""The contract of the User Service: its structs, error codes and pure rules. No I/O."""

from __future__ import annotations

from ._base import FrozenDict, Request, Response
from .changes import Change, ChangeKind, Changes, Heartbeat, Reset
from .devices import Device, DeviceDetails, DeviceUpdate, RegisterDevice
from .envelope import Envelope, Error, FieldError, Page, Problem
from .errors import STATUS_OF, ErrorCode
from .feedback import (
    MAX_FEEDBACK,
    EmailFeedback,
    FeedbackItem,
    FeedbackResult,
    PushFeedback,
    ReportFeedback,
)
from .fields import Platform
from .health import Dependency, Health, Probe
from .preferences import (
    MAX_CATEGORIES,
    CategoryUpdate,
    Channels,
    Choices,
    Consent,
    PreferenceChange,
    Preferences,
    PreferencesRevision,
    PreferencesUpdate,
)
from .requests import MalformedJSON, convert_request, decode_request
from .rules import (
    CHANNELS,
    RuleViolation,
    canonical_email,
    effective_preferences,
    merge_preferences,
    preference_changes,
    time_zones,
    token_digest,
)
from .users import (
    MAX_BATCH,
    RULES,
    BatchOfUsers,
    BatchUsers,
    CreateUser,
    FoundUsers,
    LookupUsers,
    PasswordUpdate,
    User,
    UserUpdate,
)

__all__ = [
    "CHANNELS",
    "MAX_BATCH",
    "MAX_CATEGORIES",
    "MAX_FEEDBACK",
    "RULES",
    "STATUS_OF",
    "BatchOfUsers",
    "BatchUsers",
    "CategoryUpdate",
    "Change",
    "ChangeKind",
    "Changes",
    "Channels",
    "Choices",
    "Consent",
    "CreateUser",
    "Dependency",
    "Device",
    "DeviceDetails",
    "DeviceUpdate",
    "EmailFeedback",
    "Envelope",
    "Error",
    "ErrorCode",
    "FeedbackItem",
    "FeedbackResult",
    "FieldError",
    "FoundUsers",
    "FrozenDict",
    "Health",
    "Heartbeat",
    "LookupUsers",
    "MalformedJSON",
    "Page",
    "PasswordUpdate",
    "Platform",
    "PreferenceChange",
    "Preferences",
    "PreferencesRevision",
    "PreferencesUpdate",
    "Probe",
    "Problem",
    "PushFeedback",
    "RegisterDevice",
    "ReportFeedback",
    "Request",
    "Reset",
    "Response",
    "RuleViolation",
    "User",
    "UserUpdate",
    "canonical_email",
    "convert_request",
    "decode_request",
    "effective_preferences",
    "merge_preferences",
    "preference_changes",
    "time_zones",
    "token_digest",
]
