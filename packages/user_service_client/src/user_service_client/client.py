"""The client: one object a process, that holds the connections and offers the resources."""

from __future__ import annotations

from types import TracebackType
from typing import Self, Unpack

import httpx
from user_service_schemas import Health

from user_service_client._calls import ApiKey, Call, CallOptions, Calls
from user_service_client._devices import Devices
from user_service_client._health import read_health
from user_service_client._preferences import PreferencesOfUsers
from user_service_client._transport import Transport
from user_service_client._users import Users


class UserServiceClient:
    """A client of one User Service.

    Use it as an async context manager, or call `aclose` at the end. One client serves any number
    of concurrent calls, 100 at a time, in the event loop that it was first used in; the others
    wait, which counts against their deadlines.

    Args:
        base_url: Such as `http://user-service:3001`; a path in it is put before every path.
        api_key: A service key, or a function (async or not) that returns the current one.
        timeout: The total deadline of a call in seconds, with all that it waits for.
        transport: Sends the requests instead of the client's own connections, such as
            `httpx.ASGITransport` or `httpx.MockTransport(router.async_handler)` for respx. It is
            closed with the client.

    Attributes:
        users: Reading, registering, changing and deleting users.
        preferences: What users want to get, and the history of it.
        devices: Where a push can reach users.

    Raises:
        ValueError: `base_url` is no http URL, or `api_key` cannot be a header.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: ApiKey | None = None,
        timeout: float = 2.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._calls = Calls(
            base_url, api_key=api_key, timeout=timeout, transport=Transport(transport)
        )
        self.users = Users(self._calls)
        self.preferences = PreferencesOfUsers(self._calls)
        self.devices = Devices(self._calls)

    async def health(self, **options: Unpack[CallOptions]) -> Health:
        """Return how the service and its dependencies are; `unhealthy` is not raised.

        Raises:
            ServerError: a proxy answered, and not the service.
        """
        return read_health(await self._calls.send(Call("health", "GET", "/health", **options)))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._calls.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
