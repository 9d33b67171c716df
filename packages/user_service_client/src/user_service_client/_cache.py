"""The client's own copies of users: how old one may be, what it is confirmed by, and what ends it.

A copy is fresh for some seconds, or, with a live stream, until a change is heard of. Every version
that is heard of, from the stream or as the answer to a write, is a floor: a copy below it is not
believed, wherever it comes from, so that a server that lags behind does not bring it back.
Compare LaunchDarkly's version-gated store and Caffeine's `refreshAfterWrite`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from enum import Enum
from functools import partial
from sys import intern
from typing import NamedTuple, Protocol

from user_service_schemas import MAX_BATCH, ErrorCode, User

from user_service_client._calls import TICK, CallOptions, batches
from user_service_client._clock import Clock
from user_service_client._coverage import Coverage
from user_service_client._flights import Flight, Flights, until_over
from user_service_client._floors import Floors, Generations
from user_service_client._loops import Home
from user_service_client._retry import is_outage
from user_service_client._store import MAX_FREQ, Store, Stored
from user_service_client.errors import (
    DeadlineExceeded,
    DecodeError,
    Invalid,
    NotFound,
    UserServiceError,
)
from user_service_client.hooks import CacheEvent, CacheResult, Hooks, tell

UNKNOWN_FOR = 5.0
"""Seconds for which it is remembered that nobody has an id."""
MAX_UNKNOWN = 10_000
TTL_JITTER = 0.1
GRACE = 0.02
"""Seconds by which who waits for a request lets it say itself that its time was up."""
TRIES = 3
"""How often a read is repeated whose answer was overtaken."""
REFRESHES_AT_ONCE = 16
REFRESHES_A_SECOND = 200
"""How many requests revalidate old copies in the background: after an outage, all are old together.
What there is no room for is revalidated when it is read again."""
BATCHES_AT_ONCE = 4
DOUBTFUL_AT_ONCE = 16
"""How many users of a batch are asked for again at a time."""

_TAG = re.compile(r'(?:W/)?"([0-9a-f]+)\.([0-9a-f]+)\.([0-9]{1,18})"')
_log = logging.getLogger("user_service_client")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """How the client keeps users.

    Attributes:
        max_documents: How many.
        max_bytes: How many, as the sum of their JSON; in memory they take about twice of it.
        fresh_for: Seconds for which a copy is used without asking, where nothing tells of changes.
        max_stale: Seconds for which a copy is used while it is revalidated in the background, or
            while the service cannot be reached.

    Raises:
        ValueError: a number is below 0, or not a number.
    """

    max_documents: int = 50_000
    max_bytes: int = 128 * 1024 * 1024
    fresh_for: float = 30.0
    max_stale: float = 300.0

    def __post_init__(self) -> None:
        """Refuse what would silently keep nothing, or for ever: all comparisons with NaN fail."""
        numbers = (self.max_documents, self.max_bytes, self.fresh_for, self.max_stale)
        if not all(number >= 0 for number in numbers):
            raise ValueError("the numbers of CacheOptions must not be below 0")


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What the cache did since the client was made.

    Attributes:
        hits: Reads answered with a fresh copy.
        stale: Reads answered with an old one, within the ages that are allowed.
        misses: Reads that asked the service, or joined one that did.
        unknown: Reads of an id of which it was known that nobody has it.
        confirmed: Copies that a 304 made fresh again.
        invalidated: Copies that ended since a later version was heard of.
        overtaken: Answers that were older than what was heard of meanwhile, and were dropped.
        evicted: Copies that went since there were too many.
        documents: Copies that are kept now.
        bytes: The sum of their JSON.
    """

    hits: int
    stale: int
    misses: int
    unknown: int
    confirmed: int
    invalidated: int
    overtaken: int
    evicted: int
    documents: int
    bytes: int


class Tag(NamedTuple):
    """An ETag in its parts: `"<epoch>.<format>.<version>"`."""

    epoch: str
    format: str
    version: int

    @classmethod
    def parse(cls, etag: str | None) -> Tag | None:
        """Return the parts, or None of what is no document's ETag."""
        found = _TAG.fullmatch(etag or "")
        return cls(intern(found[1]), intern(found[2]), int(found[3])) if found else None


class CachedUser(Stored):
    """A copy of a user, as `peek` shows it.

    Attributes:
        user: The user.
    """

    __slots__ = ("_cache", "epoch", "format", "fresh_until", "user", "validated_at")

    def __init__(
        self,
        user: User,
        source: Fetched | Batch,
        cache: DocumentCache,
        validated_at: float,
        fresh_until: float,
    ) -> None:
        # `Stored`'s own, without a call: a batch makes a thousand of these.
        self.key = user.id
        self.size = source.size
        self.freq = 0
        self.user = user
        self.epoch = source.epoch
        self.format = source.format
        self.validated_at = validated_at
        self.fresh_until = fresh_until
        self._cache = cache

    @property
    def age(self) -> float:
        """Seconds since it was certainly the newest version."""
        return self._cache.age(self)

    @property
    def is_fresh(self) -> bool:
        """Whether `users.get` would return it without asking the service."""
        return self._cache.is_fresh(self)

    @property
    def etag(self) -> str:
        """What the service tags this very version with."""
        return f'"{self.epoch}.{self.format}.{self.user.version}"'


class Fetched(NamedTuple):
    """A user as the service has just answered; `size` is that of its JSON.

    Without an ETag, as from a mock, the epoch is empty, and it is not kept.
    """

    user: User
    epoch: str
    format: str
    size: int


class Batch(NamedTuple):
    """Users as the service has just answered; `size` is what each takes on average.

    All are decoded in one go: one by one, to know the size of each, would take 0.6 µs a user.
    """

    users: tuple[User, ...]
    epoch: str
    format: str
    size: int


class Asked(NamedTuple):
    """When something was asked: the answer is not kept if its user was invalidated meanwhile."""

    at: float
    generation: int


class Use(Enum):
    """What a copy is wanted for, which says how old it may be."""

    READ = "read"
    """To be shown: an old one will do while it is revalidated."""
    DECISION = "decision"
    """To decide on a delivery: an old one is revalidated first."""
    CRITICAL = "critical"
    """To decide on one that must not fail: always revalidated, and never old."""


class Wish(NamedTuple):
    """How a read is to be answered.

    `options` are what the request is made with; with some of its own, it is not shared with others.
    """

    use: Use
    deadline: float
    max_stale: float | None
    options: CallOptions


class Source(Protocol):
    """How the cache asks the service."""

    async def fetch(
        self,
        user_id: str,
        held: CachedUser | None,
        floor: int,
        deadline: float,
        options: CallOptions,
    ) -> Fetched | None:
        """Read one user, no older than the version `floor`; None confirms the copy that is held.

        Raises:
            NotFound: nobody has this id.
        """

    async def fetch_many(self, ids: Sequence[str], deadline: float, options: CallOptions) -> Batch:
        """Read up to 1000 users; who does not exist is left out."""

    def deadline(self) -> float:
        """Return when a read must have ended that begins now, and for which nobody waits."""


class Nobody(NamedTuple):
    """That nobody has an id: as the service has just said, or as is remembered, without a call."""

    request_id: str | None = None
    attempts: int = 0
    elapsed: float = 0.0


NOBODY = Nobody()

Found = dict[str, CachedUser | Nobody]
"""Copies by id, or that nobody has it."""


class DocumentCache:
    """Copies of users, by id."""

    def __init__(
        self, options: CacheOptions | None, source: Source, home: Home, clock: Clock, hooks: Hooks
    ) -> None:
        self._options = options or CacheOptions(max_documents=0)
        self._source = source
        self._home = home
        self._monotonic = clock.monotonic
        self._hook = hooks.cache
        self._store: Store[CachedUser] = Store(self._options.max_documents, self._options.max_bytes)
        self._entries = self._store.entries
        self.peek = self._entries.get
        """Return the copy of an id, however old, or None."""
        self._flights: Flights[Found] = Flights()
        self._refreshes: set[asyncio.Task[None]] = set()
        self._refresh_second = 0
        self._refreshed = 0
        self._unknown: dict[str, float] = {}
        self._floors = Floors(clock.monotonic)
        self._generations = Generations()
        self.coverage = Coverage(clock.monotonic, self._options.fresh_for)
        """What the stream covers, as whoever follows it tells."""
        self._hits = self._stale = self._misses = self._unknowns = 0
        self._confirmed = self._invalidated = self._overtaken = 0
        home.on_move(self._let_go)

    # Reading

    def hit(self, user_id: str) -> User | None:
        """Return a fresh copy, or None if there is none: all that most reads do."""
        entry = self._entries.get(user_id)
        if entry is None:
            return None
        # `is_fresh`, once more: a call would double what a read costs.
        now, validated_at, coverage = self._monotonic(), entry.validated_at, self.coverage
        if validated_at < coverage.valid_from or (
            now >= entry.fresh_until
            and (now >= coverage.complete_until or validated_at < coverage.since)
        ):
            return None
        if entry.freq < MAX_FREQ:
            entry.freq += 1
        self._hits += 1
        return entry.user

    def is_fresh(self, entry: CachedUser) -> bool:
        """Whether a copy may be used without asking."""
        now, validated_at, coverage = self._monotonic(), entry.validated_at, self.coverage
        return validated_at >= coverage.valid_from and (
            now < entry.fresh_until
            or (now < coverage.complete_until and validated_at >= coverage.since)
        )

    def age(self, entry: CachedUser) -> float:
        """Return the seconds since a copy was certainly the newest version."""
        return self._monotonic() - self.coverage.known_good_at(entry.validated_at)

    async def read(self, user_id: str, wish: Wish) -> CachedUser:
        """Return a copy that is new enough for its use, asking the service if need be.

        Raises:
            NotFound: nobody has this id.
            UserServiceError: the service cannot be asked, and no copy is new enough.
        """
        entry = (await self.read_many([user_id], wish, one_by_one=True))[user_id]
        if isinstance(entry, Nobody):
            code = ErrorCode.USER_NOT_FOUND
            request = f" (request id {entry.request_id})" if entry.request_id else ""
            raise NotFound(
                f"users.get: 404 {code}{request}", code=code, status=404, **entry._asdict()
            )
        return entry

    async def read_many(self, ids: Sequence[str], wish: Wish, *, one_by_one: bool = False) -> Found:
        """Return copies that are new enough for their use, and of which ids nobody has any.

        What is lacking is asked for in one request for each 1000, or `one_by_one`, which confirms
        what is held; raises as `read`.
        """
        found: Found = {}
        lacking: list[str] = []
        old: list[str] = []
        for user_id in ids:
            entry = self._entries.get(user_id)
            if entry is None:
                if wish.use is not Use.CRITICAL and self._is_unknown(user_id):
                    found[user_id] = NOBODY
                else:
                    lacking.append(user_id)
            elif wish.use is not Use.CRITICAL and self.is_fresh(entry):
                found[user_id] = entry
                entry.freq = min(MAX_FREQ, entry.freq + 1)
                self._hits += 1
            elif wish.use is Use.READ and self._may_be_old(entry, wish):
                found[user_id] = entry
                old.append(user_id)
            else:
                lacking.append(user_id)
        unknown = sum(entry is NOBODY for entry in found.values()) if found else 0
        if unknown:
            self._unknowns += unknown
            self._tell(CacheResult.UNKNOWN, unknown)
        if old:
            self._refresh(old, one_by_one)
            self._count_stale(len(old))
        if lacking:
            self._misses += len(lacking)
            self._tell(CacheResult.MISS, len(lacking))
            found |= await self._ask(lacking, wish, one_by_one)
        return found

    def _may_be_old(self, entry: CachedUser, wish: Wish) -> bool:
        """Whether a copy will do while it is revalidated: not one that a reset has marked."""
        allowed = min(self._allowed(wish), self._options.max_stale)
        return entry.validated_at >= self.coverage.valid_from and self.age(entry) <= allowed

    def _allowed(self, wish: Wish) -> float:
        """Return how old a copy may be if the service cannot be reached."""
        return self._options.max_stale if wish.max_stale is None else wish.max_stale

    async def _ask(
        self, ids: Sequence[str], wish: Wish, one_by_one: bool, until: float = -math.inf
    ) -> Found:
        """Ask the service; where it cannot be reached, a copy will do that is not too old.

        Others wait `until` then, at the latest, for what a request that failed was to bring.
        """
        self._home.enter()  # before requests of another loop are joined
        started = self._monotonic()
        joined: dict[Flight[Found], list[str]] = {}
        new: list[str] = []
        for user_id in ids:
            # What must be new does not join a request from before, nor do special wishes.
            is_alone = wish.use is Use.CRITICAL or wish.options
            flight = None if is_alone else self._flights.joinable(user_id)
            if flight is None:
                new.append(user_id)
            else:
                flight.wanted_until = max(flight.wanted_until, wish.deadline)
                joined.setdefault(flight, []).append(user_id)
        deadline = max(wish.deadline, until)
        flights = joined | self._depart(new, deadline, wish.options, one_by_one)
        if joined or deadline > wish.deadline:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, wish.deadline - started) + GRACE):
                    await until_over(flights)
        else:
            await until_over(flights)  # each ends by the deadline itself, and a timer costs 4 µs
        found: Found = {}
        again: list[str] = []
        for flight, some in flights.items():
            error = flight.error
            if not flight.over.is_set():
                elapsed = self._monotonic() - started
                error = DeadlineExceeded("what was waited for took too long", elapsed=elapsed)
            if error is None:
                found |= {user_id: flight.found[user_id] for user_id in some}
            elif not isinstance(error, UserServiceError):
                raise error
            elif self._was_for_others(flight, error, ids, wish):
                again += some
                until = max(until, flight.wanted_until)
            else:
                found |= self._make_do(some, error, wish)
        if again:
            # For all who waited, or each would ask again when the time of the one before is up.
            found |= await self._ask(again, wish, one_by_one, until)
        return found

    def _was_for_others(
        self, flight: Flight[Found], error: UserServiceError, ids: Sequence[str], wish: Wish
    ) -> bool:
        """Whether a request has failed only for those who began it.

        They had less time than who joined it, or asked for what is no id, which these `ids` lack.
        """
        if self._monotonic() >= wish.deadline - TICK:
            return False
        if isinstance(error, DeadlineExceeded):
            return flight.deadline < wish.deadline
        return isinstance(error, Invalid) and not set(flight.ids) <= set(ids)

    def _make_do(self, ids: Sequence[str], error: UserServiceError, wish: Wish) -> Found:
        """Return copies where the service could not be reached; raises the error without them.

        A copy of it: all who waited are raised it, and each adds to its traceback.
        """
        if wish.use is Use.CRITICAL or not is_outage(error):
            raise copy(error) from error.__cause__
        found: Found = {}
        for user_id in ids:
            entry = self._entries.get(user_id)
            if entry is None or self.age(entry) > self._allowed(wish):
                raise copy(error) from error.__cause__
            found[user_id] = entry
        self._count_stale(len(found))
        return found

    def _count_stale(self, documents: int) -> None:
        self._stale += documents
        self._tell(CacheResult.STALE, documents)

    def _tell(self, result: CacheResult, documents: int) -> None:
        tell(self._hook, lambda: CacheEvent(result, documents))

    # Asking the service

    def _depart(
        self, ids: Sequence[str], deadline: float, options: CallOptions, one_by_one: bool
    ) -> dict[Flight[Found], list[str]]:
        """Begin requests for these ids, which others may join."""
        depart = partial(self._flights.depart, deadline, is_shared=not options)
        if one_by_one:
            return {depart([i], partial(self._fetch, i, options)): [i] for i in ids}
        turns = asyncio.Semaphore(BATCHES_AT_ONCE)
        return {
            depart(some, partial(self._fetch_many, some, options, turns)): some
            for some in batches(ids)
        }

    async def _fetch(self, user_id: str, options: CallOptions, flight: Flight[Found]) -> Found:
        for left in reversed(range(TRIES)):
            if not left:
                # Of somebody who changes all the time, what is asked for now will do for those who
                # wait by now.
                self._flights.landed([user_id], flight)
            held = self._entries.get(user_id)
            if held is not None and held.epoch != self._floors.epoch:
                held = None  # only who has not heard of the new epoch yet would confirm it
            floor, asked = self.floor(user_id), self.asking()
            try:
                fetched = await self._source.fetch(user_id, held, floor, flight.deadline, options)
            except NotFound as error:
                if error.code != ErrorCode.USER_NOT_FOUND:
                    raise
                if self.floor(user_id) > floor:
                    continue  # it was created, or changed, while we asked
                self._find_unknown(user_id, asked)
                return {user_id: Nobody(error.request_id, error.attempts, error.elapsed)}
            if fetched is not None:
                entry = self._keep(fetched, asked)
            elif held is not None and self._generations.allow(user_id, asked.generation):
                entry = self._confirm(held, asked.at)
            else:
                entry = None
            if entry is not None:
                return {user_id: entry}
            self._overtaken += 1
            answered = held if fetched is None else self._copy(fetched, asked.at)
            if not left and answered is not None and answered.user.version >= floor:
                return {user_id: answered}
        raise DecodeError("users.get: the service answers with what is outdated")

    async def _fetch_many(
        self,
        ids: Sequence[str],
        options: CallOptions,
        turns: asyncio.Semaphore,
        flight: Flight[Found],
    ) -> Found:
        async with turns:
            asked = self.asking()
            batch = await self._source.fetch_many(ids, flight.deadline, options)
        found = self._keep_new(batch, asked)
        doubtful = self._keep_others(ids, batch, asked, found) if len(found) < len(ids) else []
        if not doubtful:
            return found
        # What was found is of now: a version may be heard of before the rest has come.
        self._flights.landed(list(found), flight)
        # A batch cannot say what it must not be older than.
        again_turns = asyncio.Semaphore(DOUBTFUL_AT_ONCE)

        async def ask_again(user_id: str) -> Found:
            async with again_turns:
                return await self._fetch(user_id, options, flight)

        # All are waited for, or the others would go on by themselves when one has failed.
        for again in await asyncio.gather(*map(ask_again, doubtful), return_exceptions=True):
            if isinstance(again, BaseException):
                raise again
            found |= again
        return found

    def _refresh(self, ids: Sequence[str], one_by_one: bool) -> None:
        """Revalidate old copies in the background, as many at a time as do no harm."""
        self._home.enter()
        second = int(self._monotonic())
        if second != self._refresh_second:
            self._refresh_second, self._refreshed = second, 0
        room = min(REFRESHES_AT_ONCE - len(self._refreshes), REFRESHES_A_SECOND - self._refreshed)
        wanted = [user_id for user_id in ids if user_id not in self._flights]
        wanted = wanted[: room if one_by_one else room * MAX_BATCH]
        deadline = self._source.deadline()
        for flight in self._depart(wanted, deadline, CallOptions(), one_by_one):
            self._refreshed += 1
            self._refreshes.add(flight.task)
            flight.task.add_done_callback(self._refreshes.discard)

    # Keeping

    def asking(self) -> Asked:
        """Return what `keep` is to be told of a request that begins now."""
        return Asked(self._monotonic(), self._generations.current)

    def keep(self, fetched: Fetched, asked: Asked) -> None:
        """Keep what a write through this client, or a read past the cache, has answered."""
        if fetched.epoch:
            self.heard_of(fetched.user.id, fetched.user.version, fetched.epoch)
            self._keep(fetched, asked)

    def _keep(self, fetched: Fetched, asked: Asked) -> CachedUser | None:
        """Return what was fetched as a copy, kept if it may be; None if it is outdated."""
        user = fetched.user
        may_keep = self._generations.allow(user.id, asked.generation)
        entry = self._copy(fetched, asked.at)
        if not fetched.epoch:
            return entry
        if not self._is_current_epoch(fetched.epoch):
            # Of a server that has not heard of the new epoch yet. If this client had not when it
            # asked, the answer may be below a floor of the epoch before: those are forgotten.
            return entry if may_keep else None
        if user.version < self.floor(user.id):
            return None
        held = self._entries.get(user.id)
        if held is not None and held.epoch == fetched.epoch:
            if held.user.version > user.version:
                return held
            if held.user.version == user.version and held.format == fetched.format:
                self._renew(held, asked.at)
                return held
        self._unknown.pop(user.id, None)
        if may_keep:
            self._store.put(entry)
        return entry

    def _keep_new(self, batch: Batch, asked: Asked) -> Found:
        """Keep what of a batch nothing was known of, as `_keep` would, in half the time.

        Its copies grow old together: one batch will revalidate them.
        """
        kept: Found = {}
        entries, put = self._entries, self._store.put
        floors, dropped = self._floors.heard, self._generations.dropped
        if batch.epoch != self._floors.epoch or asked.generation < self._generations.cleared_in:
            return kept
        fresh_until = self._fresh_until(asked.at)
        for user in batch.users:
            user_id = user.id
            if not (user_id in entries or user_id in floors or user_id in dropped):
                self._unknown.pop(user_id, None)
                entry = kept[user_id] = CachedUser(user, batch, self, asked.at, fresh_until)
                put(entry)
        return kept

    def _keep_others(
        self, ids: Sequence[str], batch: Batch, asked: Asked, found: Found
    ) -> list[str]:
        """Add to `found` what else a batch says, and return of whom it says what is outdated."""
        doubtful: list[str] = []
        users = {user.id: user for user in batch.users}
        for user_id in ids:
            if user_id in found:
                continue
            user = users.get(user_id)
            if user is not None:
                entry = self._keep(Fetched(user, batch.epoch, batch.format, batch.size), asked)
                if entry is not None:
                    found[user_id] = entry
                    continue
                self._overtaken += 1
            elif not self.floor(user_id):
                self._find_unknown(user_id, asked)
                found[user_id] = NOBODY
                continue
            doubtful.append(user_id)
        return doubtful

    def _copy(self, fetched: Fetched, asked_at: float) -> CachedUser:
        return CachedUser(fetched.user, fetched, self, asked_at, self._fresh_until(asked_at))

    def _confirm(self, held: CachedUser, asked_at: float) -> CachedUser | None:
        """Take a copy for as new as the question was; None if it is outdated by now."""
        if held.epoch != self._floors.epoch or held.user.version < self.floor(held.user.id):
            return None
        self._confirmed += 1
        self._renew(held, asked_at)
        return held

    def _renew(self, held: CachedUser, asked_at: float) -> None:
        if asked_at > held.validated_at:
            held.validated_at = asked_at
            held.fresh_until = self._fresh_until(asked_at)

    def _fresh_until(self, asked_at: float) -> float:
        # Spread, so that what was read together is not revalidated together.
        jitter = TTL_JITTER * random.random()  # noqa: S311 - no secret
        return asked_at + self._options.fresh_for * (1 - jitter)

    # What is heard of

    def heard_of(self, user_id: str, version: float, epoch: str) -> None:
        """Hear of a version, from the stream or a write: nothing below it is believed any more."""
        if not self._is_current_epoch(epoch):
            return
        self._unknown.pop(user_id, None)
        self._floors.rise(user_id, version)
        entry = self._entries.get(user_id)
        if entry is not None and (entry.user.version < version or entry.epoch != epoch):
            self._store.remove(user_id)
            self._invalidated += 1

    def erased(self, user_id: str) -> None:
        """Hear that this client has erased a user, whose id is never used again."""
        self.invalidate(user_id)
        self._floors.rise(user_id, math.inf)
        self._remember_unknown(user_id)

    def invalidate(self, user_id: str) -> None:
        """Do not believe any copy of a user, nor one that is on its way."""
        if self._store.remove(user_id) is not None:
            self._invalidated += 1
        self._unknown.pop(user_id, None)
        self._flights.part_from(user_id)
        self._generations.drop(user_id)

    def clear(self) -> None:
        """Do not believe any copy, nor one that is on its way."""
        self._generations.drop_all()
        self._store.clear()
        self._unknown.clear()
        self._flights.part_from_all()

    def reset(self) -> None:
        """Something may have been missed: mark all copies to be revalidated when they are read."""
        before = math.nextafter(self._monotonic(), -math.inf)  # the clock of a test stands still
        for entry in self._entries.values():
            good_at = self.coverage.known_good_at(entry.validated_at)
            entry.validated_at = min(before, good_at)
        self.coverage.reset()

    def _is_current_epoch(self, epoch: str) -> bool:
        """Whether `epoch` is the newest that was seen; a new one marks what is of another."""
        if epoch == self._floors.epoch:
            return True
        if self._floors.is_past(epoch):
            return False
        if self._floors.begin(epoch):
            _log.warning("the service has a new epoch: all copies are revalidated")
            self._unknown.clear()
            self._flights.part_from_all()
            self._generations.drop_all()
            self.reset()
        return True

    def epoch_is(self, epoch: str) -> None:
        """Hear from the stream of the epoch that the service is in, whatever others have said."""
        self._floors.recall(epoch)
        self._is_current_epoch(epoch)

    @property
    def epoch(self) -> str | None:
        """The newest epoch that was seen."""
        return self._floors.epoch

    def floor(self, user_id: str) -> int:
        """Return the version below which no copy of a user is believed."""
        return self._floors.of(user_id)

    def _is_unknown(self, user_id: str) -> bool:
        until = self._unknown.get(user_id)
        if until is None:
            return False
        if self._monotonic() < until:
            return True
        del self._unknown[user_id]
        return False

    def _find_unknown(self, user_id: str, asked: Asked) -> None:
        if self._generations.allow(user_id, asked.generation):
            self._store.remove(user_id)
            self._remember_unknown(user_id)

    def _remember_unknown(self, user_id: str) -> None:
        if self._options.max_documents < 1:
            return
        if len(self._unknown) >= MAX_UNKNOWN:
            del self._unknown[next(iter(self._unknown))]
        self._unknown[user_id] = self._monotonic() + UNKNOWN_FOR

    # The rest

    @property
    def stats(self) -> CacheStats:
        """Return what was done so far."""
        return CacheStats(
            hits=self._hits,
            stale=self._stale,
            misses=self._misses,
            unknown=self._unknowns,
            confirmed=self._confirmed,
            invalidated=self._invalidated,
            overtaken=self._overtaken,
            evicted=self._store.evictions,
            documents=len(self._store),
            bytes=self._store.bytes,
        )

    async def aclose(self) -> None:
        """End what is under way."""
        await self._flights.aclose()

    def _let_go(self) -> None:
        """Forget requests of an event loop that is over."""
        self._flights.let_go()
        self._refreshes.clear()
