"""A day of a campaign: the short form of `tests/chaos/test_campaign.py`."""

from __future__ import annotations

from datetime import UTC, datetime

from ..schemas.wall_clocks import STRANGE_ZONES
from .campaign import assert_campaign_goes_right


async def test_everybody_is_sent_one_push_at_the_first_allowed_minute() -> None:
    """2,000 people, on the night on which Europe's clocks go forward."""
    start = datetime(2026, 3, 28, 20, tzinfo=UTC)
    print(await assert_campaign_goes_right(2_000, start, STRANGE_ZONES, seed=1))  # noqa: T201
