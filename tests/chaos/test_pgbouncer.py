"""Servers through Debian's PgBouncer in transaction mode: right answers, and the same API."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text
from user_service_server.embedded import EmbeddedPostgres, EmbeddedValkey
from user_service_server.settings import Settings, SettingsError
from user_service_server.storage.database import create_engine
from user_service_server.storage.migrations import upgrade

from ..engines import SMALL, Engines, make_template, open_dir, settings_for
from ..programs import SESSIONS, pgbouncer
from ..servers import Server
from .history import lag, violations
from .load import Load
from .replicas import running
from .test_coherence import SECOND_BOUND, SECONDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", name="settings")
async def settings_through_pgbouncer() -> AsyncIterator[Settings]:
    with (
        open_dir() as directory,
        EmbeddedPostgres(directory / "postgres", fsync=False, options=SMALL) as postgres,
        EmbeddedValkey(directory / "valkey") as valkey,
        pgbouncer(postgres, directory) as pooler,
    ):
        await asyncio.to_thread(make_template, postgres)
        engines = Engines(postgres, valkey, pooler)
        yield settings_for(engines.create_database("pooled"), valkey.url, PGBOUNCER="on")


async def test_two_servers_that_share_sessions_answer_right(settings: Settings) -> None:
    """With the caches of statements, each gets the other's answers, and errors in between."""
    environ = {
        "DATABASE_URL": settings.database_url,
        "REDIS_URL": settings.redis_url,
        "PGBOUNCER": "on",
        "PASSWORD_REQUIRED": "off",
    }
    async with running(Server(environ), Server(environ)) as servers:
        async with Load([server.port for server in servers]) as load:
            await load.go_on(SECONDS)
        measured = lag(load.history)
        print(f"\n{len(load.history.reads)} reads, {measured}")  # noqa: T201 - the figures are asked for
        assert violations(load.history, SECOND_BOUND) == []
        assert not load.refused
        assert await load.at_rest() == []


async def test_each_transaction_has_its_time_outs_and_leaves_none_behind(
    settings: Settings,
) -> None:
    shown = text(
        "SELECT current_setting('statement_timeout'), current_setting('lock_timeout'),"
        " current_setting('idle_in_transaction_session_timeout'), current_setting('TimeZone')"
    )
    engine = create_engine(settings, SESSIONS)
    for _ in range(2 * SESSIONS):
        async with engine.begin() as connection:
            assert tuple((await connection.execute(shown)).one()) == ("5s", "3s", "5s", "UTC")
        async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            assert tuple((await connection.execute(shown)).one()) == ("0", "0", "0", "UTC")
    await engine.dispose()


async def test_tables_are_not_migrated_through_it(settings: Settings) -> None:
    """The lock of migrations is a session's, and nobody has one."""
    with pytest.raises(SettingsError, match="PGBOUNCER=on is wrong here"):
        await asyncio.to_thread(upgrade, settings)


async def test_the_api_is_the_same(tmp_path: Path) -> None:
    """The contract of the API, and what is behind it, of tests that reach Postgres through it."""
    server = ROOT / "tests" / "server"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += [str(ROOT / "tests" / "contract"), "-k", "not fake"]
    command += [str(server / f"test_{name}.py") for name in ("users", "devices", "preferences")]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env={**os.environ, "PGBOUNCER": "on"}, stdout=output, stderr=output
        )
        code = await process.wait()
    last = log.read_text().splitlines()
    print(f"\n{last[-1]}")  # noqa: T201 - the figures are asked for
    assert code == 0, "\n".join(last[-100:])
