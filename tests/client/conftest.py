"""Clients: of a service whose answers are scripted, and of the fake service."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest
from user_service_client import UserServiceClient
from user_service_client.testing import FakeUserService

from .network import Network, client_of

USER_ID = "01a205c7-a743-7a16-a135-c839ba84936e"
ETAG = '"e.f.3"'
USER: dict[str, object] = {
    "id": USER_ID,
    "external_id": None,
    "name": "John Doe",
    "email": "john@example.com",
    "phone": None,
    "locale": None,
    "email_deliverable": True,
    "preferences": {
        "email": True,
        "push": False,
        "quiet_hours_start": "22:00",
        "quiet_hours_end": "07:00",
        "timezone": None,
        "effective_timezone": "UTC",
        "muted_until": None,
        "categories": {"marketing": {"email": False, "push": True}},
    },
    "devices": [],
    "version": 3,
    "rules": 1,
    "created_at": "2026-01-01T00:00:00Z",
    "updated_at": "2026-01-02T00:00:00Z",
}


def envelope(data: object) -> bytes:
    """Return the body of a success."""
    return msgspec.json.encode({"success": True, "data": data, "message": "Done", "error": None})


class Service:
    """Answers as scripted, one answer a request, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self._answers: list[httpx.Response] = []

    def answers(self, data: object = None, *, status: int = 200, etag: str = ETAG) -> None:
        """Answer the next request with this success."""
        self.replies(status, envelope(data), {"ETag": etag})

    def replies(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Answer the next request with these bytes."""
        self._answers.append(httpx.Response(status, content=body, headers=headers))

    def refuses(
        self,
        status: int,
        code: str,
        *,
        details: list[dict[str, str]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer the next request with this error."""
        error = {"code": code, "details": details or [], "request_id": "req-1"}
        body = {"success": False, "data": None, "message": "No: john@example.com", "error": error}
        self.replies(status, msgspec.json.encode(body), headers)

    def handle(self, request: httpx.Request) -> httpx.Response:
        """Take a request, as httpx.MockTransport hands it over."""
        self.requests.append(request)
        return self._answers.pop(0)

    @property
    def sent(self) -> httpx.Request:
        """The last request."""
        return self.requests[-1]

    @property
    def sent_body(self) -> object:
        """The body of the last request, decoded."""
        return msgspec.json.decode(self.sent.content)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def scripted(service: Service) -> AsyncIterator[UserServiceClient]:
    """A client of `service` that makes one attempt, so that one scripted answer is what it gets."""
    transport = httpx.MockTransport(service.handle)
    async with UserServiceClient("http://users.test", transport=transport, retries=0) as made:
        yield made


@pytest.fixture
def fake() -> FakeUserService:
    return FakeUserService()


@pytest.fixture
def network(fake: FakeUserService) -> Network:
    return Network(fake)


@pytest.fixture
async def client(network: Network) -> AsyncIterator[UserServiceClient]:
    """A client of `fake`, on its clock."""
    async with client_of(network) as made:
        yield made


@pytest.fixture
async def live(network: Network) -> AsyncIterator[UserServiceClient]:
    """A client of `fake`, on its clock, that follows the stream and is covered by it."""
    async with client_of(network, live=True) as made:
        yield made
