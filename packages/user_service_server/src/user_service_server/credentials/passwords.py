"""Passwords: which are refused, and how they are hashed without stopping everything else."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path
from typing import Final

from argon2 import PasswordHasher
from user_service_schemas import FieldError

from ..settings import Settings
from .hashers import Hashers

TIME_COST: Final = 2
MEMORY_COST: Final = 19456
"""KiB."""


@cache
def _common_passwords() -> frozenset[str]:
    """Return the 30,000 most common passwords, as zxcvbn ranks them from leaks."""
    from zxcvbn.frequency_lists import FREQUENCY_LISTS  # noqa: PLC0415 - 1 MB that few need

    return frozenset(FREQUENCY_LISTS["passwords"])


def judge_password(password: str, *, field: str, email: str, name: str) -> list[FieldError]:
    """Return what is wrong with a new password (NIST SP 800-63B, section 5.1.1.2)."""
    lowered = password.casefold().strip()
    if lowered in _common_passwords():
        return [FieldError(field=field, message="This password is among the most common ones.")]
    if lowered in (email.casefold(), name.casefold()):
        return [FieldError(field=field, message="The password must not be the email or name.")]
    return []


class Passwords:
    """Hashes and verifies off the event loop.

    argon2id at m=19456 KiB, t=2, p=1 (OWASP Password Storage Cheat Sheet): about 18 ms of a core.
    """

    def __init__(self, settings: Settings) -> None:
        hasher = PasswordHasher(time_cost=TIME_COST, memory_cost=MEMORY_COST, parallelism=1)
        self.is_outdated: Final = hasher.check_needs_rehash
        """Whether a hash was made with weaker parameters than are used now."""
        self._hashers = Hashers(
            settings.hash_concurrency or usable_cpus(),
            settings.hash_queue,
            (TIME_COST, MEMORY_COST),
        )
        # Verified for whoever has no password; made now, since the first to need it would take
        # twice as long.
        self._nobodys = hasher.hash(os.urandom(16))

    def start(self) -> None:
        """Begin to hash."""
        self._hashers.start()

    async def hash(self, password: str) -> str:
        """Return the encoded argon2id hash; raises `Overloaded` when too many wait."""
        return await self._hashers.make(password)

    async def verify(self, password: str, password_hash: str | None) -> bool:
        """Whether `password` belongs to the hash; the same work where there is none.

        Raises:
            Overloaded: too many wait.
        """
        is_right = await self._hashers.compare(password, password_hash or self._nobodys)
        return is_right and password_hash is not None

    @property
    def waiting(self) -> int:
        """How many passwords are being hashed or wait for it."""
        return self._hashers.waiting

    async def close(self) -> None:
        """End what hashes; what still waits is dropped."""
        await self._hashers.close()


def usable_cpus(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many CPUs this process may use: its affinity, or its cgroup's quota if less."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpus = affinity or 1
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, math.ceil(int(quota) / int(period))))
