"""Owns what benchmarks run beside: engines, the server and the ceiling, started when asked for."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import asyncpg
import httpx
import psutil
from redis import Redis
from user_service_schemas import Scope
from user_service_server.embedded import EmbeddedPostgres, EmbeddedValkey
from user_service_server.keys.repository import create_key
from user_service_server.settings import load_settings
from user_service_server.storage.database import connected
from user_service_server.storage.migrations import upgrade

from benchmarks import cores, documents, population
from benchmarks.budgets import Goal
from benchmarks.load import Running
from benchmarks.peers import running as peer
from benchmarks.timing import Spent

READY_WITHIN = 60.0
"""Seconds until a process must answer."""
_POLL = 0.005
USERS = 25_000
"""More than a server reads from PostgreSQL in one round."""
SERVICE, PEER, CEILINGS = 0, 1, 2
"""Their databases in Valkey."""


_CONNECTIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
RAISED = {"RATE_LIMIT_READ": "1000000000"}
"""What is not as it is shipped. One caller makes all the load, and more than the 10,000 reads a
second that it may by default; requests are counted all the same, in the same steps."""


class Started(NamedTuple):
    """A process that takes requests, and what it took until it did."""

    running: Running
    start: Spent


class Engines(NamedTuple):
    """The addresses of a migrated database and of the service's Valkey."""

    database_url: str
    redis_url: str
    secret_key: str

    @property
    def environ(self) -> dict[str, str]:
        """The settings of a server on them, which otherwise runs as it is shipped."""
        return {
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "SECRET_KEY": self.secret_key,
            **RAISED,
        }


class Surroundings:
    """Everything that was started, which ends with it."""

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._secret_key = secrets.token_hex(32)
        self._ceilings: dict[str, Running] = {}
        return self

    def __exit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @cached_property
    def directory(self) -> Path:
        """A directory through which PostgreSQL's system user may pass."""
        # Not below TMPDIR, whose path may leave no room for the name of a socket.
        directory = Path(tempfile.mkdtemp(prefix="us-bench-", dir="/tmp"))
        directory.chmod(0o711)
        self._stack.callback(shutil.rmtree, directory)
        return directory

    @cached_property
    def engines(self) -> Engines:
        """PostgreSQL as it is shipped, with fsync on, and Valkey."""
        postgres = EmbeddedPostgres(self.directory / "postgres")
        valkey = EmbeddedValkey(self.directory / "valkey")
        with cores.confined(cores.of_all_else()):
            self._stack.enter_context(postgres)
            self._stack.enter_context(valkey)
        self._postgres = postgres
        self._valkey_url = valkey.url.partition("?")[0]
        return self.new_database("bench")

    def new_database(self, name: str) -> Engines:
        """Return a migrated database that is empty, with Valkey's of the service."""
        engines = Engines(
            self._postgres.create_database(name), self.redis_url(SERVICE), self._secret_key
        )
        upgrade(load_settings(engines.environ, None))
        return engines

    def redis_url(self, database: int) -> str:
        """Return the address of one of Valkey's databases."""
        return f"{self._valkey_url}?db={database}"

    @cached_property
    def headers(self) -> dict[str, str]:
        """What a caller of the service sends that may do everything."""
        return self.headers_for(self.engines)

    @staticmethod
    def headers_for(engines: Engines) -> dict[str, str]:
        """Make a service key in a database, and return what its caller sends."""

        async def make_key() -> str:
            async with connected(load_settings(engines.environ, None)) as connection:
                key = await create_key(connection, "bench", list(Scope), None)
                await connection.commit()
            return key

        return {"Authorization": f"Bearer {asyncio.run(make_key())}"}

    @cached_property
    def server(self) -> Running:
        """The server on a core of its own, with the users of `documents` below `USERS`."""
        asyncio.run(population.load(self.engines.database_url, range(USERS)))
        started = self.serve(confined_to=cores.of_the_server())
        return self._stack.enter_context(started).running

    def ceiling(self, name: Literal["C0", "C1", "C2", "C6"]) -> Running:
        """Return a ceiling (see `ceilings`), on the server's core."""
        if name not in self._ceilings:
            command = [sys.executable, "-m", "benchmarks.ceilings", name]
            environ = self.engines.environ | {"REDIS_URL": self.redis_url(CEILINGS)}
            if name in ("C2", "C6"):  # the others ask no PostgreSQL
                environ["DATABASE_URL"] = self._database_of_ceilings
            started = self._started(command, environ, cores.of_the_server())
            self._ceilings[name] = self._stack.enter_context(started).running
        return self._ceilings[name]

    @cached_property
    def _database_of_ceilings(self) -> str:
        """A database of their own: who is changed there is no user of the service."""
        url = self.new_database("ceilings").database_url
        asyncio.run(population.load(url, range(USERS)))
        return url

    @cached_property
    def peer(self) -> Running:
        """The peer on the server's core, on the same engines and with the same users."""
        database_url = asyncio.run(peer.create_database(self.engines.database_url, "peer"))
        environ = {"DATABASE_URL": database_url, "REDIS_URL": self.redis_url(PEER)}
        started = self._started(peer.command(), environ, cores.of_the_server())
        running = self._stack.enter_context(started).running
        asyncio.run(peer.load_users(database_url, range(USERS)))
        return running

    @contextmanager
    def serve(
        self, *, confined_to: list[int] | None = None, database_url: str | None = None
    ) -> Iterator[Started]:
        """Run another server on the same engines; `database_url` is another way to the database."""
        environ = self.engines.environ
        if database_url is not None:
            environ["DATABASE_URL"] = database_url
        with self.user_service("serve", environ=environ, confined_to=confined_to) as started:
            yield started

    def connections(self) -> tuple[int, int]:
        """Return how many connections PostgreSQL and Valkey have, without the one that asks."""

        async def of_postgres() -> int:
            address = self.engines.database_url.replace("+asyncpg", "")
            connection = await asyncpg.connect(address)
            try:
                return int(await connection.fetchval(_CONNECTIONS))
            finally:
                await connection.close()

        with Redis.from_url(self.redis_url(SERVICE)) as redis:
            return asyncio.run(of_postgres()), len(redis.client_list()) - 1

    def forget(self, database: int) -> None:
        """Empty one of Valkey's databases."""
        with Redis.from_url(self.redis_url(database)) as redis:
            redis.flushdb()

    @contextmanager
    def user_service(
        self,
        *arguments: str | Path,
        environ: Mapping[str, str],
        confined_to: list[int] | None = None,
    ) -> Iterator[Started]:
        """Run a command of the server until it is ready, and then end it in order."""
        command = [sys.executable, "-m", "user_service_server", *map(str, arguments)]
        with self._started(command, environ, confined_to or cores.usable()) as started:
            yield started

    @contextmanager
    def _started(
        self, command: Sequence[str], environ: Mapping[str, str], confined_to: list[int]
    ) -> Iterator[Started]:
        port = _free_port()
        environ = {**os.environ, "PORT": str(port), "SHUTDOWN_GRACE": "0", **environ}
        url = f"http://127.0.0.1:{port}"
        begun = time.monotonic()
        log = self.directory / f"{port}.log"
        with self._process(command, environ, log, confined_to) as process:
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() - begun > READY_WITHIN:
                    raise RuntimeError(f"{command} did not start: {log.read_text()[-2000:]}")
                time.sleep(_POLL)
            wall, cpu = time.monotonic() - begun, psutil.Process(process.pid).cpu_times()
            yield Started(Running(url, process.pid), Spent(wall, cpu.user + cpu.system))

    @cached_property
    def ready(self) -> str:
        """The URL of the server of ready bytes."""
        command = [sys.executable, "-m", "benchmarks.ready"]
        said = self.directory / "ready"
        process = self._process(command, os.environ, said, cores.usable())
        self._stack.enter_context(process)
        deadline = time.monotonic() + READY_WITHIN
        while not said.read_text().endswith("\n"):
            if time.monotonic() > deadline:
                raise RuntimeError("the server of ready bytes did not start")
            time.sleep(_POLL)
        return f"http://127.0.0.1:{int(said.read_text())}"

    @contextmanager
    def _process(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        output: Path,
        confined_to: list[int],
    ) -> Iterator[subprocess.Popen[bytes]]:
        with output.open("wb") as file, cores.confined(confined_to):
            process = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


def warm_up(server: Running, headers: Mapping[str, str]) -> None:
    """Let the server cache the warm set.

    It is asked again while it refuses, as it may after a benchmark that left it much to do.
    """
    ids = [documents.user_id(number) for number in range(documents.WARM)]
    deadline = time.monotonic() + READY_WITHIN
    with httpx.Client(base_url=server.url, headers=headers, timeout=READY_WITHIN) as http:
        while True:
            answer = http.post("/api/v1/users/batch", json={"ids": ids})
            if answer.status_code != 503 or time.monotonic() > deadline:
                break
            time.sleep(float(answer.headers["Retry-After"]))
    assert len(answer.raise_for_status().json()["data"]["users"]) == documents.WARM


def cache_reads(server: Running) -> dict[str, float]:
    """Return how many documents the server asked its cache for, by what came of it."""
    text = httpx.get(f"{server.url}/metrics").text
    found = re.findall(r'user_service_cache_reads_total\{result="(\w+)"\} (\S+)', text)
    return {result: float(count) for result, count in found}


def out_of_the_cache(before: dict[str, float], after: dict[str, float]) -> Goal:
    """Return the goal that hits were measured, of two `cache_reads`.

    On a machine that others use Redis may be late, and PostgreSQL is read instead.
    """
    read = {result: count - before.get(result, 0) for result, count in after.items()}
    return Goal(
        name="out of the cache",
        figure=read["hit"],
        unit="documents",
        bound="≥",
        limit=0.99,
        ceiling=sum(read.values()),
        beside="documents read",
    )
