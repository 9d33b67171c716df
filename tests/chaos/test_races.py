"""Races for a token, many rounds of each: one owner, no failure, no deadlock."""

import os

import httpx
import pytest
from user_service_server.embedded import EmbeddedPostgres
from user_service_server.settings import Settings

from ..engines import settings_for
from ..server.races import no_deadlock, opposite_moves, race_feedback, register_by_many

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "200"))


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    return settings_for(
        database_url, redis_url, PASSWORD_REQUIRED="false", FEEDBACK_MAX_PER_HOUR="1000000"
    )


@pytest.mark.parametrize(
    "race", [register_by_many, opposite_moves, race_feedback], ids=lambda race: race.__name__
)
async def test_a_race_ends_as_some_order_explains(
    race: object, http: httpx.AsyncClient, database_url: str, postgres: EmbeddedPostgres
) -> None:
    await race(http, database_url, ROUNDS)  # type: ignore[operator]
    assert no_deadlock(postgres.log_path)
