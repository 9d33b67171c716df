"""The search of `tests/client/test_cache_machine.py` for `CHAOS_SECONDS`, never twice the same."""

from __future__ import annotations

import os
import time

import pytest

from ..client.test_cache_machine import ClientMachine, LiveMachine, search

SECONDS = float(os.environ.get("CHAOS_SECONDS", "60"))


@pytest.mark.parametrize("machine", [ClientMachine, LiveMachine])
def test_no_read_is_older_than_heard_of_or_allowed_for_long(machine: type[ClientMachine]) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        search(machine, max_examples=100)
