"""The schema's history, and how a database is brought to its newest state.

A migration is reversible, takes no long lock, and leaves a schema on which the previous release
still works.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text

from ...settings import Settings, SettingsError
from ..database import connected

_LOCK = 0x75736D67  # "usmg": one migration at a time
_LOCK_TIMEOUT = "30s"


def upgrade(settings: Settings, revision: str = "head") -> None:
    """Bring the settings' database to `revision`, one process at a time.

    Raises:
        SettingsError: the way to Postgres leads through PgBouncer.
        DependencyUnavailable: Postgres cannot be reached.
        Overloaded: another migration, or a lock on a table, held it up for more than 30 s.
    """
    asyncio.run(run(settings, lambda config: command.upgrade(config, revision)))


def downgrade(settings: Settings, revision: str) -> None:
    """Take the settings' database back to `revision`."""
    asyncio.run(run(settings, lambda config: command.downgrade(config, revision)))


async def run(settings: Settings, action: Callable[[Config], None]) -> None:
    """Run an Alembic command on the settings' database under the lock of migrations."""
    if settings.pgbouncer:
        # The lock is a session's: through PgBouncer it would be taken in one and stay there.
        raise SettingsError(
            "PGBOUNCER=on is wrong here: tables are migrated past PgBouncer, with PGBOUNCER=off"
            " and the DATABASE_URL of PostgreSQL itself"
        )

    def locked(connection: Connection) -> None:
        connection.execute(text(f"SET lock_timeout = '{_LOCK_TIMEOUT}'"))
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("SET idle_in_transaction_session_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": _LOCK})
        connection.commit()
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent))
        config.attributes["connection"] = connection
        action(config)
        connection.commit()

    # An index takes as long as it takes.
    async with connected(settings, command_timeout=None) as connection:
        await connection.run_sync(locked)
