"""The searches of `tests/server/test_fuzz*.py` for `CHAOS_SECONDS` each, never twice the same."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator

import httpx
import pytest
import structlog
from litestar import Litestar
from user_service_server.settings import Settings

from ..server.garbling import search, search_async
from ..server.test_fuzz import Bodies
from ..server.test_fuzz_http import Conditions, Listings, Routes, settings

SECONDS = float(os.environ.get("CHAOS_SECONDS", "60"))

__all__ = ["settings"]  # a fixture


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Log nothing of a million requests."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


def seeds() -> Iterator[int]:
    until, tried = time.monotonic() + SECONDS, 0
    while time.monotonic() < until:
        yield random.getrandbits(64)  # told with what it finds: `check(seed)` finds it again
        tried += 1
    print(f"\n{tried} tried")  # noqa: T201


def test_garbled_bodies_are_read_or_refused(settings: Settings) -> None:
    """By the reader alone, which is what takes the event loop's time."""
    search(Bodies(settings).check, seeds())


async def test_garbled_bodies_crash_no_route(app: Litestar, http: httpx.AsyncClient) -> None:
    """By the routes, down to the database; each time to somebody new."""
    routes = Routes(app, http)
    await search_async(routes.check, seeds())
    print(dict(sorted(routes.answered.items())))  # noqa: T201


async def test_garbled_cursors_show_nothing_else(app: Litestar, http: httpx.AsyncClient) -> None:
    """In pages of each listing, and at the beginning of a stream."""
    listings = Listings(app, http)
    await listings.prepare()

    async def check(seed: int) -> None:
        await listings.check(seed)
        await listings.check_stream(seed)

    await search_async(check, seeds())


async def test_garbled_headers_are_never_met(http: httpx.AsyncClient) -> None:
    """Conditions, versions, keys of repeatable writes, media types and request ids."""
    conditions = Conditions(http)
    await conditions.prepare()
    await search_async(conditions.check, seeds())
