"""The HTTP of health and metrics."""

from __future__ import annotations

import asyncio
import time

from litestar import Router, get
from litestar.response.base import ASGIResponse
from user_service_schemas import Dependency, Error, ErrorCode, Health, Probe

from ..errors import ServiceError
from ..http.answers import HTTPRequest, ReadyAnswer, answer
from ..http.operations import operation
from ..metrics import CONTENT_TYPE, Metrics
from ..storage.database import Database
from ..storage.link import RedisLink
from ..storage.replica import Replica
from ..storage.state import StateWatcher


class NotReady(ServiceError):
    code = ErrorCode.OVERLOADED
    message = "The service is shutting down."

    def __init__(self) -> None:
        super().__init__(headers=[("Retry-After", "1")])


def health_router(
    version: str,
    *,
    database: Database,
    state: StateWatcher,
    replica: Replica,
    link: RedisLink,
    draining: asyncio.Event,
) -> Router:
    """Return the probes."""

    @get(
        "/health",
        **operation(
            "get_health",
            "Check the service and what it depends on",
            {200: Health, 503: Health},
        ),
    )
    async def get_health(request: HTTPRequest) -> ReadyAnswer:
        began = time.perf_counter()
        _, redis_is_up = await asyncio.gather(state.look(), link.ping())
        redis_latency = time.perf_counter() - began if redis_is_up else None
        postgres_is_up = database.reachable
        replica_is_well = replica.is_well or not replica.is_used
        well = "healthy" if redis_is_up and replica_is_well else "degraded"
        status = well if postgres_is_up else "unhealthy"
        replicas = {"replica": _replica(replica)} if replica.is_used else {}
        health = Health(
            status=status,
            version=version,
            dependencies={
                "postgres": _dependency(state.latency),
                "redis": _dependency(redis_latency),
                **replicas,
            },
        )
        return answer(
            health,
            f"The service is {status}",
            status=200 if postgres_is_up else 503,
            error=None if postgres_is_up else _unavailable(request),
        )

    @get("/health/live", **operation("get_liveness", "Whether the process runs", Probe))
    async def get_liveness() -> ReadyAnswer:
        return answer(Probe(status="alive"), "The process runs")

    @get(
        "/health/ready",
        **operation(
            "get_readiness",
            "Whether the service takes requests",
            Probe,
            description="Without Postgres it does: cached reads must not vanish with it.",
        ),
    )
    async def get_readiness() -> ReadyAnswer:
        if draining.is_set():
            raise NotReady
        return answer(Probe(status="ready"), "The service takes requests")

    return Router("/", route_handlers=[get_health, get_liveness, get_readiness])


def metrics_router(metrics: Metrics) -> Router:
    """Return the route that Prometheus reads."""

    @get("/metrics", include_in_schema=False)
    async def get_metrics() -> ASGIResponse:
        return ASGIResponse(body=metrics.render(), media_type=CONTENT_TYPE)

    return Router("/", route_handlers=[get_metrics])


def _unavailable(request: HTTPRequest) -> Error:
    return Error(
        code=ErrorCode.DEPENDENCY_UNAVAILABLE, request_id=request.scope["state"]["request_id"]
    )


def _replica(replica: Replica) -> Dependency:
    answered = _dependency(replica.latency)
    if answered.latency_ms is None or replica.is_well:
        return answered
    return Dependency(status="behind", latency_ms=answered.latency_ms)


def _dependency(latency: float | None) -> Dependency:
    if latency is None:
        return Dependency(status="down", latency_ms=None)
    return Dependency(status="up", latency_ms=round(latency * 1000, 2))
