"""The long form of the feed's trial: 100,000 changes (issue 3, point 4)."""

from __future__ import annotations

from collections import Counter

from ..engines import Engines
from ..servers import serving
from ..system.feed_trial import quantile, run_trial

CHANGES = 100_000


async def test_feed_skips_nothing_in_a_hundred_thousand_changes(
    engines: Engines, database_url: str, redis_url: str
) -> None:
    other = engines.create_database("long_feed_other")
    with serving(database_url, redis_url) as one, serving(database_url, redis_url) as two:
        trial = await run_trial([one.url, two.url], database_url, other, CHANGES, seed=2)
    lines = [f"{len(trial.committed)} changes"]
    for name, received in trial.readers.items():
        lags = trial.lags(name) if not trial.faults(received) else []
        assert lags, trial.faults(received)[:10]
        p50, p99, most = (1000 * quantile(lags, share) for share in (0.5, 0.99, 1.0))
        twice = len(received.changes) - len(lags)
        lines.append(f"{name}: p50 {p50:.0f} ms, p99 {p99:.0f}, most {most:.0f}; {twice} twice")
        assert quantile(lags, 0.99) < 2
    wrong = {"number": trial.by_number, "transaction": trial.by_transaction}
    for name, received in wrong.items():
        kinds = Counter(fault.split(":")[1].split()[2] for fault in trial.faults(received))
        lines.append(f"by {name}: {dict(kinds)}")
        assert kinds
    assert trial.stalled
    print("\n" + "\n".join(lines))  # noqa: T201 - the figures are asked for
