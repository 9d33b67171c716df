"""The rules of feedback: which report takes effect, and how much of one caller's may."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, NamedTuple, TypeAlias

from user_service_schemas import (
    DEACTIVATING,
    ChangeKind,
    EmailFeedback,
    FeedbackItem,
    FeedbackResult,
    FieldError,
    PushFeedback,
    canonical_email,
    token_digest,
)

from ..devices import repository as devices
from ..errors import Invalid, Overloaded, RateLimited
from ..metrics import Metrics
from ..settings import Settings
from ..storage.document import EntityTags
from ..storage.documents import Documents, Write
from ..storage.recorded_answers import Recorder
from ..users.repository import email_name
from . import repository
from .repository import Address, Counts, Subject

MANY_NAMES = 64
"""Names that a report may lock while another does; one with more waits for those that have."""
AT_ONCE = 4
"""Reports that a process takes at once: one caller's wait for each other in the end, and must not
hold all connections while they do."""
TURN_WITHIN = 3.0
"""Seconds that a report waits until it is taken."""
HOUR = 3600
SOURCE = "feedback"
"""What the consent history says of a complaint."""

Result: TypeAlias = Literal["applied", "ignored", "unknown"]
APPLIED: Final = "applied"
IGNORED: Final = "ignored"
UNKNOWN: Final = "unknown"

_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)


class _PushReport(NamedTuple):
    """A report that may deactivate the device of a token."""

    digest: bytes
    reason: str
    at: datetime


class _EmailReport(NamedTuple):
    """A report that may suppress an address, or be an opt-out of whoever has it."""

    key: str
    name: bytes
    is_complaint: bool
    at: datetime


_Report: TypeAlias = _PushReport | _EmailReport | None
"""None: to be counted only."""


class Feedback:
    """What can be done with reports about tokens and addresses."""

    def __init__(self, settings: Settings, documents: Documents, metrics: Metrics) -> None:
        self._max_per_hour = settings.feedback_max_per_hour
        self._documents = documents
        self._metrics = metrics
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def report(
        self, items: Sequence[FeedbackItem], caller: str, recorder: Recorder
    ) -> list[FeedbackResult]:
        """Take up to 1000 reports, all or none; returns what became of each, in their order.

        Each is judged by itself, after those before it.

        Raises:
            Invalid: an address is none.
            RateLimited: the caller would do more than `FEEDBACK_MAX_PER_HOUR` allows.
            Overloaded: too many others report.
        """
        reports = _understand(items)
        try:
            async with asyncio.timeout(TURN_WITHIN):
                await self._turns.acquire()
        except TimeoutError:
            raise Overloaded from None
        try:
            results = await self._write(reports, caller, recorder)
        finally:
            self._turns.release()
        counted = Counter(
            (item.__struct_config__.tag, item.reason, result.result)
            for item, result in zip(items, results, strict=True)
        )
        for labels, number in counted.items():
            self._metrics.feedback.labels(*labels).inc(number)
        return results

    async def _write(
        self, reports: Sequence[_Report], caller: str, recorder: Recorder
    ) -> list[FeedbackResult]:
        async with self._documents.write(None, recorder) as write:
            verdict = await self._judge(write, reports)
            if verdict.applied:
                await _apply(write, verdict)
                await self._brake(write, caller, verdict.applied)
            return await write.conclude(lambda: [FeedbackResult(result=r) for r in verdict.results])

    async def _judge(self, write: Write, reports: Sequence[_Report]) -> _Verdict:
        """Decide on reports, and lock the users whom they change, and no one else."""
        names = {r.digest if isinstance(r, _PushReport) else r.name for r in reports if r}
        connection = write.connection
        if not names:
            return _Verdict([IGNORED] * len(reports))
        if len(names) > MANY_NAMES:
            await repository.lock_large_reports(connection)
        # Whose a token or an address is stays so from here on, unless they give it up.
        await write.lock_names(*names)
        now = await devices.read_clock(connection)
        digests = list({r.digest for r in reports if isinstance(r, _PushReport)})
        addresses = {r.key: r.name for r in reports if isinstance(r, _EmailReport)}
        known = _Known(
            now,
            await repository.read_tokens(connection, digests),
            await repository.read_addresses(connection, addresses),
        )
        verdict = known.judge(reports)
        if not verdict.users:
            return verdict
        rows = await write.lock_users(*verdict.users)
        # Again: until they were locked, the users could have changed what the reports are about.
        known = _Known(
            now,
            await repository.read_tokens(connection, digests, lock=True),
            await repository.read_addresses(connection, addresses),
        )
        verdict = known.judge(reports, among=rows)
        verdict.versions = {user_id: rows[user_id].version for user_id in verdict.users}
        return verdict

    async def _brake(self, write: Write, caller: str, wanted: int) -> None:
        """Count what a caller does, exactly and across servers; raises `RateLimited`.

        Last before the conclusion: until the commit, the caller's other reports wait here.
        """
        counts = await repository.lock_counts(write.connection, caller)
        wait = _seconds_to_wait(counts, wanted, self._max_per_hour)
        if wait is not None:
            self._metrics.feedback_braked.inc()
            raise RateLimited(
                retry_after=wait,
                message=f"More than {self._max_per_hour} reports would take effect in an hour."
                " Nothing of this request was applied.",
            )
        await repository.count(write.connection, caller, wanted)

    async def restore(self, user_id: str, if_match: EntityTags | None, recorder: Recorder) -> int:
        """Let a user's address be tried again; returns the user's version.

        Raises:
            UserNotFound, VersionMismatch
            Overloaded: they got another address just now.
        """
        async with self._documents.write(user_id, recorder) as write:
            # Whoever registers with the address has its name, and has seen that it is suppressed.
            key = await repository.read_email_key(write.connection, user_id)
            if key is not None:
                await write.lock_names(email_name(key))
            row = await write.lock_user(user_id, if_match)
            if row.email_key != key:
                raise Overloaded
            if not row.email_deliverable:
                await repository.lift(write.connection, email_name(row.email_key))
                await repository.set_deliverable(write.connection, [user_id], deliverable=True)
                write.changed(user_id, ChangeKind.ADDRESS_RESTORED)
            return await write.conclude(lambda: write.document.version)


def _understand(items: Iterable[FeedbackItem]) -> list[_Report]:
    """Return what may take effect of each item; raises `Invalid`."""
    reports: list[_Report] = []
    errors: list[FieldError] = []
    for number, item in enumerate(items):
        report: _Report = None
        if isinstance(item, PushFeedback):
            if item.reason in DEACTIVATING:
                report = _PushReport(token_digest(item.token), item.reason, item.at)
        else:
            try:
                report = _email_report(item)
            except ValueError:
                place = f"items[{number}].address"
                errors.append(FieldError(field=place, message="This is not an email address."))
        reports.append(report)
    if errors:
        raise Invalid(*errors)
    return reports


def _email_report(item: EmailFeedback) -> _EmailReport | None:
    key = canonical_email(item.address)
    if item.reason == "soft_bounce":
        return None
    return _EmailReport(key, email_name(key), item.reason == "complaint", item.at)


@dataclass
class _Verdict:
    """What becomes of reports: the answer to each, and what is to be changed."""

    results: list[Result] = field(default_factory=list)
    off: dict[str, str] = field(default_factory=dict)
    """Devices, and why they are deactivated."""
    suppressed: dict[bytes, tuple[str, datetime]] = field(default_factory=dict)
    undeliverable: set[str] = field(default_factory=set)
    opted_out: set[str] = field(default_factory=set)
    deactivated: set[str] = field(default_factory=set)
    """Users, of whose devices some are."""
    versions: dict[str, int] = field(default_factory=dict)
    """Of the users, before the change."""

    @property
    def users(self) -> set[str]:
        """Whose documents change."""
        return self.undeliverable | self.opted_out | self.deactivated

    @property
    def applied(self) -> int:
        """How many reports take effect."""
        return self.results.count(APPLIED)


@dataclass
class _Known:
    """What is known of the tokens and addresses that reports are about."""

    now: datetime
    tokens: dict[bytes, Subject]
    addresses: dict[str, Address]

    def judge(self, reports: Sequence[_Report], among: Container[str] | None = None) -> _Verdict:
        """Decide on reports one after the other.

        `among`: the users who are locked. The others have nothing to be changed: when it was looked
        at before, they had not, and that was as good a time as any.
        """
        verdict = _Verdict()
        for report in reports:
            if report is None:
                result: Result = IGNORED
            elif isinstance(report, _PushReport):
                result = self._judge_token(report, verdict, among)
            elif report.is_complaint:
                result = self._judge_complaint(report, verdict, among)
            else:
                result = self._judge_bounce(report, verdict, among)
            verdict.results.append(result)
        return verdict

    def _judge_token(
        self, report: _PushReport, verdict: _Verdict, among: Container[str] | None
    ) -> Result:
        device = self.tokens.get(report.digest)
        if device is None:
            return UNKNOWN
        if not device.active or device.id in verdict.off or _is_foreign(device.user_id, among):
            return IGNORED
        if device.last_seen_at > self._time(report.at):
            return IGNORED
        verdict.off[device.id] = report.reason
        verdict.deactivated.add(device.user_id)
        return APPLIED

    def _judge_complaint(
        self, report: _EmailReport, verdict: _Verdict, among: Container[str] | None
    ) -> Result:
        user_id, wants_email, opted_in_at, *_ = self.addresses[report.key]
        if user_id is None:
            return UNKNOWN
        if not wants_email or user_id in verdict.opted_out or _is_foreign(user_id, among):
            return IGNORED
        # The same complaint, told again, must not undo what the user has said since.
        if opted_in_at is not None and opted_in_at > self._time(report.at):
            return IGNORED
        verdict.opted_out.add(user_id)
        return APPLIED

    def _judge_bounce(
        self, report: _EmailReport, verdict: _Verdict, among: Container[str] | None
    ) -> Result:
        address, at = self.addresses[report.key], self._time(report.at)
        is_suppressed = address.suppressed_at is not None and address.lifted_at is None
        if is_suppressed or report.name in verdict.suppressed:
            return IGNORED
        if address.lifted_at is not None and address.lifted_at > at:
            return IGNORED
        if address.user_id is not None:
            if _is_foreign(address.user_id, among):
                return IGNORED
            verdict.undeliverable.add(address.user_id)
        verdict.suppressed[report.name] = ("hard_bounce", at)
        return APPLIED

    def _time(self, at: datetime) -> datetime:
        """Return the time of a report: one in the future counts as now."""
        return max(_EARLIEST, min(at, self.now)).astimezone(UTC)


def _is_foreign(user_id: str, among: Container[str] | None) -> bool:
    return among is not None and user_id not in among


async def _apply(write: Write, verdict: _Verdict) -> None:
    """Change what was decided. Of one user, the first kind named here is the one that is logged."""
    connection = write.connection
    if verdict.suppressed:
        await repository.suppress(connection, verdict.suppressed)
    if verdict.undeliverable:
        await repository.set_deliverable(connection, list(verdict.undeliverable), deliverable=False)
    if verdict.opted_out:
        versions = {user_id: verdict.versions[user_id] + 1 for user_id in verdict.opted_out}
        await repository.opt_out(connection, versions, source=SOURCE, actor=write.actor)
    if verdict.off:
        await devices.switch_off(connection, verdict.off)
    for users, kind in (
        (verdict.undeliverable, ChangeKind.ADDRESS_SUPPRESSED),
        (verdict.opted_out, ChangeKind.PREFERENCES_UPDATED),
        (verdict.deactivated, ChangeKind.DEVICE_UPDATED),
    ):
        for user_id in users:
            write.changed(user_id, kind)


def _seconds_to_wait(counts: Counts, wanted: int, limit: int) -> int | None:
    """Return when `wanted` more may be applied; None: now.

    A minute counts until it is over for an hour. What is more than the limit by itself never may.
    """
    excess = sum(applied for _, applied in counts.by_minute) + wanted - limit
    if excess <= 0:
        return None
    for minute, applied in counts.by_minute:
        excess -= applied
        if excess <= 0:
            free_at = minute + timedelta(minutes=61)
            return max(1, math.ceil((free_at - counts.now).total_seconds()))
    return HOUR
