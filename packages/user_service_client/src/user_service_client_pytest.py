"""A pytest plugin: the fixture `fake_user_service`.

A module of its own beside the client, since pytest loads it in every project in which the client
is installed: a module inside would import all of the client, where no test may want it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from user_service_client.testing import FakeUserService


@pytest.fixture
def fake_user_service() -> Iterator[FakeUserService]:
    """A User Service in memory, empty: the transport of the clients of this test.

    The test fails if it scripted a fault that did not happen: it did not test what it was to.
    """
    from user_service_client.testing import FakeUserService  # noqa: PLC0415 - see above

    fake = FakeUserService()
    yield fake
    unused = fake.unused_faults()
    if unused:
        pytest.fail(f"Scripted, and did not happen: {'; '.join(unused)}", pytrace=False)
