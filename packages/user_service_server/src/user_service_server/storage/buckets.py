"""The buckets of the cache: each user is in one, and what is left behind is left behind by bucket.

A write that Redis could not be told of costs what else is in its users' buckets, and no more. In a
Redis Cluster a bucket lies on one server, so a server that is down costs the buckets on it.
"""

from __future__ import annotations

from itertools import product
from string import hexdigits
from typing import Final

from redis.crc import key_slot

BUCKETS: Final = 64
"""How many there are: as many as the table `cache_generations` has rows. A handful for each server
of a large cluster, and few enough to be read twice a second by every process."""
ALL_BUCKETS: Final = range(BUCKETS)
# Looked up, not computed: a batch of 1000 needs 1000.
_OF_END: Final = {
    "".join(two): int("".join(two), 16) % BUCKETS for two in product(hexdigits, repeat=2)
}


def bucket_of(user_id: str) -> int:
    """Return the bucket of a user, by the end of its UUID: that is random, the beginning a time."""
    return _OF_END[user_id[-2:]]


def hash_tag(bucket: int) -> str:
    """Return the part of a key by which a cluster keeps a bucket together."""
    return f"{{b{bucket}}}"


def slot_of(bucket: int) -> int:
    """Return the slot of a cluster in which a bucket lies."""
    return key_slot(hash_tag(bucket).encode())
