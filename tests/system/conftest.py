"""Engines that belong to one test, and how long the troubles of these tests last."""

import os
from collections.abc import Iterator

import pytest
from user_service_server.embedded import EmbeddedPostgres, EmbeddedValkey

from ..engines import SMALL, Engines, open_dir


@pytest.fixture(scope="session")
def chaos_seconds() -> float:
    """How long each trouble lasts: CHAOS_SECONDS, or the shortest that shows something."""
    return float(os.environ.get("CHAOS_SECONDS", "1.5"))


@pytest.fixture
def own_engines() -> Iterator[Engines]:
    """Engines for one test, with fsync on: what is acknowledged is to survive everything."""
    with (
        open_dir() as directory,
        EmbeddedPostgres(directory / "postgres", options=SMALL) as postgres,
        EmbeddedValkey(directory / "valkey") as valkey,
    ):
        yield Engines(postgres, valkey)
