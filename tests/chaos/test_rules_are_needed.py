"""Each rule of the cache earns its place: without it, the test that is named for it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .mutations import RULES

ROOT = Path(__file__).parents[2]
TESTS = {
    "announcement": "test_announcement_takes_the_lease_of_a_read_from_before",
    "lease": "test_lease_that_is_gone_keeps_a_stalled_read_from_filling",
    "last_writer": "test_last_writer_publishes_and_no_one_before",
    "highest_version": "test_highest_version_in_the_marker_keeps_an_older_one_from_being_stored",
    "generation_unannounced": "test_generation_is_raised_by_a_write_that_could_not_announce",
    "generation_unpublished": "test_generation_is_raised_by_a_write_that_could_not_publish",
    "generation_stranger": "test_generation_is_raised_for_a_redis_that_nobody_has_seen",
    "recent_look": "test_server_that_stood_still_looks_before_it_believes_the_cache",
    "quiet_time": "test_quiet_time_after_a_raise_keeps_reads_from_filling",
    "detached_futures": "test_futures_are_detached_by_a_write",
    "quiet_announcement": "test_write_announced_in_a_quiet_time_stores_nothing",
    "deleted_version": "test_deletion_publishes_its_version",
}


def test_every_rule_has_its_test() -> None:
    assert TESTS.keys() == RULES.keys()


@pytest.mark.parametrize("rule", TESTS)
def test_without_the_rule_its_test_fails(rule: str) -> None:
    ran = run_without(rule, f"tests/server/test_cache_rules.py::{TESTS[rule]}")
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout + ran.stderr
    # By what the rule is about, and not by an error of the test itself.
    assert f"{TESTS[rule]} - AssertionError: " in ran.stdout, ran.stdout
    print(next(line for line in ran.stdout.splitlines() if line.startswith("FAILED")))  # noqa: T201


def test_with_all_rules_all_tests_pass() -> None:
    ran = run_without("", *(f"tests/server/test_cache_rules.py::{name}" for name in TESTS.values()))
    assert ran.returncode == pytest.ExitCode.OK, ran.stdout + ran.stderr


def run_without(rule: str, *tests: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run tests without a rule; one that searches does so for `seconds`."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.chaos.mutations", "-q", *tests]
    environ = {**os.environ, "WITHOUT": rule, "COLUMNS": "300", "CHAOS_SECONDS": str(seconds)}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + 2 * seconds,
    )
