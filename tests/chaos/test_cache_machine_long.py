"""The search of `tests/server/test_cache_machine.py` for `CHAOS_SECONDS`, never twice the same."""

from __future__ import annotations

import os
import time

from hypothesis import Phase
from user_service_server.settings import Settings

from ..server.test_cache_machine import search

SECONDS = float(os.environ.get("CHAOS_SECONDS", "60"))


def test_no_read_is_older_than_what_was_acknowledged_for_long(settings: Settings) -> None:
    # Where a rule is taken out (see `mutations`), that something is found is enough.
    phases = [Phase.generate] if os.environ.get("WITHOUT") else [Phase.generate, Phase.shrink]
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        # By chance alone: the usual way follows each example by five that are much like it.
        search(settings, 50, max_examples=30, phases=phases, backend="hypothesis-urandom")
