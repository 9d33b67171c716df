"""The keys that one process knows: each is looked up once in half a minute, not with each request.

While Postgres cannot be reached, what was known goes on being known for ten minutes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from user_service_schemas import Scope

from ..errors import DependencyUnavailable, Overloaded, RateLimited, Unauthenticated
from ..metrics import Metrics
from ..periodic import Periodic
from ..storage.database import Database
from . import repository
from .repository import StoredKey

KNOWN_FOR = 30.0
"""Seconds after which a key is looked up again: how long a revoked one may go on."""
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
    """Who calls, and what it may do. `name` is what the change log and the history keep."""

    name: str
    scopes: frozenset[str]
    key: str | None = None
    """The key it showed, digested; None where nobody shows one."""


class _Known(NamedTuple):
    caller: Caller
    key_id: str
    looked_up_at: float
    expires_at: datetime | None


class KeyRing:
    """Knows callers by their keys."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self.anybody = Caller("anonymous", frozenset(Scope))
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

    async def recognise(self, key: str, address: str) -> Caller:
        """Return whose key this is.

        Raises:
            Unauthenticated: it is nobody's, or no longer.
            RateLimited: the address has shown too many wrong ones.
            DependencyUnavailable, Overloaded: it is not known here, and nobody can tell now.
        """
        digest = _digest(key)
        known = self._known.get(digest)
        now = time.monotonic()
        if known is None or now - known.looked_up_at >= KNOWN_FOR:
            known = await self._look_up(key, digest, address)
        if known.expires_at is not None and known.expires_at <= datetime.now(UTC):
            self._known.pop(digest, None)
            raise self._wrong_key(address)
        self._used[known.key_id] = datetime.now(UTC)
        return known.caller

    async def is_valid(self, caller: Caller) -> bool:
        """Whether a caller's key, which was good when it came, still is; for what lasts long."""
        if caller.key is None:
            return True
        known = self._known.get(caller.key)
        if known is None:
            return False
        if time.monotonic() - known.looked_up_at >= KNOWN_FOR:
            try:
                known = await self._once(caller.key, known.key_id, secret=None)
            except (DependencyUnavailable, Overloaded):
                return time.monotonic() - self._known[caller.key].looked_up_at < (
                    KNOWN_WITHOUT_POSTGRES_FOR
                )
        return known is not None and (
            known.expires_at is None or known.expires_at > datetime.now(UTC)
        )

    async def _look_up(self, key: str, digest: str, address: str) -> _Known:
        now = time.monotonic()
        match = _KEY.fullmatch(key)
        if match is None or self._unknown.get(digest, 0) > now:
            raise self._wrong_key(address)
        held = self._known.get(digest)
        if held is None:
            self._refuse_the_insistent(address)
        try:
            known = await self._once(digest, match[1], match[2])
        except (DependencyUnavailable, Overloaded):
            if held is None or now - held.looked_up_at >= KNOWN_WITHOUT_POSTGRES_FOR:
                raise
            return held
        if known is None:
            if len(self._unknown) >= MAX_UNKNOWN:
                del self._unknown[next(iter(self._unknown))]
            self._unknown[digest] = time.monotonic() + UNKNOWN_FOR
            raise self._wrong_key(address)
        return known

    async def _once(self, digest: str, key_id: str, secret: str | None) -> _Known | None:
        """Look a key up, once for all who ask at the same time."""
        lookup = self._lookups.get(digest)
        if lookup is None:
            lookup = asyncio.create_task(self._read(digest, key_id, secret))
            self._lookups[digest] = lookup
            lookup.add_done_callback(lambda _: self._lookups.pop(digest, None))
        return await asyncio.shield(lookup)

    async def _read(self, digest: str, key_id: str, secret: str | None) -> _Known | None:
        looked_up_at = time.monotonic()
        async with self._database.reading() as connection:
            stored = await repository.find_key(connection, key_id)
        if stored is None or not _is_good(stored, secret):
            self._known.pop(digest, None)
            return None
        known = self._known[digest] = _Known(
            Caller(stored.name, frozenset(stored.scopes), digest),
            key_id,
            looked_up_at,
            stored.expires_at,
        )
        return known

    def _refuse_the_insistent(self, address: str) -> None:
        count, since = self._wrong.get(address, (0, 0.0))
        left = since + FAILURES_WITHIN - time.monotonic()
        if count >= FAILURES and left > 0:
            raise RateLimited(retry_after=left)

    def _wrong_key(self, address: str) -> Unauthenticated:
        """Count a wrong key of an address, and return what its caller is told."""
        self._failures.inc()
        now = time.monotonic()
        count, since = self._wrong.pop(address, (0, now))
        if now - since >= FAILURES_WITHIN:
            count, since = 0, now
        self._wrong[address] = (count + 1, since)
        if len(self._wrong) > MAX_ADDRESSES:
            del self._wrong[next(iter(self._wrong))]
        return Unauthenticated()

    async def _note_used(self) -> None:
        used, self._used = self._used, {}
        if used:
            async with self._database.reading() as connection:
                await repository.note_used(connection, used)

    async def close(self) -> None:
        """Stop, and note what was used last."""
        await self._noting.stop()


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _is_good(stored: StoredKey, secret: str | None) -> bool:
    if stored.revoked:
        return False
    return secret is None or hmac.compare_digest(
        stored.secret_digest, repository.digest_secret(secret)
    )
