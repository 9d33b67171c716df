"""The search of all logs finds what it is to find."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from ..private import PRIVATE, Private, is_telling


@pytest.mark.parametrize(
    "line",
    [
        '{"event":"request","email":"ada@example.com"}',
        '{"method":"GET","route":"/api/v1/users/ada%40example.org","status":404}',
        "DETAIL:  Key (email_key)=(Ada@Example.com) already exists.",
        "usk_0123456789ab_00ff",
        "$argon2id$v=19$m=19456",
        "password=Correct-Horse-9",
        "parameters: $1 = 'fcm:token-17'",
    ],
)
def test_what_is_private_is_found_in_a_log(tmp_path: Path, line: str) -> None:
    private = Private()
    private.note(
        b'{"password":"Correct-Horse-9","name":"A",'
        b'"items":[{"token":"fcm:token-17"},{"token":"web"}]}'
    )
    log = tmp_path / "log"
    log.write_text(f"one line\n{line}\nanother\n")
    private.search(log)
    assert private.found


def test_what_a_server_says_of_requests_is_not(tmp_path: Path) -> None:
    private = Private()
    private.note(b'{"password":"password","token":"12345678"}')
    log = tmp_path / "log"
    log.write_text(
        '{"method":"PUT","route":"/api/v1/users/{user_id}/password","status":200,"ms":12.5,'
        '"event":"request","request_id":"01a20e65-6b67-75b3-a6ee-d33fecc3bf35","level":"info",'
        '"at":"2026-11-24T16:57:17.264634Z"}\n'
    )
    private.search(log)
    assert private.found == []


def test_requests_of_this_run_are_noted() -> None:
    """Words and short numbers are not: they are in logs for other reasons."""
    httpx.Request("POST", "http://test", json={"devices": [{"token": "noted-Token-1"}]})
    assert "noted-Token-1" in PRIVATE.values
    assert not any(map(is_telling, ("password", "12345678", "Short-1", "Connection")))
