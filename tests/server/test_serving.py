"""How a serving process starts, and how it ends: no answer is lost."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

APP = """
import asyncio, contextlib, os, sys
from contextlib import asynccontextmanager
import uvloop
from user_service_server import serving
from user_service_server.serving import ServingError, serve
from user_service_server.settings import load_settings

class App:
    async def __call__(self, scope, receive, send):
        path = scope["path"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if path == "/slow":
            print("slow begins", flush=True)
            await asyncio.sleep(1)
        while path == "/stream":
            print("stream flows", flush=True)
            await send({"type": "http.response.body", "body": b"x" * 10000, "more_body": True})
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                print("stream is cut off", flush=True)
                raise
        body = b"draining" if draining.is_set() else b"ready"
        await send({"type": "http.response.body", "body": body})

    @asynccontextmanager
    async def lifespan(self):
        print("starting", flush=True)
        if "fail" in sys.argv:
            raise OSError("no database\\nat all")
        if "hang" in sys.argv:
            await asyncio.sleep(30)
        yield
        print("closed", flush=True)

async def main():
    await serve(App(), settings, draining=draining, on_ready=lambda: print("ready", flush=True))

if "impatient" in sys.argv:
    serving._IDLE_TIMEOUT_MS = 1000

def refuse(*_):
    raise PermissionError(1, "Operation not permitted")

if "contained" in sys.argv:
    os.sched_setscheduler = refuse
urls = {"DATABASE_URL": "postgresql://h/d", "REDIS_URL": "redis://h"}
settings = load_settings(dict(os.environ, **urls), None)
draining = asyncio.Event()
try:
    uvloop.run(main())
except ServingError as error:
    sys.exit(str(error))
"""


class Served:
    """A process that serves `APP`."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port
        self.connections: list[asyncio.StreamWriter] = []

    async def says(self, line: str) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(10):
            while (said := await self.process.stdout.readline()) != line.encode() + b"\n":
                assert said, f"it ended before it said {line}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.connections.append(writer)
        return reader, writer

    async def request(self, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self.connect()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        return reader, writer

    async def ends(self, within: float) -> tuple[int, str]:
        async with asyncio.timeout(within):
            _, errors = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, errors.decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def served(
    *arguments: str,
    grace: float = 0,
    finish: float = 10,
    port: int | None = None,
    scheduling: str = "batch",
) -> AsyncIterator[Served]:
    port = port or free_port()
    environ = {
        "PORT": port,
        "SHUTDOWN_GRACE": grace,
        "SHUTDOWN_TIMEOUT": finish,
        "CPU_SCHEDULING": scheduling,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", APP, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **{name: str(value) for name, value in environ.items()}},
    )
    server = Served(process, port)
    try:
        yield server
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
        for connection in server.connections:
            connection.close()
            with suppress(ConnectionError):
                await connection.wait_closed()


async def body(reader: asyncio.StreamReader) -> bytes:
    """The body of one answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    _, _, rest = head.partition(b"content-length: ")
    return await reader.readexactly(int(rest.split()[0]))


@pytest.mark.anyio
async def test_running_request_is_answered_and_idle_connections_do_not_hold() -> None:
    async with served() as server:
        await server.says("ready")
        idle, _ = await server.request("/")
        assert await body(idle) == b"ready"
        silent, _ = await server.connect()
        slow, _ = await server.request("/slow")
        await server.says("slow begins")

        server.process.send_signal(signal.SIGTERM)

        await idle.read()
        with pytest.raises(ConnectionRefusedError):
            await server.connect()
        assert await body(slow) == b"draining"
        assert await silent.read() == b""
        await server.says("closed")
        assert await server.ends(within=1) == (0, "")


@pytest.mark.anyio
async def test_in_the_grace_it_still_serves() -> None:
    async with served(grace=0.5) as server:
        await server.says("ready")
        server.process.send_signal(signal.SIGTERM)
        answer = b"ready"
        while answer == b"ready":
            reader, _ = await server.request("/")
            answer = await body(reader)
        assert answer == b"draining"
        assert await server.ends(within=2) == (0, "")


@pytest.mark.anyio
async def test_what_does_not_finish_is_cut_off() -> None:
    async with served(finish=0.3) as server:
        await server.says("ready")
        await server.request("/stream")
        await server.says("stream flows")
        server.process.send_signal(signal.SIGTERM)
        # Before the app closes what it works with.
        await server.says("stream is cut off")
        await server.says("closed")
        assert await server.ends(within=1) == (0, "")


@pytest.mark.anyio
async def test_second_signal_ends_at_once() -> None:
    async with served(grace=30, finish=30) as server:
        await server.says("ready")
        await server.request("/stream")
        await server.says("stream flows")
        server.process.send_signal(signal.SIGINT)
        while True:
            reader, _ = await server.request("/")
            if await body(reader) == b"draining":
                break
        server.process.send_signal(signal.SIGINT)
        assert await server.ends(within=3) == (0, "")


@pytest.mark.anyio
async def test_signal_ends_a_start_that_waits() -> None:
    async with served("hang") as server:
        await server.says("starting")
        server.process.send_signal(signal.SIGTERM)
        assert await server.ends(within=2) == (0, "")


@pytest.mark.anyio
async def test_failed_start_is_one_line() -> None:
    async with served("fail") as server:
        ended = await server.ends(within=5)
        assert ended == (1, "the service did not start: no database at all\n")


@pytest.mark.anyio
async def test_taken_port_is_named_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with served(port=port) as server:
            output, errors = await server.process.communicate()
            assert server.process.returncode == 1
            assert output == b""
            assert errors.decode().startswith(f"Port {port} is taken")
            assert errors.count(b"\n") == 1


@pytest.mark.anyio
async def test_headers_that_drip_are_cut_off_as_a_whole() -> None:
    """The time is that of all headers: a byte now and then does not begin it anew."""
    async with served("impatient") as server:
        await server.says("ready")
        opened = [await server.connect() for _ in range(100)]

        async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
            reading = asyncio.create_task(reader.read())
            writer.write(b"GET / HTTP/1.1\r\nX-Slow: ")
            while not reading.done():
                writer.write(b"a")
                await asyncio.wait({reading}, timeout=0.1)
            with suppress(ConnectionError):
                return await reading
            return b""

        async with asyncio.timeout(5):
            received = await asyncio.gather(*(drip(*one) for one in opened))
        assert not any(b" 200 " in one for one in received)
        reader, _ = await server.request("/")
        assert await body(reader) == b"ready"


def policies_of(process: int) -> list[int]:
    """Of each of its threads."""
    threads = Path(f"/proc/{process}/task").iterdir()
    return [os.sched_getscheduler(int(thread.name)) for thread in threads]


@pytest.mark.parametrize(
    ("scheduling", "argument", "policy"),
    [
        ("batch", "-", "SCHED_BATCH"),
        ("batch", "contained", "SCHED_OTHER"),
        ("system", "-", "SCHED_OTHER"),
    ],
)
@pytest.mark.anyio
async def test_no_thread_interrupts_another_where_that_is_wished_and_allowed(
    scheduling: str, argument: str, policy: str
) -> None:
    async with served(argument, scheduling=scheduling) as server:
        await server.says("ready")
        answer, _ = await server.request("/")
        assert await body(answer) == b"ready"
        policies = policies_of(server.process.pid)
        assert len(policies) > 1, "Granian has threads of its own"
        assert set(policies) == {getattr(os, policy)}
