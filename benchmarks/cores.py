"""Owns which core does what: the server that is measured has one for itself, all else the others.

Where the system lets nobody choose (macOS), everything runs anywhere, and figures are noisier.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def usable() -> list[int]:
    """Return the cores that this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def of_the_server() -> list[int]:
    """Return the core of the server that is measured."""
    return usable()[:1]


def of_all_else() -> list[int]:
    """Return the cores of the engines and of who makes the load; on one core, the same one."""
    return usable()[1:] or usable()


@contextmanager
def confined(cores: list[int]) -> Iterator[None]:
    """Let what is started meanwhile run on these cores only, as taskset does."""
    before = usable()
    if not before:
        yield
        return
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
