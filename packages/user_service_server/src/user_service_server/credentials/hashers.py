"""The processes that hash: how many, what waits for them, and what becomes of it when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple, cast

import msgspec
import structlog

from ..errors import Overloaded, ServiceError
from . import hasher

# What argon2 works in, 19 MB that are touched at random, lies in huge pages: 5 % more hashes. Only
# glibc (2.35) reads it, and what the operator says after it counts.
_MALLOC = "glibc.malloc.hugetlb=1"

_log = structlog.get_logger()


class _Work(NamedTuple):
    request: bytes
    done: asyncio.Future[str]


class _Lane:
    """Work of one kind: in each, as much may wait."""

    def __init__(self) -> None:
        self.waiting: deque[_Work] = deque()
        self.running = 0

    def __len__(self) -> int:
        return len(self.waiting) + self.running


class Hashers:
    """Processes of low priority that hash passwords: a bounded number, and a bounded queue.

    Not threads: when a hash is done its thread wants the interpreter's lock, the event loop has to
    hand it over, and then waits until the system gives that thread a core. On a busy machine that
    made one read of a hundred 0.5 s late, and later still with threads of low priority.

    What is made and what is compared take turns: a flood of the one does not stop the other. A
    process is started when it is first needed, and ends with its standard input, so with the
    service, whatever ends that.

    Args:
        number: how many passwords are hashed at once.
        queue: how many of each kind may wait.
        cost: argon2's time cost and memory cost, in KiB.
    """

    def __init__(self, number: int, queue: int, cost: Sequence[int]) -> None:
        self._number: Final = number
        self._limit: Final = number + queue
        # -P: what lies in the working directory is not what is imported.
        self._command: Final = (sys.executable, "-P", "-m", hasher.__name__, *map(str, cost))
        self._making, self._comparing = _Lane(), _Lane()
        self._turns = deque((self._making, self._comparing))
        self._some = asyncio.Semaphore(0)
        self._workers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to work."""
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._number)]

    async def make(self, password: str) -> str:
        """Return a new hash; raises `Overloaded`."""
        return await self._run(self._making, password, None)

    async def compare(self, password: str, password_hash: str) -> bool:
        """Whether the hash is one of the password; raises `Overloaded`."""
        return await self._run(self._comparing, password, password_hash) == hasher.YES

    @property
    def waiting(self) -> int:
        """How many passwords are being hashed or wait for it."""
        return len(self._making) + len(self._comparing)

    async def _run(self, lane: _Lane, *request: str | None) -> str:
        if len(lane) >= self._limit:
            raise Overloaded
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        lane.waiting.append(_Work(msgspec.json.encode(request) + b"\n", done))
        self._some.release()
        return await done

    async def _work(self) -> None:
        process: Process | None = None
        try:
            while True:
                await self._some.acquire()
                lane, work = self._next()
                if work.done.done():
                    continue  # who asked has gone
                lane.running += 1
                try:
                    if process is None or process.returncode is not None:
                        process = await self._start()
                    answer = await _ask(process, work.request)
                except (OSError, EOFError, RuntimeError) as error:
                    # Most likely there is no memory for it. Whoever asked can ask again. uvloop
                    # says RuntimeError of a pipe that it has closed meanwhile.
                    _log.error("hasher.died", error=type(error).__name__)
                    await _end(process)
                    process = None
                    _conclude(work, Overloaded())
                else:
                    _conclude(work, answer)
                finally:
                    lane.running -= 1
                    work.done.cancel()  # where this is closed in the middle of it
        finally:
            await _end(process)

    def _next(self) -> tuple[_Lane, _Work]:
        self._turns.rotate()
        lane = next(lane for lane in self._turns if lane.waiting)
        return lane, lane.waiting.popleft()

    async def _start(self) -> Process:
        # In the service's session: its priority is one among the session's own processes.
        tunables = ":".join(filter(None, [_MALLOC, os.environ.get("GLIBC_TUNABLES")]))
        environ = {**os.environ, "GLIBC_TUNABLES": tunables}
        return await asyncio.create_subprocess_exec(
            *self._command, stdin=PIPE, stdout=PIPE, env=environ
        )

    async def close(self) -> None:
        """End the processes; what still waits is dropped."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for lane in self._turns:
            for work in lane.waiting:
                work.done.cancel()


async def _ask(process: Process, request: bytes) -> str:
    """Return what a process answers; raises `OSError` or `EOFError` where it dies."""
    to, of = cast("StreamWriter", process.stdin), cast("StreamReader", process.stdout)
    to.write(request)
    await to.drain()
    return (await of.readuntil()).decode().rstrip()


async def _end(process: Process | None) -> None:
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _conclude(work: _Work, answer: str | ServiceError) -> None:
    if work.done.done():
        return  # who asked has gone meanwhile
    if isinstance(answer, str):
        work.done.set_result(answer)
    else:
        work.done.set_exception(answer)
