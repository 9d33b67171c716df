"""The spans of calls and attempts, as OpenTelemetry's SDK sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from user_service_client import ServerError, UserServiceClient, UserServiceError
from user_service_client.opentelemetry import OpenTelemetryTracing

from tests.client.conftest import ETAG, USER, USER_ID, envelope
from tests.client.virtual import VirtualClock

NAME, EMAIL, PHONE = "John Doe", "john@example.com", "+48221234567"
PASSWORD, TOKEN, KEY = "geheim-geheim", "fcm_token", "usk_key"


@dataclass
class Traced:
    """A client whose spans are kept."""

    answers: list[httpx.Response | Exception] = field(default_factory=list)
    sent: list[httpx.Request] = field(default_factory=list)
    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)
    clock: VirtualClock = field(default_factory=VirtualClock)
    client: UserServiceClient = field(init=False)

    def __post_init__(self) -> None:
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("of the caller")
        self.client = UserServiceClient(
            "http://users.test",
            api_key=KEY,
            tracing=OpenTelemetryTracing(provider),
            transport=httpx.MockTransport(self.handle),
            clock=self.clock,
        )

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        """In the order in which they ended."""
        return self.exporter.get_finished_spans()


@pytest.fixture
async def traced() -> AsyncIterator[Traced]:
    traced = Traced()
    async with traced.client:
        yield traced


def success() -> httpx.Response:
    return httpx.Response(200, content=envelope(USER), headers={"ETag": ETAG})


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    number: int = span.context.span_id
    return number


async def test_a_call_is_one_span_with_a_child_for_each_attempt(traced: Traced) -> None:
    traced.answers = [httpx.ReadError("reset"), httpx.Response(503), success()]
    await traced.client.users.update(USER_ID, name="J")
    *attempts, call = traced.spans
    assert (call.name, call.kind, call.parent) == (
        "user_service users.update",
        SpanKind.INTERNAL,
        None,
    )
    assert call.status.status_code is StatusCode.UNSET
    assert len(attempts) == 3
    for number, attempt in enumerate(attempts):
        assert (attempt.name, attempt.kind) == (
            "user_service users.update attempt",
            SpanKind.CLIENT,
        )
        assert attempt.parent is not None
        assert attempt.parent.span_id == span_id(call)
        assert attempt.attributes is not None
        assert attempt.attributes["http.request.resend_count"] == number
    assert [attempt.status.status_code for attempt in attempts] == [
        StatusCode.ERROR,
        StatusCode.ERROR,
        StatusCode.UNSET,
    ]
    statuses = [(a.attributes or {}).get("http.response.status_code") for a in attempts]
    assert statuses == [None, 503, 200]


async def test_a_call_that_fails_is_a_span_with_an_error(traced: Traced) -> None:
    traced.answers = [httpx.Response(500)] * 3
    with pytest.raises(ServerError):
        await traced.client.users.delete(USER_ID)
    *attempts, call = traced.spans
    assert {span.status.status_code for span in (*attempts, call)} == {StatusCode.ERROR}


async def test_the_service_is_told_of_the_attempt_that_asks_it(traced: Traced) -> None:
    traced.answers = [httpx.Response(503), success()]
    await traced.client.users.update(USER_ID, name="J")
    *attempts, call = traced.spans
    assert call.context is not None
    told = [request.headers["traceparent"] for request in traced.sent]
    trace_id = f"{call.context.trace_id:032x}"
    assert [header.split("-")[:3] for header in told] == [
        ["00", trace_id, f"{span_id(span):016x}"] for span in attempts
    ]


async def test_the_span_of_a_call_is_a_child_of_the_callers(traced: Traced) -> None:
    traced.answers = [success(), success()]
    with traced.tracer.start_as_current_span("of the caller"):
        await traced.client.users.get(USER_ID)
        await traced.client.users.update(USER_ID, name="J")
    _, get, _, update, callers = traced.spans
    for span in (get, update):
        assert span.parent is not None
        assert span.parent.span_id == span_id(callers)


async def test_a_copy_makes_no_span(traced: Traced) -> None:
    traced.answers = [success()]
    await traced.client.users.get(USER_ID)
    spans = len(traced.spans)
    await traced.client.users.get(USER_ID)
    assert len(traced.spans) == spans == 2


async def test_a_304_is_no_error(traced: Traced) -> None:
    etag = {"ETag": '"0e.0f.3"'}
    ok = httpx.Response(200, content=envelope(USER), headers=etag)
    traced.answers = [ok, httpx.Response(304, headers=etag)]
    await traced.client.users.get(USER_ID)
    traced.clock.advance(400)
    await traced.client.users.get(USER_ID)
    assert traced.sent[1].headers["If-None-Match"] == etag["ETag"]
    assert {span.status.status_code for span in traced.spans} == {StatusCode.UNSET}


async def test_spans_of_a_cancelled_call_end() -> None:
    traced = Traced()
    asked = asyncio.Event()

    async def never(_: httpx.Request) -> httpx.Response:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(traced.exporter))
    async with UserServiceClient(
        "http://h", tracing=OpenTelemetryTracing(provider), transport=httpx.MockTransport(never)
    ) as client:
        call = asyncio.create_task(client.users.delete(USER_ID))
        await asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert [span.name for span in traced.spans] == [
        "user_service users.delete attempt",
        "user_service users.delete",
    ]


FAILURES: dict[str, Callable[[], httpx.Response | Exception]] = {
    "refused": lambda: httpx.Response(
        422, content=b'{"success":false,"message":"john@example.com"}'
    ),
    "unreadable": lambda: httpx.Response(200, content=b'{"data":"john@example.com"}'),
    "cut-off": lambda: httpx.ReadError("reset"),
    "not-sent": lambda: httpx.ConnectError("refused"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_no_span_holds_personal_data(
    traced: Traced, failure: Callable[[], httpx.Response | Exception]
) -> None:
    calls = (
        traced.client.users.create(name=NAME, email=EMAIL, password=PASSWORD, phone=PHONE),
        traced.client.users.lookup(email=EMAIL),
        traced.client.devices.register(USER_ID, token=TOKEN, platform="ios"),
    )
    for call in calls:
        traced.answers = [failure() for _ in range(3)]
        with pytest.raises(UserServiceError):
            await call
    assert len(traced.spans) >= 6
    printed = "".join(span.to_json() for span in traced.spans)
    assert not [one for one in (NAME, EMAIL, PHONE, PASSWORD, TOKEN, KEY) if one in printed]
