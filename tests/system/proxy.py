"""Owns a TCP proxy between a client and a server, which can be cut, and fall silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from ..servers import free_port


class Proxy:
    """Forwards bytes to a port of this machine, for as long as it is told to."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._forwards = asyncio.Event()
        self._forwards.set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def listen(self) -> None:
        """Take connections."""
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)

    async def refuse(self) -> None:
        """Take no connection, and cut those that there are."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()

    def cut(self) -> None:
        """Break all connections."""
        for writer in self._writers:
            writer.transport.abort()

    def fall_silent(self) -> None:
        """Forward nothing more of what there is, and end nothing: half-open connections."""
        self._forwards.clear()

    def speak(self) -> None:
        """Forward what comes on new connections; those that fell silent stay so."""
        for task in self._tasks:
            task.cancel()
        self._forwards.set()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, there[1]}
        for source, sink in ((reader, there[1]), (there[0], writer)):
            task = asyncio.create_task(self._forward(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await source.read(65536):
                await self._forwards.wait()
                sink.write(chunk)
                await sink.drain()
        if self._forwards.is_set():
            sink.transport.abort()

    async def aclose(self) -> None:
        """End everything."""
        await self.refuse()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def a_proxy(target: int) -> AsyncIterator[Proxy]:
    """Run a proxy to a port."""
    proxy = Proxy(target)
    await proxy.listen()
    try:
        yield proxy
    finally:
        await proxy.aclose()
