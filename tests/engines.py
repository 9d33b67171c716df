"""Owns the engines of the tests: a fresh PostgreSQL and Valkey for each xdist worker.

Each worker has its own, which takes half a second: nothing is shared, so nothing is agreed upon,
and a test may stop, kill or pause an engine without meeting another test.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from user_service_server.embedded import EmbeddedPostgres, EmbeddedValkey
from user_service_server.settings import Settings, load_settings
from user_service_server.storage.migrations import upgrade

from .private import PRIVATE
from .programs import PgBouncer, pgbouncer

TEMPLATE = "template"
"""The database that is migrated once, and that every other is a copy of."""

POOLED = os.environ.get("PGBOUNCER", "off")
"""Whether all tests reach their databases through PgBouncer: see tests/chaos/test_pgbouncer.py."""

SMALL = {"shared_buffers": "16MB", "max_wal_senders": "0", "wal_level": "minimal"}
"""PostgreSQL settings for a server that lives as long as some tests."""


@contextmanager
def open_dir() -> Iterator[Path]:
    """Yield a new directory through which PostgreSQL's system user may pass; pytest's are 0700."""
    # Not below TMPDIR: on macOS its path leaves no room for the name of a socket.
    directory = Path(tempfile.mkdtemp(prefix="us-", dir="/tmp"))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        for log in directory.glob("*/log"):
            PRIVATE.search(log)
        shutil.rmtree(directory)


def make_template(postgres: EmbeddedPostgres) -> None:
    """Make the database that all others of this PostgreSQL are copies of."""
    template = postgres.create_database(TEMPLATE)
    upgrade(settings_for(template, "redis://nobody-asks-it", PGBOUNCER="off"))


def prepare(data_dir: Path) -> Path:
    """Make a PostgreSQL with its template, let it end, and return its directory.

    Without fsync, which takes a second: whoever starts it next, with fsync, loses nothing.
    """
    with EmbeddedPostgres(data_dir, fsync=False, options=SMALL) as postgres:
        make_template(postgres)
    return data_dir


class Engines:
    """A running PostgreSQL with its template, and a running Valkey.

    Databases are reached through the `pooler`, if there is one.
    """

    def __init__(
        self, postgres: EmbeddedPostgres, valkey: EmbeddedValkey, pooler: PgBouncer | None = None
    ) -> None:
        self.postgres = postgres
        self.valkey = valkey
        self._pooler = pooler

    def create_database(self, name: str) -> str:
        """Create a database as it is after `migrate`, and return its URL."""
        name = re.sub(r"\W+", "_", name)[-60:].lower()
        url = self.postgres.create_database(name, template=TEMPLATE)
        return url if self._pooler is None else self._pooler.url(name)


@contextmanager
def engines() -> Iterator[Engines]:
    """Start the engines, and end them with all that they wrote."""
    with ExitStack() as stack:
        directory = stack.enter_context(open_dir())
        postgres = EmbeddedPostgres(directory / "postgres", fsync=False, options=SMALL)
        valkey = EmbeddedValkey(directory / "valkey")
        stack.enter_context(postgres)
        stack.enter_context(valkey)
        pooler = None
        if POOLED == "on":
            pooler = stack.enter_context(pgbouncer(postgres, directory))
        make_template(postgres)
        yield Engines(postgres, valkey, pooler)


def copy_of(postgres: Path, directory: Path) -> Path:
    """Copy the directory of a PostgreSQL that has ended into another; returns where it is."""
    # Its files stay those of PostgreSQL's system user, which shutil would not see to.
    subprocess.run(["cp", "-a", str(postgres), str(directory)], check=True)  # noqa: S607
    return directory / postgres.name


def settings_for(database_url: str, redis_url: str, **others: str) -> Settings:
    """The settings of a server on these engines; `others` by the names of their variables."""
    # A busy machine is late; what a late Redis does is tested by those that make it late.
    patience = {"REDIS_TIMEOUT_MS": "5000"}
    environ = {"AUTH": "off", "DATABASE_URL": database_url, "REDIS_URL": redis_url, **patience}
    return load_settings({**environ, "PGBOUNCER": POOLED, **others}, None)
