"""A Redis that does what a test says: it greets as a Redis does, and answers what it is told to.

What is told of commands and connections leaves the greetings out: a connection that only greets is
one, but what it says is no command.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import hiredis

Words = list[bytes]


def encoded(value: object) -> bytes:
    """Return a reply as it goes over the wire; an exception is one that refuses."""
    match value:
        case None:
            return b"$-1\r\n"
        case int():
            return b":%d\r\n" % value
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(value), value)
        case list():
            return b"*%d\r\n%b" % (len(value), b"".join(map(encoded, value)))
        case Exception():
            return f"-{value}\r\n".encode()
    raise TypeError(value)


class Connection(asyncio.Protocol):
    """One connection to the scripted Redis."""

    transport: asyncio.Transport

    def __init__(self, redis: ScriptedRedis) -> None:
        self.ended = asyncio.Event()
        self.asked: list[Words] = []
        """The commands that came by it."""
        self.is_greeted = False
        """Whether it has asked who answers."""
        self._redis = redis
        self._reader = hiredis.Reader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._redis.connections.append(self)
        if not self._redis.accepts:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (words := self._reader.gets()) is not False:
            self._redis.hear(self, words)

    def connection_lost(self, _exc: Exception | None) -> None:
        self.ended.set()

    def say(self, data: bytes) -> None:
        """Send bytes after all that was said before."""
        self.transport.write(data)

    def say_at_once(self, data: bytes) -> None:
        """Send bytes that are in the other's socket on return, without a turn of the event loop."""
        assert os.write(self._socket, data) == len(data)

    def end(self) -> None:
        """End it in order."""
        self.transport.close()

    def reset(self) -> None:
        """End it as what lost its state does, which over TCP the other side meets as an error."""
        with socket.socket(fileno=os.dup(self._socket)) as another:
            another.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    @property
    def _socket(self) -> int:
        number: int = self.transport.get_extra_info("socket").fileno()
        return number


def echo(connection: Connection, words: Words) -> None:
    """Answer by the first argument, or the arguments of MGET."""
    connection.say(encoded(words[1:] if words[0] == b"MGET" else words[1]))


def nothing(connection: Connection, words: Words) -> None:
    """Answer nothing."""


class ScriptedRedis:
    """A server at `url`.

    Attributes:
        run_id: who it says to be.
        accepts: whether it keeps connections that are made.
        greets: whether it says who it is; whoever asks waits if not.
        loads: whether it loads its data: then it says who it is, and nothing else.
        answer: called with each command that is no greeting.
    """

    def __init__(self) -> None:
        self.url = ""
        self.run_id = "1"
        self.replication_id = "2"
        self.accepts = True
        self.greets = True
        self.loads = False
        self.answer: Callable[[Connection, Words], None] = echo
        self.connections: list[Connection] = []

    @property
    def asked(self) -> list[Words]:
        """All commands that came."""
        return [words for connection in self.connections for words in connection.asked]

    @property
    def open(self) -> Collection[Connection]:
        """The connections that neither side has ended."""
        return [connection for connection in self.connections if not connection.ended.is_set()]

    @property
    def wire(self) -> Connection:
        """The one connection that is open."""
        (connection,) = self.open
        return connection

    def hear(self, connection: Connection, words: Words) -> None:
        """Greet, or answer what is no greeting."""
        if words[0] == b"INFO":
            connection.is_greeted = True
            if self.greets:
                connection.say(encoded(self._info))
        elif words[0] == b"CLIENT":
            connection.say(b"+OK\r\n")
        elif words[0] == b"PING" and not self.loads:
            connection.say(b"+PONG\r\n")
        else:
            connection.asked.append(words)
            if self.loads:
                connection.say(b"-LOADING Redis is loading the dataset in memory\r\n")
            else:
                self.answer(connection, words)

    @property
    def _info(self) -> bytes:
        lines = [
            *("# Server", f"run_id:{self.run_id}"),
            *("# Persistence", f"loading:{self.loads:d}", "async_loading:0"),
            *("# Replication", f"master_replid:{self.replication_id}", ""),
        ]
        return "\r\n".join(lines).encode()

    @asynccontextmanager
    async def listening(self, directory: Path | None = None) -> AsyncIterator[None]:
        """Listen on a socket in the directory, or over TCP."""
        loop = asyncio.get_running_loop()
        if directory is None:
            server = await loop.create_server(lambda: Connection(self), "127.0.0.1", 0)
            self.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        else:
            path = directory / "scripted.sock"
            server = await loop.create_unix_server(lambda: Connection(self), str(path))
            self.url = f"unix://{path}"
        try:
            yield
        finally:
            server.close()
            for connection in self.open:
                connection.transport.abort()
            await asyncio.gather(*(connection.ended.wait() for connection in self.connections))
