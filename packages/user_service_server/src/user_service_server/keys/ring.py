"""The keys that one process knows: each is looked up once in half a minute, not with each request.

While Postgres cannot be reached, what was known goes on being known for ten minutes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import NamedTuple

from user_service_schemas import Scope

from ..errors import DependencyUnavailable, Overloaded, RateLimited, ServiceError, Unauthenticated
from ..metrics import Metrics
from ..periodic import Periodic
from ..storage.database import Database
from . import repository
from .repository import StoredKey

KNOWN_FOR = 30.0
"""Seconds after which a key is looked up again: how long a revoked one may go on."""
RENEWED_AFTER = 20.0
"""Seconds after which a key in use is looked up beside its requests, so that none waits for it."""
WATCHED_EVERY = 10.0
"""Seconds between two looks at the key of what stays open."""
PATIENCE = 0.5
"""Seconds that the caller with a known key waits for a Postgres that neither answers nor fails."""
KNOWN_WITHOUT_POSTGRES_FOR = 600.0
UNKNOWN_FOR = 5.0
MAX_UNKNOWN = 10_000
FAILURES = 100
FAILURES_WITHIN = 10.0
"""So many wrong keys an address may show in so many seconds, before it is not listened to."""
MAX_ADDRESSES = 10_000
USED_INTERVAL = 60.0

_KEY = re.compile(r"usk_([0-9a-z]{12})_([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what it may do: to keys of one `name`, limits and repeats are common."""

    name: str
    scopes: frozenset[str]
    key: str | None = None
    """The key it showed, digested; None where nobody shows one."""

    @property
    def actor(self) -> str | None:
        """What the change log and the history keep; None for whoever need not say who it is."""
        return self.name if self.key else None


class _Known(NamedTuple):
    caller: Caller
    key_id: str
    looked_up_at: float
    expires_at: datetime | None

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)


class KeyRing:
    """Knows callers by their keys."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self.anybody = Caller(repository.ANYBODY, frozenset(Scope))
        self._database = database
        self._failures = metrics.unauthenticated
        self._known: dict[str, _Known] = {}
        self._unknown: dict[str, float] = {}
        self._lookups: dict[str, asyncio.Task[_Known | None]] = {}
        # By address: how many wrong keys it showed, and since when they are counted.
        self._wrong: dict[str, tuple[int, float]] = {}
        self._used: dict[str, datetime] = {}
        self._noting = Periodic("keys-used", self._note_used, lambda: USED_INTERVAL)

    def start(self) -> None:
        """Begin to note which keys are used."""
        self._noting.start()

    def known(self, key: str) -> Caller | None:
        """Return whose key this is, if it was looked up so lately that nobody is to be asked."""
        held = self._known.get(_digest(key))
        if held is None or held.expired or monotonic() - held.looked_up_at >= RENEWED_AFTER:
            return None
        return self._use(held)

    async def recognise(self, key: str, address: Callable[[], str]) -> Caller:
        """Return whose key this is; `address` tells from where it is shown.

        Raises:
            Unauthenticated: it is nobody's, or no longer.
            RateLimited: the address has shown too many wrong ones.
            DependencyUnavailable, Overloaded: it is not known here, and nobody can tell now.
        """
        match = _KEY.fullmatch(key)
        held = None if match is None else await self._find(key, match, address)
        if held is None:
            self._failures.inc()
            raise Unauthenticated
        return self._use(held)

    def _use(self, held: _Known) -> Caller:
        self._used[held.key_id] = datetime.now(UTC)
        return held.caller

    async def _find(
        self, key: str, match: re.Match[str], address: Callable[[], str]
    ) -> _Known | None:
        digest = _digest(key)
        held = self._known.get(digest)
        if held is None:
            return await self._meet(digest, match[1], match[2], address)
        if held.expired:
            return None
        age = monotonic() - held.looked_up_at
        if age >= KNOWN_FOR:
            return await self._see_again(digest, held)
        if age >= RENEWED_AFTER:
            self._begin_lookup(digest, held.key_id, None)
        return held

    async def is_valid(self, caller: Caller) -> bool:
        """Whether a caller's key, which was good when it came, still is; for what lasts long."""
        if caller.key is None:
            return True
        held = self._known.get(caller.key)
        if held is None or held.expired:
            return False
        if monotonic() - held.looked_up_at < WATCHED_EVERY:
            return True
        try:
            return await self._see_again(caller.key, held) is not None
        except (DependencyUnavailable, Overloaded):
            return False

    async def _meet(
        self, digest: str, key_id: str, secret: str, address: Callable[[], str]
    ) -> _Known | None:
        """Look up a key that is not known here."""
        if self._unknown.get(digest, 0) > monotonic():
            return None
        if digest in self._lookups:
            return await self._once(digest, key_id, secret)
        # Counted as wrong before it is looked up: or of many at once none would be refused. What
        # costs no lookup is not counted: who shows it keeps out nobody else of the same address.
        network = _network(address())
        self._refuse_the_insistent(network)
        self._count_wrong(network)
        try:
            known = await self._once(digest, key_id, secret)
        except ServiceError:
            self._take_back_wrong(network)
            raise
        if known is not None:
            self._take_back_wrong(network)
        return known

    async def _see_again(self, digest: str, held: _Known) -> _Known | None:
        """Look a known key up again; without Postgres it is believed for some time."""
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._once(digest, held.key_id, None)
        except TimeoutError:
            error: ServiceError = DependencyUnavailable()
        except (DependencyUnavailable, Overloaded) as refused:
            error = refused
        if monotonic() - held.looked_up_at >= KNOWN_WITHOUT_POSTGRES_FOR:
            raise error
        return held

    async def _once(self, digest: str, key_id: str, secret: str | None) -> _Known | None:
        """Look a key up, once for all who ask at the same time; who gives up ends it for nobody."""
        return await asyncio.shield(self._begin_lookup(digest, key_id, secret))

    def _begin_lookup(
        self, digest: str, key_id: str, secret: str | None
    ) -> asyncio.Task[_Known | None]:
        """Begin to look a key up, or return who does so already.

        A key is known by the digest of all of it: another secret for the same id is another key.
        Without a `secret` it was compared before.
        """
        lookup = self._lookups.get(digest)
        if lookup is None:
            # In a context of its own: it is not part of the request that began it.
            lookup = asyncio.create_task(self._read(digest, key_id, secret), context=Context())
            self._lookups[digest] = lookup
            lookup.add_done_callback(lambda done: self._looked_up(digest, done))
        return lookup

    def _looked_up(self, digest: str, lookup: asyncio.Task[_Known | None]) -> None:
        del self._lookups[digest]
        if not lookup.cancelled():
            lookup.exception()  # those who waited for it, if any still do, are told

    async def _read(self, digest: str, key_id: str, secret: str | None) -> _Known | None:
        looked_up_at = monotonic()
        async with self._database.reading() as connection:
            stored = await repository.find_key(connection, key_id)
        if stored is None or not _is_good(stored, secret):
            self._known.pop(digest, None)
            if len(self._unknown) >= MAX_UNKNOWN:
                del self._unknown[next(iter(self._unknown))]
            self._unknown[digest] = monotonic() + UNKNOWN_FOR
            return None
        known = self._known[digest] = _Known(
            Caller(stored.name, frozenset(stored.scopes), digest),
            key_id,
            looked_up_at,
            stored.expires_at,
        )
        return known

    def _refuse_the_insistent(self, network: str) -> None:
        count, since = self._wrong.get(network, (0, 0.0))
        left = since + FAILURES_WITHIN - monotonic()
        if count >= FAILURES and left > 0:
            raise RateLimited(retry_after=left)

    def _count_wrong(self, network: str) -> None:
        now = monotonic()
        count, since = self._wrong.pop(network, (0, now))
        if now - since >= FAILURES_WITHIN:
            count, since = 0, now
        self._wrong[network] = (count + 1, since)
        if len(self._wrong) > MAX_ADDRESSES:
            del self._wrong[next(iter(self._wrong))]

    def _take_back_wrong(self, network: str) -> None:
        count, since = self._wrong.get(network, (0, 0.0))
        if count:
            self._wrong[network] = (count - 1, since)

    async def _note_used(self) -> None:
        used, self._used = self._used, {}
        if not used:
            return
        try:
            async with self._database.reading() as connection:
                await repository.note_used(connection, used)
        except ServiceError:
            self._used = used | self._used  # the next time

    async def close(self) -> None:
        """Stop, and note what was used last."""
        await self._noting.stop()
        await asyncio.gather(*self._lookups.values(), return_exceptions=True)
        await self._note_used()


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _network(address: str) -> str:
    """Return whom an address stands for: of IPv6 everybody has 2**64."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if parsed.version == 4:
        return str(parsed)
    return str(ipaddress.ip_network((int(parsed), 64), strict=False))


def _is_good(stored: StoredKey, secret: str | None) -> bool:
    if stored.ended:
        return False
    return secret is None or hmac.compare_digest(
        stored.secret_digest, repository.digest_secret(secret)
    )
