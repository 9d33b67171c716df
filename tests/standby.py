"""Owns a PostgreSQL that follows another one: a streaming replica, which can be promoted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from user_service_server.embedded import EmbeddedPostgres

from .engines import prepare

_REPLICATED = {"shared_buffers": "16MB", "wal_level": "replica", "max_wal_senders": "4"}
_NAME = "standby"


class Standby(EmbeddedPostgres):
    """A replica of `primary`, copied from it when it first starts."""

    def __init__(self, data_dir: Path, primary: EmbeddedPostgres) -> None:
        super().__init__(data_dir, options=_REPLICATED)
        self._primary = primary

    def _initialize(self) -> None:
        unfinished = self.data_dir / "cluster.unfinished"
        source = f"host={self._primary.socket_dir} user=postgres application_name={_NAME}"
        arguments = ["--dbname", source, "--pgdata", str(unfinished), "--write-recovery-conf"]
        done = self.run("pg_basebackup", *arguments, "--checkpoint=fast", "--no-sync")
        assert done.returncode == 0, done.stderr
        unfinished.rename(self._working_dir)

    def _is_ready(self) -> bool:
        try:
            lines = (self._working_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[7].strip() in ("standby", "ready")

    def promote(self) -> None:
        """Make it a primary; returns when it is one."""
        assert ask(self, "SELECT pg_promote()") == "t"

    def cut_off(self) -> None:
        """Let nothing more of the primary come."""
        ask(self, "ALTER SYSTEM SET primary_conninfo = ''")
        ask(self, "SELECT pg_reload_conf()")

    def pause_replay(self) -> None:
        """Let it fall behind: what comes of the primary is kept, and not shown."""
        ask(self, "SELECT pg_wal_replay_pause()")

    def resume_replay(self) -> None:
        """Let it catch up."""
        ask(self, "SELECT pg_wal_replay_resume()")


class Pair(NamedTuple):
    """A primary and its replica."""

    primary: EmbeddedPostgres
    standby: Standby

    def url(self, database: str) -> str:
        """The URL of a database on whichever of the two takes writes."""
        hosts = f"{self.primary.socket_dir},{self.standby.socket_dir}"
        return (
            f"postgresql+asyncpg://postgres@/{database}?host={hosts}&port=5432,5432"
            "&target_session_attrs=read-write"
        )

    def replicate_synchronously(self) -> None:
        """From here on a commit is acknowledged when the replica has it, too.

        Not before the replica was copied: promoted, it would wait for a replica of its own.
        """
        ask(self.primary, f"ALTER SYSTEM SET synchronous_standby_names = '{_NAME}'")
        ask(self.primary, "SELECT pg_reload_conf()")


@contextmanager
def replicated(directory: Path) -> Iterator[Pair]:
    """Start a primary with the template, and a replica that follows it."""
    primary = EmbeddedPostgres(prepare(directory / "primary"), options=_REPLICATED)
    standby = Standby(directory / "standby", primary)
    try:
        primary.start()
        standby.start()
        yield Pair(primary, standby)
    finally:
        # Nobody reads what they would save if they were to end in order.
        standby.kill()
        primary.kill()


def ask(postgres: EmbeddedPostgres, statement: str, database: str = "postgres") -> str:
    """Run a statement and return what it says."""
    done = postgres.run("psql", "-h", str(postgres.socket_dir), "-d", database, "-qtAc", statement)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
