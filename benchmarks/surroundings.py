"""Owns what benchmarks run beside: engines, the server and the ceiling, started when asked for."""

from __future__ import annotations

import asyncio
import os
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
from typing import NamedTuple, Self

import httpx
import psutil
from user_service_server.embedded import EmbeddedPostgres, EmbeddedValkey
from user_service_server.settings import load_settings
from user_service_server.storage.migrations import upgrade

from benchmarks.peers import running as peers
from benchmarks.timing import Spent

READY_WITHIN = 60.0
"""Seconds until a process must answer."""
_POLL = 0.005


class Running(NamedTuple):
    """A process that takes requests, and what it took until it did."""

    url: str
    start: Spent


class Engines(NamedTuple):
    """The addresses of a migrated PostgreSQL and a Valkey."""

    database_url: str
    redis_url: str

    @property
    def environ(self) -> dict[str, str]:
        """The settings of a server on them, which otherwise runs as it is shipped."""
        # AUTH=required needs keys, which this release does not have.
        return {"AUTH": "off", "DATABASE_URL": self.database_url, "REDIS_URL": self.redis_url}


class Surroundings:
    """Everything that was started, which ends with it."""

    def __enter__(self) -> Self:
        self._stack = ExitStack()
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
        self._stack.enter_context(postgres)
        self._stack.enter_context(valkey)
        engines = Engines(postgres.create_database("bench"), valkey.url)
        upgrade(load_settings(engines.environ, None))
        return engines

    @cached_property
    def server(self) -> str:
        """The URL of the server, in a process of its own."""
        return self._stack.enter_context(self.serve()).url

    @contextmanager
    def serve(self) -> Iterator[Running]:
        """Run another server on the same engines."""
        with self.user_service("serve", environ=self.engines.environ) as running:
            yield running

    @contextmanager
    def user_service(self, *arguments: str | Path, environ: Mapping[str, str]) -> Iterator[Running]:
        """Run a command of the server until it is ready, and then end it in order."""
        command = [sys.executable, "-m", "user_service_server", *map(str, arguments)]
        environ = {"SHUTDOWN_GRACE": "0", **environ}
        with self._answering(str(arguments[0]), command, environ) as running:
            yield running

    @cached_property
    def peer_engines(self) -> Engines:
        """The peer's own databases on the engines of the service."""
        database_url = asyncio.run(peers.create_database(self.engines.database_url, "peer"))
        redis_url = self.engines.redis_url.removesuffix("db=0") + "db=1"
        return Engines(database_url, redis_url)

    @contextmanager
    def peer(self) -> Iterator[Running]:
        """Run the peer of the service, which has made its tables when it is ready."""
        database_url, redis_url = self.peer_engines
        environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
        with self._answering("peer", peers.command(), environ) as running:
            yield running

    @contextmanager
    def _answering(
        self, name: str, command: Sequence[str], environ: Mapping[str, str]
    ) -> Iterator[Running]:
        port = _free_port()
        url = f"http://127.0.0.1:{port}"
        started = time.monotonic()
        log = self.directory / f"{name}.log"
        environ = {**os.environ, "PORT": str(port), **environ}
        with self._process(command, environ, log) as process:
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() - started > READY_WITHIN:
                    raise RuntimeError(f"{name} did not start: {log.read_text()[-2000:]}")
                time.sleep(_POLL)
            wall, cpu = time.monotonic() - started, psutil.Process(process.pid).cpu_times()
            yield Running(url, Spent(wall, cpu.user + cpu.system))

    @cached_property
    def ready(self) -> str:
        """The URL of the server of ready bytes."""
        command = [sys.executable, "-m", "benchmarks.ready"]
        said = self.directory / "ready"
        process = self._process(command, os.environ, said)
        self._stack.enter_context(process)
        deadline = time.monotonic() + READY_WITHIN
        while not said.read_text().endswith("\n"):
            if time.monotonic() > deadline:
                raise RuntimeError("the server of ready bytes did not start")
            time.sleep(_POLL)
        return f"http://127.0.0.1:{int(said.read_text())}"

    @contextmanager
    def _process(
        self, command: Sequence[str], environ: Mapping[str, str], output: Path
    ) -> Iterator[subprocess.Popen[bytes]]:
        with output.open("wb") as file:
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
