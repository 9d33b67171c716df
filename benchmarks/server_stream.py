"""Budget 8: a thousand subscribers of the change stream, and 200 changes a second.

The trial is that of tests/chaos/test_streams_crowd.py, whose long form lets some stop reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from benchmarks import cores
from benchmarks.budgets import Budget, Goal
from benchmarks.load import Running
from benchmarks.surroundings import Surroundings
from tests.system.crowd import Phase, gathered

READERS = 1000
RATE = 200.0
"""Changes a second, each in a transaction of its own."""
SECONDS = 8.0


def measure(surroundings: Surroundings) -> list[Budget]:
    """Measure it on a server of its own, whose memory is that of nothing else."""
    with surroundings.serve(confined_to=cores.of_the_server()) as started:
        url, headers = surroundings.engines.database_url, surroundings.headers
        with cores.confined(cores.of_all_else()):
            phase = asyncio.run(_follow(started.running, url, headers))
    return [
        Budget(
            8,
            f"{READERS} subscribers, {RATE:g} changes/s",
            (
                Goal(
                    name="p99 from change to client",
                    figure=phase.p99 * 1e3,
                    unit="ms",
                    bound="≤",
                    limit=250,
                    of="figure",
                    peers={
                        "p50": phase.p50 * 1e3,
                        "most": phase.most * 1e3,
                        "busy": phase.cpu,
                        "changes/s": phase.made / SECONDS,
                    },
                ),
                Goal(
                    name="memory of the server",
                    figure=phase.rss,
                    unit="MB",
                    bound="≤",
                    limit=250,
                    of="figure",
                ),
                Goal(
                    name="received",
                    figure=phase.received,
                    unit="events",
                    bound="≥",
                    limit=1,
                    ceiling=phase.made * READERS,
                    beside="changes times subscribers",
                ),
            ),
        )
    ]


async def _follow(server: Running, database_url: str, headers: Mapping[str, str]) -> Phase:
    async with gathered(server, database_url, READERS, 0, headers) as (crowd, users):
        return await crowd.phase(users, SECONDS, RATE)
