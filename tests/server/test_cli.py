"""The commands, as processes: what they print, and how they end."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from user_service_server.settings import Settings

from ..engines import open_dir

MAIN = "from user_service_server.cli import main; main()"
URLS = {"DATABASE_URL": "postgresql://user:hunter2@localhost/users", "REDIS_URL": "redis://r"}
INHERITED = {
    name: value
    for name, value in os.environ.items()
    if name.removesuffix("_FILE").lower() not in Settings.__struct_fields__
}
USER = {"name": "John Doe", "email": "john@example.com", "password": "StrongPass123!"}


def start(directory: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    """Start a command in `directory`, as a shell in a terminal would: in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        cwd=directory,
        env={**INHERITED, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def run(directory: Path, *arguments: str, **environ: str) -> tuple[int, str, str]:
    with start(directory, *arguments, **environ) as process:
        output, errors = process.communicate(timeout=20)
        return process.returncode, output, errors


@pytest.fixture
def directory() -> Iterator[Path]:
    with open_dir() as opened:
        yield opened
        left = processes(opened)
        for process in left:
            process.kill()
        assert left == [], "its test left them running"


def processes(directory: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["name", "cwd"])
        if process.info["cwd"] is not None and Path(process.info["cwd"]).is_relative_to(directory)
    ]


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def free_port() -> int:
    with taken_port() as port:
        return port


def test_settings_are_printed_without_secrets(directory: Path) -> None:
    (directory / ".env").write_text("SECRET_KEY=hunter2\n")
    code, output, errors = run(directory, "settings", **URLS, PORT="3003")
    assert (code, errors) == (0, "")
    assert "hunter2" not in output
    rows = {line.split()[0]: line for line in output.splitlines()}
    assert rows["PORT"].split()[1:3] == ["3003", "3001"]
    assert "postgresql://user:***@localhost/users" in rows["DATABASE_URL"]
    assert "(hidden)" in rows["SECRET_KEY"]


def test_settings_are_printed_even_when_they_are_wrong(directory: Path) -> None:
    code, output, errors = run(directory, "settings", PORT="x")
    assert code == 2
    assert "(missing)" in output
    assert errors.startswith("PORT='x' is wrong: ")
    assert errors.endswith("; DATABASE_URL is missing; REDIS_URL is missing\n")


@pytest.mark.parametrize(
    "command", [("serve",), ("migrate",), ("epoch", "show"), ("epoch", "renew")]
)
def test_wrong_setting_ends_a_command_with_one_line(
    directory: Path, command: tuple[str, ...]
) -> None:
    code, output, errors = run(directory, *command, **URLS, CACHE_TTL="long")
    assert (code, output) == (2, "")
    assert errors.startswith("CACHE_TTL='long' is wrong: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "secret",
    ["", "<your-secret-key>", "k3y-of-31-characters-0123456789", "change-me", "a" * 64],
    ids=ascii,
)
def test_serve_with_keys_needs_a_secret_of_its_own(directory: Path, secret: str) -> None:
    code, output, errors = run(directory, "serve", **URLS, SECRET_KEY=secret)
    assert (code, output) == (2, "")
    assert errors.startswith("SECRET_KEY is missing, a placeholder, or shorter than 32 characters")
    assert errors.count("\n") == 1
    assert not secret or secret not in errors


def test_unreachable_postgres_ends_migrate_with_one_line(directory: Path) -> None:
    urls = {**URLS, "DATABASE_URL": f"postgresql://u:hunter2@127.0.0.1:{free_port()}/users"}
    code, output, errors = run(directory, "migrate", **urls)
    assert (code, output) == (1, "")
    assert errors.count("\n") == 1
    assert "hunter2" not in errors


def test_taken_port_ends_dev_before_it_starts_anything(directory: Path) -> None:
    with taken_port() as port:
        code, output, errors = run(directory, "dev", "--port", str(port))
    assert (code, output) == (1, "")
    assert errors.startswith(f"Port {port} is taken")
    assert errors.count("\n") == 1
    assert list(directory.iterdir()) == []


class Dev:
    """A running `user-service dev`."""

    def __init__(self, directory: Path) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.process = start(directory, "dev", "--port", str(port))
        # Its log is not read by these tests; unread it would fill the pipe and stop the service.
        assert self.process.stderr is not None
        self._drain = threading.Thread(target=self.process.stderr.read)
        self._drain.start()
        assert self.process.stdout is not None
        self.welcome = ""
        for line in self.process.stdout:
            self.welcome += line
            if line.startswith("Ctrl-C"):
                return
        pytest.fail(f"dev ended with {self.process.wait()}: {self.welcome}")

    def end(self, number: signal.Signals) -> int:
        """Send a signal to the whole group, as a terminal does, and return the exit code."""
        os.killpg(self.process.pid, number)
        code = self.process.wait(15)
        self._drain.join()
        self.process.communicate()
        return code


def test_dev_keeps_its_data_whatever_ends_it(directory: Path) -> None:
    """It leaves no process behind, unless it was killed; then the next start takes over."""
    dev = Dev(directory)
    assert f"{dev.url.replace('127.0.0.1', 'localhost')}/docs" in dev.welcome
    assert "curl -X POST" in dev.welcome
    answer = httpx.post(f"{dev.url}/api/v1/users/", json=USER)
    assert answer.status_code == 201
    user = answer.json()["data"]["id"]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT):
        if number == signal.SIGKILL:
            assert dev.end(number) == -signal.SIGKILL
            assert processes(directory) != [], "the engines outlive it, for the next start to end"
        else:
            assert dev.end(number) == 0
            assert processes(directory) == []
        if number != signal.SIGINT:
            dev = Dev(directory)
            read = httpx.get(f"{dev.url}/api/v1/users/{user}")
            assert read.json()["data"]["email"] == USER["email"]
