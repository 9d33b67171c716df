"""A day of a campaign, in full: `CAMPAIGN_PEOPLE` (100,000) people, in every zone there is."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import pytest

from ..client.campaign import assert_campaign_goes_right
from ..schemas.wall_clocks import ALL_ZONES

PEOPLE = int(os.environ.get("CAMPAIGN_PEOPLE", "100000"))


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(datetime(2026, 3, 28, 20, tzinfo=UTC), id="clocks-go-forward"),
        pytest.param(datetime(2026, 10, 24, 20, tzinfo=UTC), id="clocks-go-back"),
    ],
)
async def test_everybody_is_sent_one_push_at_the_first_allowed_minute(start: datetime) -> None:
    """Whoever may not be sent to is not, whoever is held gets it when that ends, nobody twice."""
    print()  # noqa: T201
    print(await assert_campaign_goes_right(PEOPLE, start, ALL_ZONES, seed=1))  # noqa: T201
