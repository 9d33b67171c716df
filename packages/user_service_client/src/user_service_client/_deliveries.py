"""`client.deliveries`: may a message go to a user now?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Unpack, overload
from uuid import UUID

import msgspec
from user_service_schemas import (
    Channel,
    Decision,
    Envelope,
    ErrorCode,
    Priority,
    ResolveDeliveries,
    RuleViolation,
    User,
    decide,
    is_decidable,
)

from user_service_client._cache import CachedUser, DocumentCache, Nobody, Use, Wish
from user_service_client._calls import (
    Call,
    Calls,
    Id,
    ReadOptions,
    batches,
    id_text,
    shared_wishes,
)
from user_service_client._clock import Clock
from user_service_client.errors import DecodeError, Invalid

TRIES = 3
"""How often the service is asked that decides on what is outdated."""
PAUSE = 0.05
"""Seconds before it is asked again, and twice as many the next time: servers lag behind one another
by 20 ms."""

_DECISIONS = msgspec.json.Decoder(Envelope[tuple[Decision, ...]])


class _Question(msgspec.Struct, frozen=True):
    """What is asked of each recipient."""

    channel: Channel
    at: datetime
    category: str | None
    priority: Priority
    app: str | None
    explain: bool

    def answer(self, user: User | None, user_id: str) -> Decision:
        """Decide; raises `Invalid`, as the service would."""
        try:
            return decide(
                user,
                self.channel,
                self.at,
                category=self.category,
                priority=self.priority,
                app=self.app,
                explain=self.explain,
                user_id=user_id,
            )
        except RuleViolation as violation:
            fields = ", ".join(detail.field for detail in violation.details)
            raise Invalid(
                f"deliveries.resolve: {fields}",
                code=ErrorCode.VALIDATION_FAILED,
                details=violation.details,
                attempts=0,
            ) from None


class Deliveries:
    """Decisions, made with the client's own copies of users wherever that is possible."""

    def __init__(self, calls: Calls, cache: DocumentCache, clock: Clock) -> None:
        self._calls = calls
        self._cache = cache
        self._now = clock.now
        self._sleep = clock.sleep

    @overload
    async def resolve(  # type: ignore[overload-overlap]  # a str is an Iterable[str], and one id
        self,
        recipients: Id,
        *,
        channel: Channel,
        category: str | None = None,
        app: str | None = None,
        priority: Priority = "normal",
        at: datetime | None = None,
        explain: bool = False,
        **options: Unpack[ReadOptions],
    ) -> Decision: ...

    @overload
    async def resolve(
        self,
        recipients: Iterable[Id],
        *,
        channel: Channel,
        category: str | None = None,
        app: str | None = None,
        priority: Priority = "normal",
        at: datetime | None = None,
        explain: bool = False,
        **options: Unpack[ReadOptions],
    ) -> tuple[Decision, ...]: ...

    async def resolve(
        self,
        recipients: Id | Iterable[Id],
        *,
        channel: Channel,
        category: str | None = None,
        app: str | None = None,
        priority: Priority = "normal",
        at: datetime | None = None,
        explain: bool = False,
        **options: Unpack[ReadOptions],
    ) -> Decision | tuple[Decision, ...]:
        """Decide whether a message may go to a user, or to each of many, in their order.

        A copy that is fresh (for `fresh_for` seconds, or until a change of it is heard of) is
        decided on without a call; what is older or lacking is asked for in one request for each
        1000. `critical` always asks. If the service cannot be reached, a copy of up to `max_stale`
        seconds is decided on, but not for `critical`.

        Args:
            recipients: An id, or ids.
            channel: `email` or `push`.
            category: The kind of message, as preferences name it.
            app: For push: only that app's devices count.
            priority: `normal`; `urgent` passes over muting and quiet hours; `critical` over what
                the user has opted out of, too.
            at: When the message would go out; None: now.
            explain: Whether to tell what each rule says.
            **options: See `ReadOptions`.

        Raises:
            Invalid: what is asked for is not for senders to ask, such as an unknown category.
            DecodeError: the service has to decide, and does so on what is outdated.
        """
        question = _Question(
            channel, at or self._now(), category, priority, app and app.strip(), explain
        )
        wish = Wish(
            Use.CRITICAL if priority == "critical" else Use.DECISION,
            self._calls.deadline(options.get("timeout")),
            options.get("max_stale"),
            shared_wishes(options.get("retries"), options.get("headers")),
        )
        if isinstance(recipients, str | UUID):
            user_id = id_text(recipients)
            (decision,) = await self._resolve([user_id], question, wish, one_by_one=True)
            return decision
        ids = [id_text(recipient) for recipient in recipients]
        return tuple(await self._resolve(ids, question, wish, one_by_one=False))

    async def _resolve(
        self, ids: Sequence[str], question: _Question, wish: Wish, *, one_by_one: bool
    ) -> list[Decision]:
        unique = list(dict.fromkeys(ids))
        found = await self._cache.read_many(unique, wish, one_by_one=one_by_one)
        decisions: dict[str, Decision] = {}
        foreign: dict[str, CachedUser] = {}
        for user_id, entry in found.items():
            if isinstance(entry, Nobody):
                decisions[user_id] = question.answer(None, user_id)
            elif is_decidable(entry.user):
                decisions[user_id] = question.answer(entry.user, user_id)
            else:  # of other rules than are known here, only the service knows what they say
                foreign[user_id] = entry
        if foreign:
            decisions |= await self._ask(foreign, question, wish)
        return [decisions[user_id] for user_id in ids]

    async def _ask(
        self, held: Mapping[str, CachedUser], question: _Question, wish: Wish
    ) -> dict[str, Decision]:
        """Let the service decide, on no older versions than are known here."""
        decisions: dict[str, Decision] = {}
        for attempt in range(TRIES):
            if attempt:
                await self._sleep(PAUSE * attempt)
            for some in batches([user_id for user_id in held if user_id not in decisions]):
                for decision in await self._asked(some, question, wish):
                    if self._is_current(decision, held):
                        decisions[decision.user_id] = decision
            if len(decisions) == len(held):
                return decisions
        # Or what is held is of an epoch that has ended, which the next read will tell.
        for user_id in held.keys() - decisions.keys():
            self._cache.invalidate(user_id)
        raise DecodeError("deliveries.resolve: the service decides on what is outdated")

    async def _asked(self, ids: list[str], question: _Question, wish: Wish) -> tuple[Decision, ...]:
        body = ResolveDeliveries(
            channel=question.channel,
            user_ids=ids,
            category=question.category,
            app=question.app,
            priority=question.priority,
            at=question.at,
            explain=question.explain,
        )
        call = Call(
            "deliveries.resolve",
            "POST",
            "/api/v1/deliveries/resolve",
            body=body,
            deadline=wish.deadline,
            **wish.options,
        )
        return (await self._calls.send(call)).data(_DECISIONS)

    def _is_current(self, decision: Decision, held: Mapping[str, CachedUser]) -> bool:
        """Whether a decision is on what is held, or newer; of who is gone, there is no version."""
        entry = held.get(decision.user_id)
        if entry is None or decision.version is None:
            return entry is not None
        known = entry.user.version if entry.epoch == self._cache.epoch else 0
        return decision.version >= max(known, self._cache.floor(decision.user_id))

    def decide(
        self,
        user: User,
        *,
        channel: Channel,
        category: str | None = None,
        app: str | None = None,
        priority: Priority = "normal",
        at: datetime | None = None,
        explain: bool = False,
    ) -> Decision:
        """Decide on a document that is at hand, without a call: as `resolve`, but for its age.

        Raises:
            Invalid: what is asked for is not for senders to ask, such as an unknown category.
            UnknownRules: the service has other rules than this package: use `resolve`.
        """
        question = _Question(
            channel, at or self._now(), category, priority, app and app.strip(), explain
        )
        return question.answer(user, user.id)
