"""The contract of the User Service: its structs, error codes and pure rules. No I/O."""

from __future__ import annotations

from ._base import FrozenDict, Request, Response
from .catalogue import Catalogue, Mode
from .changes import Change, ChangeKind, Changes, Heartbeat, Reset
from .credentials import VerifiedUser, VerifyCredentials
from .decisions import UnknownRules, check_delivery, decide, is_decidable
from .deliveries import (
    MAX_RECIPIENTS,
    Decision,
    DeliveryDevice,
    Explanation,
    Reason,
    ResolveDeliveries,
    Verdict,
)
from .devices import Device, DeviceDetails, DeviceUpdate, RegisterDevice
from .envelope import Envelope, Error, FieldError, Page, Problem
from .errors import STATUS_OF, ErrorCode, RuleViolation
from .feedback import (
    DEACTIVATING,
    MAX_FEEDBACK,
    EmailFeedback,
    EmailReason,
    FeedbackItem,
    FeedbackResult,
    PushFeedback,
    PushReason,
    ReportFeedback,
)
from .fields import CHANNELS, Channel, Platform, Priority
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
from .providers import from_apns, from_fcm, from_ses, from_smtp, from_webpush
from .requests import MalformedJSON, convert_request, decode_request
from .rules import (
    canonical_email,
    effective_preferences,
    merge_preferences,
    preference_changes,
    token_digest,
)
from .scopes import Scope
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
from .zones import time_zones

__all__ = [
    "CHANNELS",
    "DEACTIVATING",
    "MAX_BATCH",
    "MAX_CATEGORIES",
    "MAX_FEEDBACK",
    "MAX_RECIPIENTS",
    "RULES",
    "STATUS_OF",
    "BatchOfUsers",
    "BatchUsers",
    "Catalogue",
    "CategoryUpdate",
    "Change",
    "ChangeKind",
    "Changes",
    "Channel",
    "Channels",
    "Choices",
    "Consent",
    "CreateUser",
    "Decision",
    "DeliveryDevice",
    "Dependency",
    "Device",
    "DeviceDetails",
    "DeviceUpdate",
    "EmailFeedback",
    "EmailReason",
    "Envelope",
    "Error",
    "ErrorCode",
    "Explanation",
    "FeedbackItem",
    "FeedbackResult",
    "FieldError",
    "FoundUsers",
    "FrozenDict",
    "Health",
    "Heartbeat",
    "LookupUsers",
    "MalformedJSON",
    "Mode",
    "Page",
    "PasswordUpdate",
    "Platform",
    "PreferenceChange",
    "Preferences",
    "PreferencesRevision",
    "PreferencesUpdate",
    "Priority",
    "Probe",
    "Problem",
    "PushFeedback",
    "PushReason",
    "Reason",
    "RegisterDevice",
    "ReportFeedback",
    "Request",
    "Reset",
    "ResolveDeliveries",
    "Response",
    "RuleViolation",
    "Scope",
    "UnknownRules",
    "User",
    "UserUpdate",
    "Verdict",
    "VerifiedUser",
    "VerifyCredentials",
    "canonical_email",
    "check_delivery",
    "convert_request",
    "decide",
    "decode_request",
    "effective_preferences",
    "from_apns",
    "from_fcm",
    "from_ses",
    "from_smtp",
    "from_webpush",
    "is_decidable",
    "merge_preferences",
    "preference_changes",
    "time_zones",
    "token_digest",
]
