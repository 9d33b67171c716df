"""The hypothesis machine finds that a rule of the cache is missing, whichever it is."""

from __future__ import annotations

import os
import re

import pytest

from .mutations import RULES
from .test_rules_are_needed import run_without

SECONDS = float(os.environ.get("CHAOS_SECONDS", "300"))
"""How long it may look for one: some hundred examples, even on a machine that others use, too."""
FOUND = re.compile(r"\.Broken: (.*)")


@pytest.mark.parametrize("rule", RULES)
def test_without_the_rule_the_machine_finds_an_order_that_goes_wrong(rule: str) -> None:
    test = "tests/chaos/test_cache_machine_long.py"
    ran = run_without(rule, test, seconds=SECONDS)
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout + ran.stderr
    # By what the machine demands, and not by an error of its own.
    found = FOUND.search(ran.stdout)
    assert found, ran.stdout
    print(f"{rule}: {found[1]}; {ran.stdout.splitlines()[-1]}")  # noqa: T201 - the figures are asked for
