"""How late the heartbeats of a stream are heard, by two clocks that cannot be compared."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from user_service_client._coverage import Lateness

SENT = datetime(2026, 1, 1, 12, tzinfo=UTC)
INTERVAL = 15.0


def after(seconds: float) -> datetime:
    return SENT + timedelta(seconds=seconds)


def test_a_heartbeat_is_late_beside_the_promptest() -> None:
    lateness = Lateness()
    assert lateness.of(after(0), heard=7.2) == 0
    assert lateness.of(after(15), heard=22.0) == 0
    assert lateness.of(after(30), heard=77.0) == pytest.approx(40, abs=0.1)
    assert lateness.of(after(45), heard=77.0) == pytest.approx(25, abs=0.1)
    assert lateness.of(after(75), heard=82.0) == 0


def test_clocks_that_drift_apart_make_nothing_late() -> None:
    """A connection lasts for weeks; without NTP, a clock may lose 10 s a day."""
    lateness = Lateness()
    for beat in range(7 * 24 * 60 * 4):
        passed = beat * INTERVAL
        assert lateness.of(after(passed * (1 - 10 / 86_400)), heard=passed) < 0.01


def test_a_clock_that_was_set_back_is_forgiven_in_the_end() -> None:
    lateness = Lateness()
    lateness.of(after(60), heard=0)
    assert lateness.of(after(15), heard=15) == pytest.approx(60, abs=0.1)
    heard = 0.0
    for beat in range(2, 5000):
        heard = beat * INTERVAL
        lateness.of(after(heard), heard=heard)
    assert lateness.of(after(heard + INTERVAL), heard=heard + INTERVAL) == 0
