"""Passwords: which are refused, and how they are hashed without stopping everything else."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from user_service_schemas import FieldError

from ..errors import Overloaded
from ..settings import Settings

T = TypeVar("T")


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
    """Hashes and verifies off the event loop: a bounded number at once, and a bounded queue.

    argon2id at m=19456 KiB, t=2, p=1 (OWASP Password Storage Cheat Sheet): about 18 ms of a core.
    """

    def __init__(self, settings: Settings) -> None:
        self._hasher = PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)
        workers = settings.hash_concurrency or usable_cpus()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="argon2")
        self._limit = workers + settings.hash_queue
        self._waiting = 0
        # Verified for whoever has no password; made now, since the first to need it would take
        # twice as long.
        self._nobodys = self._hasher.hash(os.urandom(16))

    async def hash(self, password: str) -> str:
        """Return the encoded argon2id hash; raises `Overloaded` when too many wait."""
        return await self._run(lambda: self._hasher.hash(password))

    async def verify(self, password: str, password_hash: str | None) -> bool:
        """Whether `password` belongs to the hash; the same work where there is none.

        Raises:
            Overloaded: too many wait.
        """
        return await self._run(lambda: self._verify(password, password_hash))

    def _verify(self, password: str, password_hash: str | None) -> bool:
        try:
            self._hasher.verify(password_hash or self._nobodys, password)
        except (VerificationError, InvalidHashError):
            return False
        return password_hash is not None

    def is_outdated(self, password_hash: str) -> bool:
        """Whether a hash was made with weaker parameters than are used now."""
        return self._hasher.check_needs_rehash(password_hash)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting >= self._limit:
            raise Overloaded
        self._waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        future.add_done_callback(self._done)
        return await future

    def _done(self, _future: asyncio.Future[T]) -> None:
        self._waiting -= 1

    @property
    def waiting(self) -> int:
        """How many passwords are being hashed or wait for it."""
        return self._waiting

    def close(self) -> None:
        """Let go of the threads; what still waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def usable_cpus(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many CPUs this process may use: its affinity, or its cgroup's quota if less."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpus = affinity or 1
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, math.ceil(int(quota) / int(period))))
