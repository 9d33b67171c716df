"""Owns the servers of the tests: `user-service serve` in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from .private import PRIVATE

READY_WITHIN = 20.0
"""Seconds; a start takes one or two."""


_HANDED_ON = ("PATH", "PYTHONPATH", "PGBOUNCER")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running server, which may be killed and started again at the same address."""

    environ: dict[str, str]
    port: int = field(default_factory=free_port)
    log: Path = field(init=False)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        number, name = tempfile.mkstemp(prefix="us-server-", suffix=".log")
        os.close(number)
        self.log = Path(name)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its process, while it runs."""
        assert self.process is not None
        return self.process.pid

    def start(self, *, wait: bool = True) -> None:
        """Start it; with `wait`, return when it takes requests."""
        command = [sys.executable, "-m", "user_service_server", "serve"]
        environ = {
            **{name: os.environ[name] for name in _HANDED_ON if name in os.environ},
            "AUTH": "off",
            "SHUTDOWN_GRACE": "0",
            "PORT": str(self.port),
            **self.environ,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environ, stdout=log, stderr=log, cwd=self.log.parent
            )
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN
        # One client for all looks: the server starts on the same cores.
        with httpx.Client(base_url=self.url, timeout=1) as http:
            while time.monotonic() < deadline:
                assert self.process is not None
                assert self.process.poll() is None, self.log.read_text()
                try:
                    if http.get("/health/ready").status_code == 200:
                        return
                except httpx.TransportError:
                    time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def kill(self) -> None:
        """End it as a power cut would (SIGKILL)."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it gracefully (SIGTERM); returns its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(timeout=20)
        self.process = None
        return code


@contextmanager
def serving(database_url: str, redis_url: str, **others: str) -> Iterator[Server]:
    """Run a server on these engines; `others` are settings by the names of their variables."""
    server = Server({"DATABASE_URL": database_url, "REDIS_URL": redis_url, **others})
    server.start()
    try:
        yield server
    finally:
        if server.process is not None:
            server.kill()
        PRIVATE.search(server.log)
        server.log.unlink()
