"""Owns what goes over the wire to PostgreSQL: how often the server waits for it, and for what.

A proxy on a socket of its own counts the messages that the server sends (PostgreSQL's protocol,
version 3, "Message Formats"), so that drivers and pools cannot hide any.
"""

from __future__ import annotations

import itertools
import shutil
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, cast

from sqlalchemy import make_url

from benchmarks.surroundings import Surroundings

# Sync, Flush and a simple query: what is sent before one waits.
_WAITS = b"SHQ"
_EXECUTE, _QUERY = b"E"[0], b"Q"[0]
_TRANSACTION = ("BEGIN", "COMMIT", "ROLLBACK")


class Counted(NamedTuple):
    """What was sent so far."""

    round_trips: int
    statements: int
    """Without those that begin and end transactions."""


class Wire:
    """What passes through the proxy."""

    def __init__(self, database_url: str, behind: Path) -> None:
        self.database_url = database_url
        self.behind = behind
        self._lock = threading.Lock()
        self._round_trips = 0
        self._statements = 0

    @property
    def counted(self) -> Counted:
        """What was sent so far, on all connections."""
        with self._lock:
            return Counted(self._round_trips, self._statements)

    def count(self, kind: int, body: bytes) -> None:
        """Count a message of the server's."""
        begins = body.lstrip().upper().startswith
        with self._lock:
            self._round_trips += kind in _WAITS
            self._statements += kind == _EXECUTE or (
                kind == _QUERY and not any(begins(word.encode()) for word in _TRANSACTION)
            )


@contextmanager
def tapped(database_url: str, directory: Path) -> Iterator[Wire]:
    """Listen in a directory in front of a PostgreSQL whose URL names its socket's directory."""
    url = make_url(database_url)
    name = f".s.PGSQL.{url.query['port']}"
    through = url.update_query_dict({"host": str(directory)}).render_as_string(hide_password=False)
    wire = Wire(through, Path(str(url.query["host"]), name))
    directory.mkdir()
    with _Proxy(str(directory / name), wire) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield wire
        finally:
            proxy.shutdown()


@contextmanager
def server_behind(surroundings: Surroundings) -> Iterator[tuple[str, Wire]]:
    """Run a server whose messages are counted; gives its URL, too."""
    directory = surroundings.directory / "wire"
    with (
        tapped(surroundings.engines.database_url, directory) as wire,
        surroundings.serve(database_url=wire.database_url) as started,
    ):
        yield started.running.url, wire
    shutil.rmtree(directory)


def taken_by(wire: Wire, call: Callable[[int], object], times: int) -> Counted:
    """Call with one number after the other, and return what a call sends.

    That is the least, since the server sends some of its own accord, at any time; and the first
    calls prepare statements.
    """
    counted = [wire.counted]
    for number in range(times):
        call(number)
        counted.append(wire.counted)
    pairs = list(itertools.pairwise(counted))
    return Counted(
        min(after.round_trips - before.round_trips for before, after in pairs),
        min(after.statements - before.statements for before, after in pairs),
    )


class _Proxy(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, path: str, wire: Wire) -> None:
        self.wire = wire
        super().__init__(path, _Connection)


class _Connection(socketserver.BaseRequestHandler):
    """One connection of the server's."""

    def handle(self) -> None:
        proxy = cast("_Proxy", self.server)
        with socket.socket(socket.AF_UNIX) as behind:
            behind.connect(str(proxy.wire.behind))
            answers = threading.Thread(target=_pass, args=(behind, self.request), daemon=True)
            answers.start()
            self._listen(proxy.wire, behind)

    def _listen(self, wire: Wire, behind: socket.socket) -> None:
        received = b""
        started = False
        while data := self.request.recv(65536):
            received += data
            # The first message has no kind.
            while len(received) >= 5:
                length = int.from_bytes(received[1:5] if started else received[:4], "big") + started
                if len(received) < length:
                    break
                if started:
                    wire.count(received[0], received[5:length])
                received, started = received[length:], True
            behind.sendall(data)
        with suppress(OSError):
            behind.shutdown(socket.SHUT_RDWR)


def _pass(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)
