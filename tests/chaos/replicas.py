"""Owns two servers on one database and one Redis, and the gate that one of them goes through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from user_service_server.embedded import EmbeddedPostgres, EmbeddedValkey

from ..engines import SMALL, Engines, make_template, open_dir
from ..servers import Server

PUBLICATION = b"'lost'"
"""What only the script that publishes a document says."""


class Gate:
    """A socket before Redis. What is to happen before the next publication, happens first."""

    def __init__(self, target: str, path: Path) -> None:
        self.url = f"unix://{path}?db=0"
        self.before_publication: Callable[[], None] | None = None
        self.speaks = asyncio.Event()
        """Whether what Redis says goes through."""
        self.speaks.set()
        self.passed = asyncio.Event()
        """Set when what was to happen has happened."""
        self._path = path
        self._target = urlsplit(target).path
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(self._connected, self._path)
        try:
            yield
        finally:
            server.close()
            # Their ends were killed before.
            await asyncio.gather(*self._connections)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._connect(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Whoever is killed, on either side, closes nothing in order.
        with suppress(OSError):
            redis_reader, redis_writer = await asyncio.open_unix_connection(self._target)
            forwarding = asyncio.create_task(self._forward(reader, redis_writer))
            with suppress(OSError):
                while data := await redis_reader.read(65536):
                    await self.speaks.wait()
                    writer.write(data)
            forwarding.cancel()
            redis_writer.close()
        writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if self.before_publication is not None and PUBLICATION in data:
                    self.before_publication()
                    self.before_publication = None
                    self.passed.set()
                    break
                writer.write(data)
        writer.close()


@dataclass
class Replicas:
    """Two servers and what they stand on; the first one's way to Redis is `gate`."""

    servers: list[Server]
    postgres: EmbeddedPostgres
    valkey: EmbeddedValkey
    gate: Gate

    @property
    def ports(self) -> list[int]:
        return [server.port for server in self.servers]


@asynccontextmanager
async def running(*servers: Server) -> AsyncIterator[list[Server]]:
    """Run servers while the loop goes on; ends those that are still there."""
    try:
        for server in servers:
            server.start(wait=False)
        for server in servers:
            await asyncio.to_thread(server.wait_until_ready)
        yield list(servers)
    finally:
        for server in servers:
            if server.process is not None:
                server.kill()
            server.log.unlink()


@asynccontextmanager
async def replicas(**others: str) -> AsyncIterator[Replicas]:
    """Start two servers on engines of their own, of which Redis keeps its data over a restart.

    `others` are settings by the names of their variables.
    """
    with (
        open_dir() as directory,
        EmbeddedPostgres(directory / "postgres", fsync=False, options=SMALL) as postgres,
        EmbeddedValkey(directory / "valkey", persist=True) as valkey,
    ):
        # Its migration has an event loop of its own.
        await asyncio.to_thread(make_template, postgres)
        engines = Engines(postgres, valkey)
        gate = Gate(valkey.url, directory / "gate.sock")
        settings = {
            "DATABASE_URL": engines.create_database("replicas"),
            "REDIS_URL": valkey.url,
            "PASSWORD_REQUIRED": "off",
            **others,
        }
        first, second = Server({**settings, "REDIS_URL": gate.url}), Server(settings)
        async with gate.open(), running(first, second) as servers:
            yield Replicas(servers, postgres, valkey, gate)
