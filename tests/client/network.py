"""Owns the network between a client and the fake service: answers that are late, and of the past.

The fake has one state. Here an answer can be held back while that state changes, and a user can be
answered from a copy, as by a second server that lags behind.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import httpx
import msgspec
from user_service_client import User, UserServiceClient
from user_service_client.testing import FakeUserService
from user_service_client.testing._routes import find_route, plain

NOBODY = "01a205c7-a743-7a16-a135-c839ba84936e"
"""An id that no user of a fake has."""
SOON = 5.0
"""Real seconds for what takes a few turns of the event loop."""


class Held:
    """Answers that are there, and do not arrive before `release`."""

    def __init__(self, operation: str, times: int) -> None:
        self.operation = operation
        self.left = times
        self.held = 0
        self._arrived = asyncio.Event()
        self._released = asyncio.Event()

    async def arrived(self) -> None:
        """Wait until the service has answered the first."""
        async with asyncio.timeout(SOON):
            await self._arrived.wait()

    def release(self) -> None:
        """Let them arrive."""
        self._released.set()

    async def pass_through(self) -> None:
        """Wait, as an answer."""
        self.held += 1
        self._arrived.set()
        await self._released.wait()


class Network(httpx.AsyncBaseTransport):
    """Takes requests to the fake, and its answers back."""

    def __init__(self, fake: FakeUserService) -> None:
        self.fake = fake
        self._held: list[Held] = []
        self._past: dict[str, tuple[User, str]] = {}
        self.before: Callable[[httpx.Request], None] | None = None
        """Called with each request that is about to be answered."""
        self.at_once = 0
        self.most_at_once = 0

    @property
    def requests(self) -> Counter[str]:
        """How often each of the client's methods has asked; the stream is left out."""
        operations = [asked.operation for asked in self.fake.requests]
        return Counter(name for name in operations if name and name != "changes.stream")

    def sent(self, header: str) -> list[str | None]:
        """Return a header of every request but the stream's, in their order."""
        return [
            asked.headers.get(header)
            for asked in self.fake.requests
            if asked.operation != "changes.stream"
        ]

    def hold(self, operation: str, times: int = 1) -> Held:
        """Hold the next answers to a method back."""
        held = Held(operation, times)
        self._held.append(held)
        return held

    def lag(self, *users: User) -> None:
        """Answer for these users from a copy of now, unless a newer one is asked for."""
        for user in users:
            current = self.fake.document(user.id)
            self._past[user.id] = (current, self.fake._directory.etag(current.version))

    def catch_up(self) -> None:
        """Answer as the fake does."""
        self._past.clear()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        match = find_route(request.method, plain(request.url.path))
        operation = match and match.operation
        if self.before is not None and operation != "changes.stream":
            self.before(request)
        self.at_once += operation != "changes.stream"
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            response = await self.fake.handle_async_request(request)
            if operation == "users.get":
                response = self._of_the_past(request, response)
            elif operation == "users.get_many":
                response = await self._batch_of_the_past(response)
            for held in self._held:
                if held.operation == operation and held.left:
                    held.left -= 1
                    await held.pass_through()
                    break
        finally:
            self.at_once -= operation != "changes.stream"
        return response

    def _of_the_past(self, request: httpx.Request, response: httpx.Response) -> httpx.Response:
        user, etag = self._past.get(request.url.path.rpartition("/")[2], (None, ""))
        if user is None or int(request.headers.get("X-Min-Version", "0")) > user.version:
            return response
        if request.headers.get("If-None-Match") == etag:
            return httpx.Response(304, headers={"ETag": etag})
        return httpx.Response(200, headers={"ETag": etag}, content=_envelope(user))

    async def _batch_of_the_past(self, response: httpx.Response) -> httpx.Response:
        if not self._past or response.status_code != 200:
            return response
        batch = msgspec.json.decode(await response.aread())["data"]
        users = [
            msgspec.to_builtins(self._past[user["id"]][0]) if user["id"] in self._past else user
            for user in batch["users"]
        ]
        data = {"users": users, "missing": batch["missing"]}
        tag = response.headers["X-Document-Tag"]
        return httpx.Response(200, headers={"X-Document-Tag": tag}, content=_envelope(data))

    async def aclose(self) -> None:
        await self.fake.aclose()


def _envelope(data: object) -> bytes:
    return msgspec.json.encode({"success": True, "data": data, "message": "Done", "error": None})


@asynccontextmanager
async def client_of(
    network: Network, *, live: bool = False, **others: object
) -> AsyncIterator[UserServiceClient]:
    """Open a client that has all the (real) time in the world; a live one is live."""
    made = UserServiceClient(
        "http://users.test",
        transport=network,
        clock=network.fake.clock,
        timeout=60,
        attempt_timeout=30,
        live=live,
        **others,  # type: ignore[arg-type]  # whatever the test says
    )
    async with made as client:
        if live:
            await network.fake.clock.advance(0)
            assert client.status.is_complete
            # What is read from now on is covered by the stream.
            await network.fake.clock.advance(2)
        yield client


def ids_of(users: Iterable[User]) -> list[str]:
    return [user.id for user in users]
