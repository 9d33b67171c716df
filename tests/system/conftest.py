"""Engines that belong to one test, and how long the troubles of these tests last."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from user_service_server.embedded import EmbeddedPostgres, EmbeddedValkey

from ..engines import SMALL, Engines, copy_of, open_dir, prepare


@pytest.fixture(scope="session")
def chaos_seconds() -> float:
    """How long each trouble lasts: CHAOS_SECONDS, or the shortest that shows something."""
    return float(os.environ.get("CHAOS_SECONDS", "1.5"))


@pytest.fixture(scope="session")
def migrated() -> Iterator[Path]:
    """The directory of a PostgreSQL with the template, which has ended: made once, then copied."""
    with open_dir() as directory:
        yield prepare(directory / "postgres")


@pytest.fixture
def own_engines(migrated: Path) -> Iterator[Engines]:
    """Engines for one test, with fsync on: what is acknowledged is to survive everything."""
    with open_dir() as directory:
        postgres = EmbeddedPostgres(copy_of(migrated, directory), options=SMALL)
        valkey = EmbeddedValkey(directory / "valkey")
        try:
            postgres.start()
            valkey.start()
            yield Engines(postgres, valkey)
        finally:
            # Nobody reads what they would save if they were to end in order.
            postgres.kill()
            valkey.kill()
