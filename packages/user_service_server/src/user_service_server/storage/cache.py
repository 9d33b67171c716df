"""The cache of encoded documents in Redis: announce, lease, fill, publish.

A write announces itself before it commits; while it is announced nobody caches; after the commit
the last writer publishes. Under a document's key lies one of

- a document: `D<version> <format>\\n<encoded document>`,
- a lease of a reader that is about to fill it: `L<random>`,
- a marker of writers: a hash of their tokens with the time (ms) until which each counts, and `top`,
  the highest version published so far.
"""

from __future__ import annotations

import asyncio
import random
import re
import secrets
from collections.abc import Awaitable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Final, NamedTuple, TypeAlias

from ..metrics import Metrics
from .buckets import bucket_of
from .document import StoredDocument
from .link import RedisLink
from .state import StateWatcher
from .waiting import fail, tell
from .wire import Command

MARKER_TTL_MS = 10_000
"""How long a marker lives: longer than a transaction may (`database.TRANSACTION_TIMEOUT`)."""
LEASE_TTL_MS = 3_000
SCRIPT_LIMIT = 100
"""Keys of one script: of more, others would wait too long in the meantime."""


class Absence(Enum):
    """Why there is no document."""

    MISS = "miss"
    """Nothing is there: who reads it from Postgres may fill it."""
    FOREIGN = "foreign"
    """A document of another format is there, which is as good as nothing."""
    BYPASS = "bypass"
    """A writer or another reader is at it, or Redis cannot be reached: read, do not fill."""


MISS: Final = Absence.MISS
FOREIGN: Final = Absence.FOREIGN
BYPASS: Final = Absence.BYPASS


class Lease(NamedTuple):
    """Nothing was there, and whoever looked has leased it by that."""

    token: str


Absent: TypeAlias = Absence | Lease

# What lies under the keys; 1 where nothing did, and the lease does now; 0 for a marker. It saves a
# miss a round trip (97 µs of CPU become 86), but a hit takes Redis longer than by MGET.
_LOOK = """
local found = {}
for i, key in ipairs(KEYS) do
  found[i] = redis.pcall('GET', key)
  if type(found[i]) == 'table' then
    found[i] = 0
  elseif not found[i] then
    redis.call('SET', key, ARGV[1], 'PX', ARGV[2])
    found[i] = 1
  end
end
return found
"""
# Where a document of another format lies, which the key does not name, since a write must be heard
# by the readers of every one. Where nothing lies a lease is a SET, which takes Redis 5 µs, and not
# 13. (MGET answers nil for a marker, too, since it is a hash.)
_LEASE_FOREIGN = """
if redis.call('TYPE', KEYS[1]).ok ~= 'string' then return false end
local format = string.match(redis.call('GET', KEYS[1]), '^D%d+ (%w+)')
if not format or format == ARGV[3] then return false end
return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
"""
_ANNOUNCE = """
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then redis.call('DEL', KEYS[1]) end
local now = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 'OK'
"""
# ARGV: lease, document, ttl (ms) of each key. Returns how many were stored.
_FILL = """
local stored = 0
for i, key in ipairs(KEYS) do
  if redis.pcall('GET', key) == ARGV[3 * i - 2] then
    redis.call('SET', key, ARGV[3 * i - 1], 'PX', ARGV[3 * i])
    stored = stored + 1
  end
end
return stored
"""
# ARGV: token, version ('' where nothing was committed), document ('' where the user is gone, or
# nothing may be stored), ttl (ms).
_PUBLISH = """
local mine = redis.pcall('HDEL', KEYS[1], ARGV[1])
local version = tonumber(ARGV[2])
if type(mine) == 'table' then
  if not string.find(mine.err, 'WRONGTYPE') then return mine end
  -- no marker, but a string
  local cached = tonumber(string.match(redis.call('GET', KEYS[1]), '^D(%d+)'))
  if not cached or (version and cached < version) then redis.call('DEL', KEYS[1]) end
  return 'lost'
end
local fields = redis.call('HGETALL', KEYS[1])
local top, others = 0, false
if #fields > 0 then
  local now = redis.call('TIME')
  local ms = now[1] * 1000 + math.floor(now[2] / 1000)
  for i = 1, #fields, 2 do
    if fields[i] == 'top' then top = tonumber(fields[i + 1])
    elseif tonumber(fields[i + 1]) > ms then others = true end
  end
end
if mine == 0 or others then
  if #fields > 0 and version and version > top then
    redis.call('HSET', KEYS[1], 'top', version)
  end
  return mine == 0 and 'lost' or 'noted'
end
if version and version >= top and ARGV[3] ~= '' then
  redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
  return 'stored'
end
redis.call('DEL', KEYS[1])
return 'cleared'
"""


@dataclass
class Said:
    """What one write has said of its users in one bucket.

    `generation` is the one it was said under. It is `complete` if Redis took it, and no other
    generation began in between. What is said in a `quiet` time stores nothing afterwards: in that
    time others may commit without an announcement, since nothing is cached.
    """

    generation: int
    quiet: bool = False
    complete: bool = True


@dataclass
class Announcement:
    """What one write has said in the cache: its token, under which keys, and how in each bucket.

    The buckets have nothing to do with each other: what fails in one costs no other.
    """

    token: str = field(default_factory=lambda: secrets.token_hex(8))
    keys: dict[str, str] = field(default_factory=dict)
    buckets: dict[int, Said] = field(default_factory=dict)

    @property
    def generations(self) -> dict[int, int]:
        """The generation of each bucket under which it was made."""
        return {bucket: said.generation for bucket, said in self.buckets.items()}


class Outcome(NamedTuple):
    """What a write committed of a user: the version, and the document if the user still exists."""

    version: int
    document: StoredDocument | None


_Waiting: TypeAlias = dict[str, list[asyncio.Future[StoredDocument | Absent]]]
"""Who waits for the document of which user."""


class DocumentCache:
    """Documents in Redis under `user-service:<epoch>:{b<bucket>}:<generation>:<id>`.

    The braces are part of the key: by what is between them a cluster chooses the server.
    """

    def __init__(
        self,
        link: RedisLink,
        state: StateWatcher,
        *,
        document_format: str,
        ttl: int,
        metrics: Metrics,
    ) -> None:
        self._link = link
        self._state = state
        self._format = document_format.encode()
        self._ttl_ms = ttl * 1000
        self._wanted: _Waiting = {}
        self._is_cold = False
        self._flushes: set[asyncio.Future[list[Any]]] = set()
        self._hits, self._misses, self._bypasses = (
            metrics.cache_reads.labels(result) for result in ("hit", "miss", "bypass")
        )
        self._stored, self._refused = map(metrics.cache_fills.labels, ("stored", "refused"))
        self._publications = metrics.cache_publications

    def get(self, user_id: str) -> Awaitable[StoredDocument | Absent]:
        """Return the cached document, or why there is none.

        All gets of one turn of the event loop share a command. Where most of the turn before found
        nothing it leases, too.
        """
        loop = asyncio.get_running_loop()
        if not self._wanted:
            loop.call_soon(self._flush)
        future: asyncio.Future[StoredDocument | Absent] = loop.create_future()
        self._wanted.setdefault(user_id, []).append(future)
        return future

    def _flush(self) -> None:
        wanted, self._wanted = self._wanted, {}
        try:
            looking = self._is_cold and self._may_lease(wanted)
            # Of one server strings are a future already, and need no task.
            found = asyncio.ensure_future(self._look(wanted) if looking else self._strings(wanted))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is for those who wait
            fail(chain.from_iterable(wanted.values()), error)
            return
        self._flushes.add(found)
        found.add_done_callback(partial(self._answer, wanted))

    def _answer(self, wanted: _Waiting, found: asyncio.Future[list[Any]]) -> None:
        self._flushes.discard(found)
        if found.cancelled():
            values: list[Any] = [BYPASS] * len(wanted)
        elif error := found.exception():
            fail(chain.from_iterable(wanted.values()), error)
            return
        else:
            values = found.result()
        hits = bypasses = misses = 0
        for waiting, value in zip(wanted.values(), values, strict=True):
            answer = self._parse(value)
            if isinstance(answer, StoredDocument):
                hits += len(waiting)
            elif answer is BYPASS:
                bypasses += len(waiting)
            else:
                misses += len(waiting)
            tell(waiting, answer)
        self._hits.inc(hits)
        self._bypasses.inc(bypasses)
        self._is_cold = misses > hits

    async def get_many(self, ids: Sequence[str]) -> list[StoredDocument | Absent]:
        """Return what is cached of `ids`, in their order.

        Not each by `get`: a thousand futures cost as much as all the rest.
        """
        answers = list(map(self._parse, await self._strings(ids)))
        bypasses, misses = answers.count(BYPASS), answers.count(MISS) + answers.count(FOREIGN)
        self._bypasses.inc(bypasses)
        self._hits.inc(len(answers) - bypasses - misses)
        return answers

    def _strings(self, ids: Iterable[str]) -> Awaitable[list[Any]]:
        """Ask for what lies under the keys of `ids`, as they are by now."""
        if self._state.is_outdated:
            return self._strings_anew(ids)
        return self._link.strings(self._keys(ids))

    def _may_lease(self, ids: Collection[str]) -> bool:
        state = self._state
        return (
            self._link.is_one
            and len(ids) <= SCRIPT_LIMIT
            and not state.is_outdated
            and not any(state.is_quiet(bucket_of(user_id)) for user_id in ids)
        )

    def _look(self, ids: Collection[str]) -> Awaitable[list[Any]]:
        """Return what lies under the keys of `ids`, as `_strings` does, or the lease."""
        lease = _new_lease()
        # At once: a turn later they may be keys of a generation in which nothing may be leased yet.
        command = _eval(_LOOK, self._keys(ids), lease, LEASE_TTL_MS)
        return self._looked([command], lease, len(ids))

    async def _looked(self, look: Sequence[Command], lease: str, count: int) -> list[Any]:
        (found,) = await self._link.run(look)
        if not isinstance(found, list):
            return [found] * count
        return [Lease(lease) if value == 1 else value for value in found]

    async def _strings_anew(self, ids: Iterable[str]) -> list[Any]:
        await self._state.catch_up()
        return await self._link.strings(self._keys(ids))

    async def lease(self, absent: Mapping[str, Absent]) -> dict[str, str]:
        """Ask to fill who is `absent`, and not to be bypassed; returns the leases, by id.

        None are given for 10 s after the bucket's generation was raised: writes that are still
        under way have announced themselves under the old one, or not at all.
        """
        wanted = {i: found for i, found in absent.items() if found is not BYPASS}
        placed = {i: found.token for i, found in wanted.items() if isinstance(found, Lease)}
        free = [
            user_id
            for user_id in wanted
            if user_id not in placed and not self._state.is_quiet(bucket_of(user_id))
        ]
        # With nothing to ask for, a Redis that is not there yet would be waited for all the same.
        if free:
            lease = _new_lease()
            commands = [
                _eval(_LEASE_FOREIGN, [self._key(user_id)], lease, LEASE_TTL_MS, self._format)
                if absent[user_id] is FOREIGN
                else ("SET", self._key(user_id), lease, "NX", "PX", LEASE_TTL_MS)
                for user_id in free
            ]
            replies = zip(free, await self._link.run(commands), strict=True)
            placed |= {user_id: lease for user_id, reply in replies if _is_ok(reply)}
        self._misses.inc(len(placed))
        self._bypasses.inc(len(wanted) - len(placed))
        return placed

    async def fill(
        self, documents: Mapping[str, StoredDocument], leases: Mapping[str, str]
    ) -> None:
        """Store what was read, where the reader's lease is still there."""
        ids, limit = list(documents), SCRIPT_LIMIT if self._link.is_one else 1
        some = [ids[at : at + limit] for at in range(0, len(ids), limit)]
        replies = await self._link.run(
            [
                _eval(_FILL, self._keys(each), *self._filled(each, documents, leases))
                for each in some
            ]
        )
        stored = sum(reply for reply in replies if isinstance(reply, int))
        self._stored.inc(stored)
        self._refused.inc(len(ids) - stored)

    def _filled(
        self,
        ids: Iterable[str],
        documents: Mapping[str, StoredDocument],
        leases: Mapping[str, str],
    ) -> Iterator[object]:
        for user_id in ids:
            yield from (leases[user_id], self._encode(documents[user_id]), self._some_ttl())

    async def announce(self, ids: Iterable[str], announcement: Announcement) -> None:
        """Mark that a write is about to change `ids`."""
        state = self._state
        keys = {i: self._key(i) for i in ids if i not in announcement.keys}
        announcement.keys |= keys
        for bucket in map(bucket_of, keys):
            said = announcement.buckets.setdefault(bucket, Said(state.generation(bucket)))
            said.quiet = said.quiet or state.is_quiet(bucket)
        replies = await self._link.run(
            [_eval(_ANNOUNCE, [key], announcement.token, MARKER_TTL_MS) for key in keys.values()]
        )
        for user_id, reply in zip(keys, replies, strict=True):
            bucket = bucket_of(user_id)
            said = announcement.buckets[bucket]
            same = said.generation == state.generation(bucket)
            said.complete = said.complete and _is_ok(reply) and same

    async def publish(
        self, announcement: Announcement, outcomes: Mapping[str, Outcome]
    ) -> set[int]:
        """Take an announcement away, and store what its write committed.

        A user without an outcome is one of a write that was rolled back. Returns the buckets of
        which Redis could not be told.
        """
        commands = []
        for user_id, key in announcement.keys.items():
            outcome = outcomes.get(user_id)
            version = outcome.version if outcome else ""
            said = announcement.buckets[bucket_of(user_id)]
            # An announcement that was late may have taken away what another has published since.
            may_store = said.complete and not said.quiet
            document = outcome.document if outcome and may_store else None
            body = self._encode(document) if document else ""
            commands.append(
                _eval(_PUBLISH, [key], announcement.token, version, body, self._some_ttl())
            )
        replies = await self._link.run(commands)
        for reply in replies:
            result = reply.decode() if isinstance(reply, bytes) else "unreachable"
            self._publications.labels(result).inc()
        answered = zip(announcement.keys, replies, strict=True)
        return {bucket_of(user_id) for user_id, reply in answered if not isinstance(reply, bytes)}

    def _keys(self, ids: Iterable[str]) -> list[str]:
        namespaces = self._state.namespaces
        return [namespaces[bucket_of(user_id)] + user_id for user_id in ids]

    def _key(self, user_id: str) -> str:
        return self._state.namespaces[bucket_of(user_id)] + user_id

    def _encode(self, document: StoredDocument) -> bytes:
        return b"D%d %b\n%b" % (document.version, self._format, document.body)

    def _parse(self, value: object) -> StoredDocument | Absent:
        if value is None:
            return MISS
        if not isinstance(value, bytes):
            return value if isinstance(value, Lease) else BYPASS
        head, end, body = value.partition(b"\n")
        said = _said(head) if end else None
        if said is None:
            return BYPASS
        version, document_format = said
        if document_format != self._format:
            return FOREIGN
        return StoredDocument(version=version, body=body)

    def _some_ttl(self) -> int:
        """A time to live in ms, spread by a tenth so that what came together does not go so."""
        return int(self._ttl_ms * random.uniform(0.9, 1.0))  # noqa: S311 - no secret


def _eval(script: str, keys: Sequence[str], *arguments: object) -> tuple[Any, ...]:
    # Not EVALSHA: a server that restarted knows no scripts, and hashing 1 KB costs it 2 µs.
    return ("EVAL", script, len(keys), *keys, *arguments)


def _new_lease() -> str:
    return f"L{secrets.token_hex(8)}"


def _is_ok(reply: object) -> bool:
    return reply in (True, b"OK")


_HEAD = re.compile(rb"D([0-9]{1,18}) (\w+)")


@lru_cache(maxsize=1024)
def _said(head: bytes) -> tuple[int, bytes] | None:
    """Return the version and the format that a document says. Many users have the same few."""
    found = _HEAD.fullmatch(head)
    return None if found is None else (int(found[1]), found[2])
