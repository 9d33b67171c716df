"""`client.deliveries`: may a message go to a user now?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

from user_service_client._cache import DocumentCache, Use, Wish
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
from user_service_client.errors import Invalid

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
        users = {i: None if entry is None else entry.user for i, entry in found.items()}
        # Of other rules than are known here, only the service knows what they say.
        foreign = [i for i, user in users.items() if user is not None and not is_decidable(user)]
        decisions = await self._ask(foreign, question, wish) if foreign else {}
        for user_id, user in users.items():
            if user_id not in decisions:
                decisions[user_id] = question.answer(user, user_id)
        return [decisions[user_id] for user_id in ids]

    async def _ask(
        self, ids: Sequence[str], question: _Question, wish: Wish
    ) -> dict[str, Decision]:
        """Let the service decide."""
        decisions: dict[str, Decision] = {}
        for some in batches(ids):
            body = ResolveDeliveries(
                channel=question.channel,
                user_ids=some,
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
            answered = (await self._calls.send(call)).data(_DECISIONS)
            decisions |= dict(zip(some, answered, strict=True))
        return decisions

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
