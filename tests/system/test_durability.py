"""What was acknowledged is there after a restart and after SIGKILL of everything."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from user_service_server.embedded import EmbeddedPostgres

from ..engines import Engines, copy_of, open_dir
from ..servers import Server, free_port, serving
from .registrations import Registrations, assert_everybody_is_there, half_users
from .trouble import kill_all, processes_below

ROUND = 5.0
"""Seconds that a round of registrations, kill and recovery takes about."""


async def test_nothing_acknowledged_is_lost_when_everything_is_killed(
    own_engines: Engines, chaos_seconds: float
) -> None:
    postgres, valkey = own_engines.postgres, own_engines.valkey
    database = own_engines.create_database("survivors")
    told: list[Registrations] = []
    with serving(database, valkey.url) as server:
        for number in range(max(2, int(chaos_seconds / ROUND))):
            async with Registrations(server.url, f"round{number}-") as registrations:
                await registrations.wait_for(25)
                assert server.process is not None
                everything = [server.process.pid]
                everything += [process.pid for process in processes_below(postgres.data_dir.parent)]
                kill_all(*everything)
                for part in (postgres, valkey, server):
                    await asyncio.to_thread(part.kill)
            told.append(registrations)
            valkey.start()
            postgres.start()
            server.start()
            await assert_everybody_is_there(server.url, *told)
            assert half_users(postgres, "survivors") == ""
            assert max(registrations.statuses) < 500


async def test_nothing_acknowledged_is_lost_when_postgres_alone_is_killed(
    own_engines: Engines,
) -> None:
    postgres = own_engines.postgres
    database = own_engines.create_database("survivors")
    with serving(database, own_engines.valkey.url) as server:
        async with Registrations(server.url, "user") as registrations:
            await registrations.wait_for(20)
            await asyncio.to_thread(postgres.kill)
            await asyncio.to_thread(postgres.start)
            await registrations.wait_for(10)
        await assert_everybody_is_there(server.url, registrations)
        assert half_users(postgres, "survivors") == ""
        assert registrations.statuses <= {200, 201, 503}


async def test_data_is_there_after_a_restart(server: Server) -> None:
    async with Registrations(server.url, "before") as registrations:
        await registrations.wait_for(5)
        assert await asyncio.to_thread(server.stop) == 0
    server.start()
    await assert_everybody_is_there(server.url, registrations)


class Dev:
    """`user-service dev`, as a shell in a terminal starts it: in a process group of its own."""

    def __init__(self, directory: Path) -> None:
        self.data_dir = directory / "data"
        self.log = directory / "dev.log"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "user_service_server", "dev"]
        command += ["--data-dir", str(self.data_dir), "--port", str(port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={"PATH": os.environ["PATH"]},
                cwd=directory,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    async def serves(self) -> None:
        async with asyncio.timeout(30), httpx.AsyncClient(base_url=self.url) as http:
            while True:
                assert self.process.poll() is None, self.log.read_text()
                with suppress(httpx.TransportError):
                    await http.get("/health/ready")
                    return
                await asyncio.sleep(0.02)


@pytest.fixture
def directory(migrated: Path) -> Iterator[Path]:
    """Where `dev` finds a PostgreSQL that another run made: its first start is not tested here."""
    with open_dir() as opened:
        data_dir = opened / "data"
        data_dir.mkdir()
        copy_of(migrated, data_dir)
        yield opened
        for process in processes_below(opened):
            process.kill()


async def test_dev_loses_nothing(directory: Path) -> None:
    postgres = EmbeddedPostgres(directory / "data" / "postgres")

    dev = Dev(directory)
    await dev.serves()
    async with Registrations(dev.url, "killed") as before_kill:
        await before_kill.wait_for(20)
        kill_all(*(process.pid for process in processes_below(directory)))
        assert await asyncio.to_thread(dev.process.wait, 10) == -signal.SIGKILL
    assert left_running(directory) == []

    dev = Dev(directory)
    await dev.serves()
    await assert_everybody_is_there(dev.url, before_kill)
    async with Registrations(dev.url, "group") as before_group:
        await before_group.wait_for(20)
        # The engines are in sessions of their own and live on, until the next start ends them.
        os.killpg(dev.process.pid, signal.SIGKILL)
        await asyncio.to_thread(dev.process.wait, 10)

    dev = Dev(directory)
    await dev.serves()
    await assert_everybody_is_there(dev.url, before_kill, before_group)
    async with Registrations(dev.url, "interrupted") as before_end:
        await before_end.wait_for(10)
        os.killpg(dev.process.pid, signal.SIGINT)
        assert await asyncio.to_thread(dev.process.wait, 20) == 0
    assert left_running(directory) == []
    assert before_end.statuses <= {200, 201}

    dev = Dev(directory)
    await dev.serves()
    await assert_everybody_is_there(dev.url, before_kill, before_group, before_end)
    assert half_users(postgres, "users") == ""
    os.killpg(dev.process.pid, signal.SIGINT)
    assert await asyncio.to_thread(dev.process.wait, 20) == 0


def left_running(directory: Path) -> list[psutil.Process]:
    return [p for p in processes_below(directory) if p.status() != psutil.STATUS_ZOMBIE]
