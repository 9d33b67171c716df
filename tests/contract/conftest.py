"""The two services that the contract suite asks: the fake, and a real server on real engines."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from user_service_client import UserServiceClient
from user_service_client.testing import FakeUserService

from ..servers import Server

PATIENCE = 20.0
"""Seconds for an answer: the machine may be busy, and how fast one is is not tested here."""


@pytest.fixture(scope="module", autouse=True)
def _cheap_passwords(cheap_passwords: None) -> None:
    """Of both services, the contract is asked for and not the time."""


@pytest.fixture(scope="module", params=["fake", "server"])
def transport(request: pytest.FixtureRequest) -> httpx.AsyncBaseTransport:
    """What takes the requests of a test: it cannot know which of the two it is."""
    if request.param == "fake":
        return FakeUserService()
    return httpx.ASGITransport(request.getfixturevalue("app"))


@pytest.fixture
async def raw(transport: httpx.AsyncBaseTransport) -> AsyncIterator[httpx.AsyncClient]:
    """Requests as httpx makes them."""
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", timeout=PATIENCE
    ) as client:
        yield client


@pytest.fixture
async def client(transport: httpx.AsyncBaseTransport) -> AsyncIterator[UserServiceClient]:
    """The typed client."""
    async with UserServiceClient(
        "http://test", transport=transport, timeout=PATIENCE, attempt_timeout=PATIENCE
    ) as made:
        yield made


@pytest.fixture(params=["fake", "server"])
def streaming(request: pytest.FixtureRequest) -> FakeUserService | Server:
    """What can stream: the fake, or a server behind a socket."""
    if request.param == "fake":
        return FakeUserService()
    server: Server = request.getfixturevalue("server")
    return server


@pytest.fixture
async def socket(streaming: FakeUserService | Server) -> AsyncIterator[httpx.AsyncClient]:
    """Requests as httpx makes them, to what can stream."""
    fake = streaming if isinstance(streaming, FakeUserService) else None
    url = "http://test" if isinstance(streaming, FakeUserService) else streaming.url
    async with httpx.AsyncClient(transport=fake, base_url=url, timeout=PATIENCE) as made:
        yield made


@pytest.fixture
async def streamed(streaming: FakeUserService | Server) -> AsyncIterator[UserServiceClient]:
    """The typed client of what can stream, which follows it."""
    fake = streaming if isinstance(streaming, FakeUserService) else None
    url = "http://test" if isinstance(streaming, FakeUserService) else streaming.url
    async with UserServiceClient(
        url, transport=fake, live=True, timeout=PATIENCE, attempt_timeout=PATIENCE
    ) as made:
        yield made
