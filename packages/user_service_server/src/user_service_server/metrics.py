"""What the service counts and measures, in Prometheus' terms."""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """All metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        # `…_created`: a series more for each, that nobody reads.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "user_service_http_requests",
            "Requests answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "user_service_http_request_duration_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ["method", "route"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=self.registry,
        )
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
