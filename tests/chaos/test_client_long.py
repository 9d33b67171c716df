"""The long forms of the client's tests: memory at 50,000 copies, and how late a live one is."""

from __future__ import annotations

import pytest
from user_service_client import _coverage

from ..client.test_cache_memory import measure
from ..servers import Server, serving
from ..system.feed_trial import quantile
from ..system.test_live import measure_lags

CHANGES = 1_000


async def test_memory_of_fifty_thousand_copies() -> None:
    kept, own = await measure(50_000)
    print(f"\na copy takes {kept:.0f} bytes, its struct {own:.0f}: {kept / own:.2f}")  # noqa: T201
    assert kept <= 1.5 * own


async def test_how_late_a_live_client_of_another_server_is(
    server: Server, database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_coverage, "LAG", 0.0)
    with serving(database_url, redis_url, REDIS_TIMEOUT_MS="2000") as other:
        lags = await measure_lags(server.url, other.url, CHANGES)
    p50, p99, most = (1000 * quantile(lags, share) for share in (0.5, 0.99, 1.0))
    print(f"\n{CHANGES} changes: p50 {p50:.0f} ms, p99 {p99:.0f}, most {most:.0f}")  # noqa: T201
    assert p99 < 2000
