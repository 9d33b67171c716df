"""A program that hashes passwords, one a line of its standard input, until that ends.

A line is JSON: a password, and the hash it is to be compared with, or null to make one. It is
answered with a line: the hash, or whether the password is the hash's.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

YES, NO = "yes", "no"
_NICENESS = 10
"""The event loop, and whoever else answers, goes first. Idle cores hash as fast as ever.

No less than this: with SCHED_IDLE a hash takes seconds where others keep all cores busy.
"""


def _respond(hasher: PasswordHasher, password: str, password_hash: str | None) -> str:
    """Make a hash, or compare with one."""
    if password_hash is None:
        return hasher.hash(password)
    try:
        hasher.verify(password_hash, password)
    except (VerificationError, InvalidHashError):
        return NO
    return YES


def main() -> None:
    """Hash with the time and memory (KiB) cost of the arguments."""
    # Ctrl-C reaches the whole group: the service goes on with its requests, and ends this by
    # ending its input, as the system does where the service is killed.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICENESS)
    time_cost, memory_cost = map(int, sys.argv[1:])
    hasher = PasswordHasher(time_cost=time_cost, memory_cost=memory_cost, parallelism=1)
    for line in sys.stdin.buffer:
        sys.stdout.write(f"{_respond(hasher, *json.loads(line))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
