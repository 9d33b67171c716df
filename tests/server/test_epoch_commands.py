"""`user-service epoch`: the epoch in force, and a new one."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from user_service_server.cli import commands


def test_a_renewed_epoch_is_the_one_in_force(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("DATABASE_URL", database_url), ("REDIS_URL", redis_url)):
        monkeypatch.setenv(name, value)
    runner = CliRunner()
    before, renewed, after = (
        runner.invoke(commands, ["epoch", command]).output for command in ("show", "renew", "show")
    )
    assert before != renewed == after
    assert len(renewed.strip()) == 8
