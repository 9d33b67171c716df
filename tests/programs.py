"""Owns the programs of others that stand around servers in production, as Debian has them."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from user_service_server.embedded import EmbeddedPostgres

from .servers import free_port

ANSWERS_WITHIN = 10.0
SESSIONS = 8
"""Sessions of Postgres for each database: fewer than two servers want, so that they share them."""


def installed(name: str) -> str:
    """Return where a program is."""
    # Debian keeps daemons where only root's PATH leads.
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    assert found is not None, f"{name} is missing: apt-get install {name}"
    return found


@contextmanager
def running(
    name: str, *arguments: str, port: int, log: Path, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program while the block runs; it is there when it listens on `port`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [installed(name), *arguments],
            stdout=output,
            stderr=output,
            env={**os.environ, **(environ or {})},
        )
    try:
        deadline = time.monotonic() + ANSWERS_WITHIN
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


class PgBouncer:
    """A PgBouncer in transaction mode before a PostgreSQL."""

    def __init__(self, port: int) -> None:
        self._port = port

    def url(self, database: str) -> str:
        """The URL of a database through it."""
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self._port}/{database}"


@contextmanager
def pgbouncer(postgres: EmbeddedPostgres, directory: Path) -> Iterator[PgBouncer]:
    """Run a PgBouncer before a PostgreSQL that listens on its socket."""
    port = free_port()
    configuration = directory / "pgbouncer.ini"
    configuration.write_text(
        "[databases]\n"
        f"* = host={postgres.socket_dir} port=5432 user=postgres\n"
        "[pgbouncer]\n"
        "listen_addr = 127.0.0.1\n"
        f"listen_port = {port}\n"
        "unix_socket_dir =\n"
        "auth_type = any\n"
        "pool_mode = transaction\n"
        f"default_pool_size = {SESSIONS}\n"
        "max_client_conn = 1000\n"
    )
    # The socket is there for whom PostgreSQL runs as, and PgBouncer does not run as root.
    owner = pwd.getpwuid(postgres.data_dir.stat().st_uid).pw_name
    change_user = ["--user", owner] if os.geteuid() == 0 else []
    arguments = ["--quiet", *change_user, str(configuration)]
    with running("pgbouncer", *arguments, port=port, log=directory / "pgbouncer.log"):
        yield PgBouncer(port)
