"""Spans for OpenTelemetry: one a call, a child for each of its attempts.

    pip install "user-service-client[opentelemetry]"

    client = UserServiceClient(url, tracing=OpenTelemetryTracing())

Attributes are those of the semantic conventions for HTTP client spans, without the address: that
has ids in it. What is answered from the client's own copies makes no span.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider


class OpenTelemetryTracing:
    """Puts spans around calls and attempts, and tells the service of them (W3C Trace Context).

    Args:
        tracer_provider: Makes the spans; None: the global one.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("user_service_client", tracer_provider=tracer_provider)

    @contextmanager
    def call(self, operation: str) -> Iterator[None]:
        """Return the span of a call."""
        with self._tracer.start_as_current_span(f"user_service {operation}"):
            yield

    @contextmanager
    def attempt(
        self, operation: str, number: int, method: str, headers: MutableMapping[str, str]
    ) -> Iterator[Callable[[int], None]]:
        """Return the span of an attempt."""
        attributes: dict[str, str | int] = {
            "user_service.operation": operation,
            "http.request.method": method,
            "http.request.resend_count": number - 1,
            "server.address": headers["Host"].rpartition(":")[0] or headers["Host"],
        }
        with self._tracer.start_as_current_span(
            f"user_service {operation} attempt", kind=SpanKind.CLIENT, attributes=attributes
        ) as span:
            propagate.inject(headers)

            def told(status: int) -> None:
                span.set_attribute("http.response.status_code", status)
                if status >= 400:
                    span.set_attribute("error.type", str(status))
                    span.set_status(Status(StatusCode.ERROR))

            yield told
