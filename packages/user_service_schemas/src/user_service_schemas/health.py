"""How the service says that it is well."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ._base import Response, freeze


class Dependency(Response, frozen=True):
    """One thing the service stands on: `up` or `down`, and how long it took to answer, in ms.

    A replica of Postgres may be `behind`, too: it answers, and what it shows is too old.
    """

    status: str
    latency_ms: float | None


class Health(Response, frozen=True):
    """`healthy`, `degraded` (no Redis or no replica: reads come from Postgres) or `unhealthy`."""

    status: str
    version: str
    dependencies: Mapping[str, Dependency]

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "dependencies", freeze(self.dependencies))


class Probe(Response, frozen=True):
    """One word of a liveness or readiness probe."""

    status: str
