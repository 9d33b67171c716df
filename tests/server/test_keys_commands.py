"""`user-service keys`: what is printed, what is stored, and which names there may be."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner, Result
from user_service_server.cli import commands


@pytest.fixture
def run(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    for name, value in (("DATABASE_URL", database_url), ("REDIS_URL", redis_url)):
        monkeypatch.setenv(name, value)
    return CliRunner()


def keys(run: CliRunner, *arguments: str) -> Result:
    return run.invoke(commands, ["keys", *arguments])


def listed(run: CliRunner, key_id: str) -> list[str]:
    lines = [line for line in keys(run, "list").output.splitlines() if line.startswith(key_id)]
    return re.split(" {2,}", lines[0].strip())


def test_a_key_is_shown_once_rotated_and_revoked(run: CliRunner) -> None:
    scopes = ("--scope", "users:read", "--scope", "changes:read", "--expires", "90d")
    made = keys(run, "create", "sender", *scopes)
    assert made.exit_code == 0, made.output
    assert re.fullmatch(r"usk_[0-9a-z]{12}_[0-9a-f]{64}\n", made.output)
    _, key_id, secret = made.output.strip().split("_")
    assert secret not in keys(run, "list").output
    row = listed(run, key_id)
    assert row[1:3] == ["sender", "changes:read users:read"]
    assert row[5:] == ["-", "-"]

    rotated = keys(run, "rotate", key_id, "--grace", "1h")
    new_id = rotated.output.split("_")[1]
    assert new_id != key_id
    assert listed(run, new_id)[1:3] == row[1:3]
    assert listed(run, key_id)[5] != "-"
    assert keys(run, "rotate", key_id).exit_code == 1

    for one in (key_id, new_id):
        assert keys(run, "revoke", one).exit_code == 0
        assert listed(run, one)[5] != "-"
    again = keys(run, "revoke", new_id)
    assert (again.exit_code, again.output.count("\n")) == (1, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("anonymous", "--scope", "users:read"),
        ("", "--scope", "users:read"),
        ("two words", "--scope", "users:read"),
        ("line\nbreak", "--scope", "users:read"),
        ("x" * 65, "--scope", "users:read"),
        ("sender",),
        ("sender", "--scope", "everything"),
        ("sender", "--scope", "users:read", "--expires", "soon"),
        ("sender", "--scope", "users:read", "--expires", "-1d"),
    ],
    ids=ascii,
)
def test_what_is_no_key_is_not_made(run: CliRunner, arguments: tuple[str, ...]) -> None:
    before = keys(run, "list").output
    assert keys(run, "create", *arguments).exit_code == 2
    assert keys(run, "list").output == before
