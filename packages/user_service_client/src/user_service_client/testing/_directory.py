"""The users of the fake, and the rules by which they change: what the service keeps in Postgres."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

import msgspec
from msgspec import UNSET
from user_service_schemas import (
    DEACTIVATING,
    RULES,
    Catalogue,
    ChangeKind,
    Choices,
    Consent,
    CreateUser,
    Decision,
    Device,
    DeviceDetails,
    EmailFeedback,
    ErrorCode,
    FeedbackItem,
    FeedbackResult,
    FieldError,
    LookupUsers,
    PasswordUpdate,
    PreferenceChange,
    Preferences,
    PreferencesRevision,
    PreferencesUpdate,
    PushFeedback,
    RegisterDevice,
    ResolveDeliveries,
    User,
    UserUpdate,
    canonical_email,
    check_delivery,
    decide,
    effective_preferences,
    merge_preferences,
    preference_changes,
    token_digest,
)

from ._checks import email_key, judge_password, judge_registration, phone_key, profile_values
from ._clock import VirtualClock
from ._feed import Feed
from ._refusals import MESSAGES, Refusal, invalid

MAX_ACTIVE_DEVICES = 20
MAX_DEVICES = 100
RETENTION = timedelta(days=30)
"""For how long a device that is not active is kept."""

Condition = Callable[[int], bool]
"""Whether a version is one that `If-Match` names."""

APPLIED, IGNORED, UNKNOWN = "applied", "ignored", "unknown"
_FEEDBACK_KINDS = (
    ChangeKind.ADDRESS_SUPPRESSED,
    ChangeKind.PREFERENCES_UPDATED,
    ChangeKind.DEVICE_UPDATED,
)
"""What feedback does to a user; of several kinds at once, the first is the one that is told."""

_FOUND_BY = ("email_key", "phone", "external_id")
_WITHOUT_STEP = frozenset({ChangeKind.USER_CREATED, ChangeKind.PASSWORD_UPDATED})


@dataclass
class _Device:
    """A device as it is kept; the rest of it is what is shown."""

    digest: bytes
    shown: DeviceDetails
    deactivated_at: datetime | None

    def set(
        self,
        *,
        active: bool,
        at: datetime,
        reason: str = "deactivated",
        registered_at: datetime | None = None,
    ) -> None:
        """Switch it on or off."""
        self.deactivated_at = None if active else at
        self.shown = msgspec.structs.replace(
            self.shown,
            active=active,
            inactive_reason=None if active else reason,
            registered_at=registered_at or self.shown.registered_at,
        )


@dataclass
class _Account:
    """A user as it is kept."""

    id: str
    profile: dict[str, str | None]
    password: bytes | None
    choices: Choices
    created_at: datetime
    updated_at: datetime
    version: int = 1
    devices: dict[str, _Device] = field(default_factory=dict)
    history: list[tuple[int, PreferencesRevision]] = field(default_factory=list)

    def newest_first(self) -> list[DeviceDetails]:
        """Return the devices, newest registration first."""
        shown = [device.shown for device in self.devices.values()]
        return sorted(shown, key=lambda one: (one.registered_at, one.id), reverse=True)


@dataclass
class _Suppression:
    """An address that a hard bounce has suppressed, whoever has it, until it is lifted."""

    lifted_at: datetime | None = None


class Registration(NamedTuple):
    """What became of a token."""

    device: DeviceDetails
    version: int
    is_new: bool


class Directory:
    """All users, and the feed of their changes.

    Methods raise `Refusal`, before they have changed anything.
    """

    def __init__(
        self,
        clock: VirtualClock,
        *,
        default_timezone: str,
        password_required: bool,
        catalogue: Catalogue | None,
    ) -> None:
        self._clock = clock
        self._default_timezone = default_timezone
        self._password_required = password_required
        self._random = random.Random(1)  # noqa: S311 - no secret
        self.use_catalogue(catalogue)
        self.feed = Feed(clock, self._new_epoch())
        self._accounts: dict[str, _Account] = {}
        # Who has an email, a telephone number or an external id; and who registered a token last:
        # whether it is still there, the devices say.
        self._having: dict[tuple[str, str], dict[str, _Account]] = {}
        self._registrants: dict[bytes, _Account] = {}
        self._suppressions: dict[str, _Suppression] = {}
        self._made = 0
        self._revisions = 0
        self._latest = clock.now()

    @property
    def epoch(self) -> str:
        """The epoch of which all versions are."""
        return self.feed.epoch

    def renew_epoch(self) -> None:
        """Begin another epoch."""
        self.feed.renew(self._new_epoch())

    def use_catalogue(self, catalogue: Catalogue | None) -> None:
        """Have these categories from now on, which makes all documents others."""
        self._catalogue = catalogue
        shape = [msgspec.json.schema(User), RULES, self._default_timezone, catalogue]
        self.format = hashlib.sha256(msgspec.json.encode(shape)).hexdigest()[:8]

    def etag(self, version: int) -> str:
        """Return the entity tag of a version."""
        return f'"{self.epoch}.{self.format}.{version}"'

    def new_id(self) -> str:
        """Return an id that sorts behind all that were made before (as UUIDs of version 7 do)."""
        self._made += 1
        ordered = self._made << 32 | self._random.getrandbits(32)
        milliseconds = int(self._clock.now().timestamp() * 1000)
        high, low = ordered >> 62, ordered & (1 << 62) - 1
        digits = f"{milliseconds << 80 | 7 << 76 | high << 64 | 2 << 62 | low:032x}"
        return "-".join([digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]])

    # Reading

    def get(self, user_id: str) -> User:
        """Return a user's document."""
        return self._shown(self._account(user_id, None))

    def find(self, user_id: str) -> User | None:
        """Return a user's document, or None."""
        account = self._accounts.get(user_id)
        return None if account is None else self._shown(account)

    def page(self, after: str | None, limit: int) -> list[User]:
        """Return users behind an id, oldest registration first."""
        ids = sorted(user_id for user_id in self._accounts if after is None or user_id > after)
        return [self._shown(self._accounts[user_id]) for user_id in ids[:limit]]

    def lookup(self, request: LookupUsers) -> list[User]:
        """Find users by email, telephone number or external id."""
        if request.email is not UNSET:
            field_, value = "email_key", _checked("email", email_key, request.email)
        elif request.phone is not UNSET:
            field_, value = "phone", _checked("phone", phone_key, request.phone)
        else:
            field_, value = "external_id", str(request.external_id)
        found = sorted(self._who_has(field_, value), key=lambda one: one.id)
        return [self._shown(one) for one in found]

    def history(
        self, user_id: str, before: int | None, limit: int
    ) -> list[tuple[int, PreferencesRevision]]:
        """Return entries of the consent history below a number, newest first."""
        entries = self._account(user_id, None).history
        return [entry for entry in reversed(entries) if before is None or entry[0] < before][:limit]

    def devices(self, user_id: str) -> tuple[list[DeviceDetails], int]:
        """Return all devices of a user, and the user's version."""
        account = self._account(user_id, None)
        return account.newest_first(), account.version

    # Users

    def register(self, request: CreateUser) -> User:
        """Register a user."""
        errors = self.judge(request, CreateUser)
        if errors:
            raise invalid(errors)
        values, _ = profile_values(request)
        choices = merge_preferences(Choices(), request.preferences, self._catalogue)
        self._refuse_taken(values, None)
        now = self._now()
        account = _Account(
            id=self.new_id(),
            profile=values,
            password=None if request.password is None else _digest(request.password),
            choices=_kept(choices),
            created_at=now,
            updated_at=now,
        )
        self._accounts[account.id] = account
        self._enter(account)
        consent = request.preferences.consent or None
        self._append_history(account, preference_changes(None, choices), consent, 1)
        self._conclude({account.id: ChangeKind.USER_CREATED})
        return self._shown(account)

    def update(self, user_id: str, request: UserUpdate, condition: Condition | None) -> User:
        """Change a profile."""
        values, errors = profile_values(request)
        if errors:
            raise invalid(errors)
        account = self._account(user_id, condition)
        fresh = {name: value for name, value in values.items() if account.profile[name] != value}
        if fresh:
            self._refuse_taken(fresh, user_id)
            self._leave(account)
            account.profile |= fresh
            self._enter(account)
            self._conclude({user_id: ChangeKind.USER_UPDATED})
        return self._shown(account)

    def erase(self, user_id: str, condition: Condition | None) -> None:
        """Erase a user."""
        self._account(user_id, condition)
        self._conclude({user_id: ChangeKind.USER_DELETED})
        self._leave(self._accounts.pop(user_id))

    def set_password(
        self, user_id: str, request: PasswordUpdate, condition: Condition | None
    ) -> None:
        """Set a password."""
        account = self._account(user_id, None)
        about = {name: str(account.profile[name]) for name in ("email", "name")}
        errors = judge_password(request.password, **about)
        if errors:
            raise invalid(errors)
        current = request.current_password
        if current is not None and _digest(current) != account.password:
            raise Refusal(ErrorCode.INVALID_CREDENTIALS)
        self._account(user_id, condition)
        account.password = _digest(request.password)
        self._conclude({user_id: ChangeKind.PASSWORD_UPDATED})

    def judge(self, valid: object, type_: type) -> list[FieldError]:
        """Return what is wrong, beyond its type, with a body that fits its type, or parts of it."""
        if valid is UNSET:
            return []
        if type_ is CreateUser:
            return judge_registration(
                valid, password_required=self._password_required, catalogue=self._catalogue
            )
        return profile_values(valid)[1] if type_ is UserUpdate else []

    def verify(self, email: str, password: str) -> str:
        """Return whose email and password these are."""
        with contextlib.suppress(ValueError):
            for account in self._who_has("email_key", email_key(email)):
                if account.password == _digest(password):
                    return account.id
        raise Refusal(ErrorCode.INVALID_CREDENTIALS)

    # Preferences

    def update_preferences(
        self, user_id: str, request: PreferencesUpdate, condition: Condition | None
    ) -> tuple[Preferences, int]:
        """Merge a change into a user's preferences; returns them and the user's version."""
        account = self._account(user_id, condition)
        before = account.choices
        after = merge_preferences(before, request, self._catalogue)
        consent = request.consent or None
        changes = preference_changes(before, after)
        if changes or consent:
            version = account.version + bool(changes)
            self._append_history(account, changes, consent, version)
        account.choices = _kept(after)
        self._conclude({user_id: ChangeKind.PREFERENCES_UPDATED} if changes else {})
        return self._shown(account).preferences, account.version

    # Devices

    def register_device(
        self, user_id: str, request: RegisterDevice, condition: Condition | None
    ) -> Registration:
        """Register a token. Another user's moves here."""
        account = self._account(user_id, condition)
        digest = token_digest(request.token)
        owner, known = self._owner(digest)
        changed: dict[str, ChangeKind] = {}
        if known is not None and owner is account:
            device, is_new = known, False
            before = known.shown
            self._renew(known, request)
            if _told(before) != _told(known.shown):
                changed[user_id] = ChangeKind.DEVICE_UPDATED
        else:
            device, is_new = self._new_device(digest, request), True
            kind = ChangeKind.DEVICE_REGISTERED
            if known is not None and owner is not None:
                del owner.devices[known.shown.id]
                changed[owner.id] = kind = ChangeKind.DEVICE_MOVED
            account.devices[device.shown.id] = device
            self._registrants[digest] = account
            changed[user_id] = kind
        self._bound(account, device, changed)
        self._conclude(changed)
        return Registration(device.shown, account.version, is_new)

    def update_device(
        self, user_id: str, device_id: str, *, active: bool, condition: Condition | None
    ) -> tuple[DeviceDetails, int]:
        """Switch a device on or off; returns it and the user's version."""
        account, device = self._device(user_id, device_id, condition)
        changed: dict[str, ChangeKind] = {}
        if device.shown.active != active:
            now = self._now()
            device.set(active=active, at=now, registered_at=now if active else None)
            changed[user_id] = ChangeKind.DEVICE_UPDATED
            self._bound(account, device, changed)
        self._conclude(changed)
        return device.shown, account.version

    def remove_device(self, user_id: str, device_id: str, condition: Condition | None) -> int:
        """Delete a device; returns the user's version."""
        account, _ = self._device(user_id, device_id, condition)
        del account.devices[device_id]
        self._conclude({user_id: ChangeKind.DEVICE_REMOVED})
        return account.version

    # Deliveries and feedback

    def resolve(self, request: ResolveDeliveries) -> list[Decision]:
        """Decide on a delivery to each recipient; raises `RuleViolation`."""
        check_delivery(request.channel, request.category, request.priority, self._catalogue)
        at = request.at or self._clock.now()
        return [
            decide(
                self.find(user_id),
                request.channel,
                at,
                category=request.category,
                priority=request.priority,
                app=request.app,
                explain=request.explain,
                user_id=user_id,
            )
            for user_id in map(str.lower, request.user_ids)
        ]

    def report(self, items: Iterable[FeedbackItem]) -> list[FeedbackResult]:
        """Take what providers said, each report after those before it, all or none."""
        items = list(items)
        wrong = [
            FieldError(field=f"items[{number}].address", message="This is not an email address.")
            for number, item in enumerate(items)
            if isinstance(item, EmailFeedback) and not _is_address(item.address)
        ]
        if wrong:
            raise invalid(wrong)
        changed: dict[str, set[ChangeKind]] = {}
        results = [
            self._report_token(item, changed)
            if isinstance(item, PushFeedback)
            else self._report_address(item, changed)
            for item in items
        ]
        self._conclude(
            {
                user_id: next(kind for kind in _FEEDBACK_KINDS if kind in kinds)
                for user_id, kinds in changed.items()
            }
        )
        return [FeedbackResult(result=result) for result in results]

    def lift_suppression(self, user_id: str, condition: Condition | None) -> int:
        """Let a user's address be tried again; returns the user's version."""
        account = self._account(user_id, condition)
        if not self._is_deliverable(account):
            self._suppressions[str(account.profile["email_key"])].lifted_at = self._now()
            self._conclude({user_id: ChangeKind.ADDRESS_RESTORED})
        return account.version

    def _report_token(self, item: PushFeedback, changed: dict[str, set[ChangeKind]]) -> str:
        if item.reason not in DEACTIVATING:
            return IGNORED
        account, device = self._owner(token_digest(item.token))
        if account is None or device is None:
            return UNKNOWN
        if not device.shown.active or device.shown.last_seen_at > self._time_of(item):
            return IGNORED
        device.set(active=False, at=self._now(), reason=item.reason)
        changed.setdefault(account.id, set()).add(ChangeKind.DEVICE_UPDATED)
        return APPLIED

    def _report_address(self, item: EmailFeedback, changed: dict[str, set[ChangeKind]]) -> str:
        key = canonical_email(item.address)
        account = next(iter(self._who_has("email_key", key)), None)
        if item.reason == "hard_bounce":
            known = self._suppressions.get(key)
            if known is not None and (
                known.lifted_at is None or known.lifted_at > self._time_of(item)
            ):
                return IGNORED
            self._suppressions[key] = _Suppression()
            if account is not None:
                changed.setdefault(account.id, set()).add(ChangeKind.ADDRESS_SUPPRESSED)
            return APPLIED
        if item.reason != "complaint":
            return IGNORED
        if account is None:
            return UNKNOWN
        if not account.choices.email or self._opted_in_after(account, self._time_of(item)):
            return IGNORED
        before = account.choices
        account.choices = msgspec.structs.replace(before, email=False)
        # One report, one version, whatever else it says of the user.
        version = account.version + 1
        consent = Consent(source="feedback")
        changes = preference_changes(before, account.choices)
        self._append_history(account, changes, consent, version)
        changed.setdefault(account.id, set()).add(ChangeKind.PREFERENCES_UPDATED)
        return APPLIED

    def _time_of(self, item: FeedbackItem) -> datetime:
        """Return the time of a report: one of now, or of the future, is after all that happened."""
        return self._now() if item.at >= self._clock.now() else item.at

    def _opted_in_after(self, account: _Account, at: datetime) -> bool:
        """Whether the user has switched email on again since: an old complaint does not undo it."""
        return any(
            revision.at > at
            for _, revision in account.history
            for change in revision.changes
            if (change.field, change.before, change.after) == ("email", False, True)
        )

    def _is_deliverable(self, account: _Account) -> bool:
        suppression = self._suppressions.get(str(account.profile["email_key"]))
        return suppression is None or suppression.lifted_at is not None

    # What they stand on

    def _new_epoch(self) -> str:
        return f"{self._random.getrandbits(32):08x}"

    def _now(self) -> datetime:
        """Return a time after all others: what is ordered by time has one order."""
        self._latest = max(self._clock.now(), self._latest + timedelta(microseconds=1))
        return self._latest

    def _account(self, user_id: str, condition: Condition | None) -> _Account:
        account = self._accounts.get(user_id)
        if account is None:
            raise Refusal(ErrorCode.USER_NOT_FOUND)
        if condition is not None and not condition(account.version):
            raise Refusal(ErrorCode.VERSION_MISMATCH, headers={"ETag": self.etag(account.version)})
        return account

    def _device(
        self, user_id: str, device_id: str, condition: Condition | None
    ) -> tuple[_Account, _Device]:
        account = self._account(user_id, condition)
        if device_id not in account.devices:
            raise Refusal(ErrorCode.DEVICE_NOT_FOUND)
        return account, account.devices[device_id]

    def _shown(self, account: _Account) -> User:
        profile = account.profile
        return User(
            id=account.id,
            external_id=profile["external_id"],
            name=str(profile["name"]),
            email=str(profile["email"]),
            phone=profile["phone"],
            locale=profile["locale"],
            email_deliverable=self._is_deliverable(account),
            preferences=effective_preferences(
                account.choices, self._default_timezone, self._catalogue
            ),
            devices=tuple(
                Device(
                    id=one.id,
                    token=one.token,
                    platform=one.platform,
                    app=one.app,
                    active=one.active,
                    registered_at=one.registered_at,
                )
                for one in account.newest_first()
                if one.active
            ),
            version=account.version,
            rules=RULES,
            created_at=account.created_at,
            updated_at=account.updated_at,
        )

    def _refuse_taken(self, values: dict[str, str | None], user_id: str | None) -> None:
        for key, name, code in (
            ("email_key", "email", ErrorCode.EMAIL_TAKEN),
            ("external_id", "external_id", ErrorCode.EXTERNAL_ID_TAKEN),
        ):
            value = values.get(key)
            if value is None:
                continue
            if any(other.id != user_id for other in self._who_has(key, value)):
                raise Refusal(code, FieldError(field=name, message=MESSAGES[code]))

    def _append_history(
        self,
        account: _Account,
        changes: tuple[PreferenceChange, ...],
        consent: Consent | None,
        version: int,
    ) -> None:
        self._revisions += 1
        revision = PreferencesRevision(
            version=version,
            at=self._now(),
            actor=None,
            source=consent.source if consent else None,
            policy_version=consent.policy_version if consent else None,
            changes=changes,
        )
        account.history.append((self._revisions, revision))

    def _owner(self, digest: bytes) -> tuple[_Account | None, _Device | None]:
        account = self._registrants.get(digest)
        if account is not None and account.id in self._accounts:
            for device in account.devices.values():
                if device.digest == digest:
                    return account, device
        return None, None

    def _who_has(self, name: str, value: str) -> Iterable[_Account]:
        return self._having.get((name, value), {}).values()

    def _enter(self, account: _Account) -> None:
        for name in _FOUND_BY:
            value = account.profile[name]
            if value is not None:
                self._having.setdefault((name, value), {})[account.id] = account

    def _leave(self, account: _Account) -> None:
        for name in _FOUND_BY:
            value = account.profile[name]
            if value is not None:
                del self._having[name, value][account.id]

    def _new_device(self, digest: bytes, request: RegisterDevice) -> _Device:
        now = self._now()
        device = _Device(
            digest,
            DeviceDetails(
                id=self.new_id(),
                token=request.token,
                platform=request.platform,
                app=request.app,
                active=True,
                registered_at=now,
                last_seen_at=now,
                inactive_reason=None,
            ),
            None,
        )
        device.set(active=request.active, at=now)
        return device

    def _renew(self, device: _Device, request: RegisterDevice) -> None:
        now, was = self._now(), device.shown
        device.shown = msgspec.structs.replace(
            was, token=request.token, platform=request.platform, app=request.app, last_seen_at=now
        )
        if request.active != was.active:
            device.set(active=request.active, at=now, registered_at=now if request.active else None)

    def _bound(self, account: _Account, kept: _Device, changed: dict[str, ChangeKind]) -> None:
        """Hold a user to the caps: the least recently seen is switched off, `kept` never."""
        active = [one for one in account.devices.values() if one.shown.active and one is not kept]
        active.sort(key=lambda one: (one.shown.last_seen_at, one.shown.id), reverse=True)
        if kept.shown.active and active[MAX_ACTIVE_DEVICES - 1 :]:
            for device in active[MAX_ACTIVE_DEVICES - 1 :]:
                device.set(active=False, at=self._now(), reason="evicted")
            changed.setdefault(account.id, ChangeKind.DEVICE_UPDATED)
        now = self._now()
        off = [one for one in account.devices.values() if one.deactivated_at is not None]
        off.sort(key=lambda one: (one.deactivated_at or now, one.shown.id), reverse=True)
        room = MAX_DEVICES - (len(account.devices) - len(off))
        for number, device in enumerate(off):
            if number >= room or (device.deactivated_at or now) < now - RETENTION:
                del account.devices[device.shown.id]

    def _conclude(self, changed: dict[str, ChangeKind]) -> None:
        """Raise the versions, and append the changes to the feed."""
        for user_id, kind in changed.items():
            account, now = self._accounts[user_id], self._now()
            if kind not in _WITHOUT_STEP:
                account.version += 1
                account.updated_at = now
            self.feed.append(user_id, account.version, kind, now)
        self.feed.publish()


def _told(device: DeviceDetails) -> Sequence[object]:
    """Return what of a device is more than that it was seen."""
    return device.token, device.platform, device.app, device.active


def _kept(choices: Choices) -> Choices:
    """Return choices as they come back from the service's database: jsonb orders its keys."""

    def order(key: str) -> tuple[int, str]:
        return len(key), key

    categories = {
        name: {channel: said[channel] for channel in sorted(said, key=order)}
        for name, said in sorted(choices.categories.items(), key=lambda item: order(item[0]))
    }
    return msgspec.structs.replace(choices, categories=categories)


def _is_address(text: str) -> bool:
    try:
        canonical_email(text)
    except ValueError:
        return False
    return True


def _digest(password: str) -> bytes:
    return hashlib.sha256(password.encode()).digest()


def _checked(name: str, check: Callable[[str], str], value: str) -> str:
    try:
        return check(value)
    except ValueError as error:
        raise invalid([FieldError(field=name, message=str(error))]) from error
