"""Which error a call raises, what it carries, and what it must not print."""

from __future__ import annotations

import copy
import pickle
import traceback
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
import user_service_client
from user_service_client import (
    ApiError,
    BadRequest,
    Conflict,
    DeadlineExceeded,
    DecodeError,
    Forbidden,
    Invalid,
    MaybeProcessed,
    NotFound,
    NotSent,
    RateLimited,
    ServerError,
    Unauthenticated,
    UserServiceClient,
    UserServiceError,
    VersionMismatch,
)
from user_service_client.testing import FakeUserService

from tests.client.conftest import ETAG, USER, USER_ID, Service, envelope

CLASSES = {
    304: ApiError,
    400: BadRequest,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    405: ApiError,
    409: Conflict,
    412: VersionMismatch,
    413: ApiError,
    415: ApiError,
    422: Invalid,
    429: RateLimited,
    500: ServerError,
    503: ServerError,
}


@pytest.mark.parametrize(("status", "error_class"), CLASSES.items(), ids=map(str, CLASSES))
async def test_each_status_has_its_class(
    scripted: UserServiceClient, service: Service, status: int, error_class: type[ApiError]
) -> None:
    service.refuses(status, "some_code", headers={"Retry-After": "7", "ETag": ETAG})
    with pytest.raises(ApiError) as caught:
        await scripted.users.get(USER_ID)
    error = caught.value
    assert type(error) is error_class
    assert (error.status, error.code, error.request_id) == (status, "some_code", "req-1")
    assert (error.retry_after, error.etag) == (7.0, ETAG)
    assert 0 < error.elapsed < 2


async def test_every_bad_field_is_named_but_not_quoted(
    scripted: UserServiceClient, service: Service
) -> None:
    details = [
        {"field": "email", "message": "john@example.com is no address"},
        {"field": "categories.john@example.com", "message": "bad"},
    ]
    service.refuses(422, "validation_failed", details=details)
    with pytest.raises(Invalid) as caught:
        await scripted.users.create(name="", email="john@example.com", password="geheim-geheim")
    assert [detail.field for detail in caught.value.details] == [d["field"] for d in details]
    assert str(caught.value) == "users.create: 422 validation_failed: email (request id req-1)"


@pytest.mark.parametrize("body", [b"<html>john@example.com</html>", b"", b"\xff", b"[1]"])
async def test_an_answer_of_a_proxy_is_known_by_its_status(
    scripted: UserServiceClient, service: Service, body: bytes
) -> None:
    service.replies(502, body, {"X-Request-ID": "edge-1"})
    with pytest.raises(ServerError) as caught:
        await scripted.users.get(USER_ID)
    assert (caught.value.code, caught.value.request_id) == (None, "edge-1")
    assert str(caught.value) == "users.get: 502 (request id edge-1)"


async def test_what_a_proxy_writes_into_code_and_id_is_not_printed(
    scripted: UserServiceClient, service: Service
) -> None:
    headers = {"X-Request-ID": "mine"}
    service.refuses(400, "user john@example.com unknown")
    with pytest.raises(BadRequest) as caught:
        await scripted.users.get(USER_ID, headers=headers)
    assert (caught.value.code, "john" in str(caught.value)) == (None, False)
    service.replies(500, b"", {"X-Request-ID": "john@example.com"})
    with pytest.raises(ServerError) as failed:
        await scripted.users.get(USER_ID, headers=headers)
    assert failed.value.request_id == "mine"


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"",
        envelope(None),
        envelope({**USER, "version": "john@example.com"}),
        b'{"success":true,"data":{"name":"\xff"}}',
        b'{"success":true,"x":' + b"[" * 100_000,
    ],
    ids=["html", "empty", "null", "wrong-type", "not-utf8", "deep"],
)
async def test_a_success_that_cannot_be_read_is_a_decode_error(
    scripted: UserServiceClient, service: Service, body: bytes
) -> None:
    service.replies(200, body)
    with pytest.raises(DecodeError) as caught:
        await scripted.users.get(USER_ID)
    assert (caught.value.status, caught.value.code) == (200, None)
    assert "john" not in f"{caught.value} {caught.value!r}"


def retry_at(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("0", 0, 0), (retry_at(3600), 3000, 3600), (retry_at(-60), 0, 0)],
    ids=["seconds", "date", "past"],
)
async def test_retry_after_is_seconds(
    scripted: UserServiceClient, service: Service, value: str, low: float, high: float
) -> None:
    service.refuses(429, "rate_limited", headers={"Retry-After": value})
    with pytest.raises(RateLimited) as caught:
        await scripted.users.get(USER_ID)
    assert caught.value.retry_after is not None
    assert low <= caught.value.retry_after <= high


async def test_a_date_to_retry_after_is_one_of_the_clients_clock(fake: FakeUserService) -> None:
    """As all waiting: else a test of what a date does would wait until that year."""
    at = fake.clock.now() + timedelta(seconds=90)
    fake.fail(status=429, times=None, retry_after=at)
    async with UserServiceClient("http://h", transport=fake, clock=fake.clock) as client:
        with pytest.raises(RateLimited) as caught:
            await client.users.get(USER_ID)
        assert caught.value.retry_after == 90
        await fake.clock.advance(30)
        with pytest.raises(RateLimited) as caught:
            await client.users.get(USER_ID)
        assert caught.value.retry_after == 60
        with pytest.raises(ApiError) as refused:
            await client.health()
        assert refused.value.retry_after == 60


@pytest.mark.parametrize("value", ["", "soon", "-1", "nan", "1.5"])
async def test_retry_after_that_says_nothing_is_none(
    scripted: UserServiceClient, service: Service, value: str
) -> None:
    service.refuses(503, "overloaded", headers={"Retry-After": value})
    with pytest.raises(ServerError) as caught:
        await scripted.users.get(USER_ID)
    assert caught.value.retry_after is None


def subclasses(cls: type[Exception]) -> Iterator[type[Exception]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from subclasses(sub)


NEVER_SENT = {
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
}
LOWER = [cls for cls in subclasses(httpx.HTTPError) if cls.__module__.startswith("httpx")]
LOWER += [OSError, TimeoutError, ConnectionResetError]


@pytest.mark.parametrize("lower", LOWER, ids=lambda cls: cls.__name__)
async def test_every_exception_of_a_transport_is_mapped(lower: type[Exception]) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        if issubclass(lower, httpx.HTTPStatusError):
            raise lower("secret-text", request=request, response=httpx.Response(500))
        raise lower("secret-text")

    transport = httpx.MockTransport(fail)
    async with UserServiceClient("http://h", transport=transport) as client:
        with pytest.raises(UserServiceError) as caught:
            await client.users.get(USER_ID, headers={"X-Request-ID": "mine"})
    expected: type[UserServiceError] = MaybeProcessed
    if lower is httpx.DecodingError:
        expected = DecodeError
    elif lower in NEVER_SENT:
        expected = NotSent
    assert type(caught.value) is expected
    assert str(caught.value) == f"users.get: {lower.__name__} (request id mine)"
    assert caught.value.elapsed > 0


async def test_an_answer_that_breaks_off_may_have_been_processed() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b'{"success"'
        raise httpx.ReadError("gone")

    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=broken()))
    async with UserServiceClient("http://h", transport=transport) as client:
        with pytest.raises(MaybeProcessed):
            await client.users.delete(USER_ID)


async def test_a_broken_content_coding_is_a_decode_error() -> None:
    async def no_gzip() -> AsyncIterator[bytes]:
        yield b"this is no gzip"

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Encoding": "gzip"}, content=no_gzip())

    async with UserServiceClient("http://h", transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(DecodeError):
            await client.users.get(USER_ID)


ERRORS = [
    cls
    for cls in vars(user_service_client).values()
    if isinstance(cls, type) and issubclass(cls, UserServiceError)
]


@pytest.mark.parametrize("error_class", ERRORS, ids=lambda cls: cls.__name__)
def test_errors_can_be_pickled(error_class: type[UserServiceError]) -> None:
    error = error_class("users.get: failed", request_id="r", elapsed=0.5)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301
        assert type(twin) is error_class
        assert (str(twin), vars(twin)) == (str(error), vars(error))


async def test_an_error_with_all_it_carries_survives_a_task_queue(
    scripted: UserServiceClient, service: Service
) -> None:
    details = [{"field": "name", "message": "Too long."}]
    service.refuses(412, "version_mismatch", details=details, headers={"ETag": ETAG})
    with pytest.raises(VersionMismatch) as caught:
        await scripted.users.update(USER_ID, name="x", if_version='"e.f.2"')
    twin = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert vars(twin) == vars(caught.value)
    assert twin.etag == ETAG


SECRETS = ("john@example.com", "geheim-geheim", "usk_key", "fcm_token", "No:")


@pytest.mark.parametrize("status", [200, 401, 422, 500])
async def test_no_error_prints_what_was_sent_or_answered(service: Service, status: int) -> None:
    transport = httpx.MockTransport(service.handle)
    async with UserServiceClient(
        "http://h", api_key="usk_key", transport=transport, retries=0
    ) as client:
        details = [{"field": "token", "message": "fcm_token"}]
        service.refuses(status, "code", details=details)
        with pytest.raises(UserServiceError) as registering:
            await client.users.create(name="J", email="john@example.com", password="geheim-geheim")
        service.refuses(status, "code", details=details)
        with pytest.raises(UserServiceError) as device:
            await client.devices.register("john@example.com", token="fcm_token", platform="ios")
    for error in (registering.value, device.value):
        printed = f"{error} {error!r} {traceback.format_exception_only(error)}"
        assert not [secret for secret in SECRETS if secret in printed]


def test_the_tree_is_the_one_that_the_module_shows() -> None:
    shown = user_service_client.errors.__doc__ or ""
    assert {cls.__name__ for cls in ERRORS} == {
        cls.__name__ for cls in subclasses(UserServiceError)
    }
    assert all(f" {cls.__name__}" in shown for cls in ERRORS)
    assert issubclass(DeadlineExceeded, UserServiceError)
    assert not issubclass(DeadlineExceeded, ApiError)
