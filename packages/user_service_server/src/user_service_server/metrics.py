"""What the service counts and measures, in Prometheus' terms."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds."""


@dataclass(slots=True)
class _Durations:
    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    """How many were within each of the bounds and beyond the one before; then all others."""
    seconds: float = 0.0


class RequestMetrics(Collector):
    """How many requests were answered, and how long they took.

    Prometheus' own counter and histogram take 4 µs of each request, for locks that nobody needs who
    counts in one thread, and for labels that are looked up each time. This takes 1.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, int], int] = {}
        self._durations: dict[tuple[str, str], _Durations] = {}

    def note(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered after `seconds`."""
        key = (method, route, status)
        self._counts[key] = self._counts.get(key, 0) + 1
        durations = self._durations.get((method, route))
        if durations is None:
            durations = self._durations[method, route] = _Durations()
        durations.counts[bisect_left(_BOUNDS, seconds)] += 1
        durations.seconds += seconds

    def collect(self) -> Iterator[Metric]:
        """Yield both metrics, as Prometheus wants them; from any thread."""
        counter = CounterMetricFamily(
            "user_service_http_requests",
            "Requests answered.",
            labels=["method", "route", "status"],
        )
        for (method, route, status), count in self._counts.copy().items():
            counter.add_metric([method, route, str(status)], count)
        yield counter
        histogram = HistogramMetricFamily(
            "user_service_http_request_duration_seconds",
            "Time from the first byte of a request to the last of its answer.",
            labels=["method", "route"],
        )
        bounds = [*map(str, _BOUNDS), "+Inf"]
        for labels, durations in self._durations.copy().items():
            buckets = list(zip(bounds, accumulate(durations.counts), strict=True))
            histogram.add_metric(labels, buckets, durations.seconds)
        yield histogram


class Metrics:
    """All metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        # `…_created`: a series more for each, that nobody reads.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.requests = RequestMetrics()
        self.registry.register(self.requests)
        self.cache_reads = Counter(
            "user_service_cache_reads",
            "Documents asked of the cache: hit, miss, bypass (a writer is at it, or no Redis).",
            ["result"],
            registry=self.registry,
        )
        self.cache_fills = Counter(
            "user_service_cache_fills",
            "Documents read from Postgres: stored, or refused since the lease was gone.",
            ["result"],
            registry=self.registry,
        )
        self.cache_publications = Counter(
            "user_service_cache_publications",
            "Documents written: stored, noted (other writers remain), cleared, lost (the marker was"
            " gone), unreachable.",
            ["result"],
            registry=self.registry,
        )
        self.generation_raised = Counter(
            "user_service_cache_generation_raised",
            "How often this process left behind what was cached, and why: 1 for all of it.",
            ["reason"],
            registry=self.registry,
        )
        self.idempotent_replays = Counter(
            "user_service_idempotent_replays",
            "Writes that were answered with what was recorded.",
            registry=self.registry,
        )
        self.feedback = Counter(
            "user_service_feedback",
            "Reports of senders: applied, ignored (seen since, known, or to be counted only),"
            " unknown.",
            ["channel", "reason", "result"],
            registry=self.registry,
        )
        self.feedback_braked = Counter(
            "user_service_feedback_braked",
            "Reports of senders that FEEDBACK_MAX_PER_HOUR stopped.",
            registry=self.registry,
        )
        self.feed_position = Gauge(
            "user_service_feed_position",
            "The last position of the change feed that this process has seen.",
            registry=self.registry,
        )
        self.feed_lag = Gauge(
            "user_service_feed_lag_seconds",
            "While changes wait for a position: how long ago none did.",
            registry=self.registry,
        )
        self.feed_through_lag = Gauge(
            "user_service_feed_through_lag_seconds",
            "How far the time up to which the feed is complete lies behind.",
            registry=self.registry,
        )
        self.feed_numbered = Counter(
            "user_service_feed_numbered",
            "Changes that this process gave a position.",
            registry=self.registry,
        )
        self.stream_subscribers = Gauge(
            "user_service_stream_subscribers", "Open streams.", registry=self.registry
        )
        self.stream_events = Counter(
            "user_service_stream_events",
            "Events put on streams, times their subscribers.",
            registry=self.registry,
        )
        self.streams_ended = Counter(
            "user_service_streams_ended",
            "Streams ended: client, age, shutdown, too_slow, interrupted (no Postgres).",
            ["reason"],
            registry=self.registry,
        )
        self.redis_reachable = Gauge(
            "user_service_redis_reachable", "1 while Redis answers.", registry=self.registry
        )
        self.postgres_reachable = Gauge(
            "user_service_postgres_reachable", "1 while Postgres answers.", registry=self.registry
        )
        self.replica_usable = Gauge(
            "user_service_replica_usable",
            "1 while a replica is there, and shows what this process knows of.",
            registry=self.registry,
        )
        self.replica_reads = Counter(
            "user_service_replica_reads",
            "Documents asked of the replica: used; or read from Postgres since they were absent, or"
            " the replica was behind, or failed.",
            ["result"],
            registry=self.registry,
        )
        self.unauthenticated = Counter(
            "user_service_unauthenticated",
            "Requests with a wrong key, or one that is not valid any more.",
            registry=self.registry,
        )
        self.rate_limited = Counter(
            "user_service_rate_limited",
            "Requests refused since their caller asks too much, by class.",
            ["traffic"],
            registry=self.registry,
        )
        self.rate_limits_uncounted = Counter(
            "user_service_rate_limits_uncounted",
            "Requests that no limit could be held against, since Redis did not answer.",
            registry=self.registry,
        )
        self.passwords_waiting = Gauge(
            "user_service_passwords_waiting",
            "Passwords being hashed or waiting for it.",
            registry=self.registry,
        )

    def render(self) -> bytes:
        """Return the metrics in the text format."""
        return generate_latest(self.registry)
