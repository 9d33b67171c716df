"""Test what uses the client without a server: a service in memory, as a transport.

    fake = FakeUserService()
    ada = fake.user(name="Ada", push=False, devices=[("apns_token", "ios")])
    async with UserServiceClient("http://users", transport=fake, clock=fake.clock) as client:
        assert await client.users.get(ada.id) == ada
        fake.update_preferences(ada.id, push=True)        # as if another process did it
        fake.fail(status=503, times=2, route="users.get")  # the client's retries are its own

With pytest, the fixture `fake_user_service` is there without an import; it fails a test that
scripted a fault which did not happen.
"""

from __future__ import annotations

from ._clock import VirtualClock
from ._fake import AskedRequest, Categories, DeviceOf, FakeUserService
from ._faults import Route

__all__ = ["AskedRequest", "Categories", "DeviceOf", "FakeUserService", "Route", "VirtualClock"]
