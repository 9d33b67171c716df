"""Owns the troubles that engines get into, each with its end; the tests' own loop goes on."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from user_service_server.embedded import EmbeddedPostgres, EmbeddedValkey

Engine = EmbeddedPostgres | EmbeddedValkey

bounded_in_time = pytest.mark.flaky(reruns=2)
"""For a test that bounds single latencies: a shared machine stalls for longer than that now and
then, and what is late three times in a row is not the machine."""


@asynccontextmanager
async def stopped(engine: Engine) -> AsyncIterator[None]:
    """End the engine in order, and start it again behind the block."""
    await asyncio.to_thread(engine.stop)
    try:
        yield
    finally:
        await asyncio.to_thread(engine.start)


@asynccontextmanager
async def killed(engine: Engine) -> AsyncIterator[None]:
    """Kill all the engine's processes, and start it again behind the block."""
    await asyncio.to_thread(engine.kill)
    try:
        yield
    finally:
        await asyncio.to_thread(engine.start)


@asynccontextmanager
async def paused(engine: Engine) -> AsyncIterator[None]:
    """Stop all the engine's processes without ending them; connections stay open."""
    processes = sorted(processes_below(engine.data_dir), key=lambda process: process.create_time())
    # The postmaster is the oldest: it is to start no other meanwhile.
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in reversed(processes):
            process.resume()


def processes_below(directory: Path) -> list[psutil.Process]:
    """Return the processes that work in `directory`: engines, and what was started there."""
    return [
        process
        for process in psutil.process_iter(["cwd"])
        if process.info["cwd"] is not None and Path(process.info["cwd"]).is_relative_to(directory)
    ]


def kill_all(*processes: int) -> None:
    """Kill processes as a power cut would: none sees another one end."""
    for number in processes:
        os.kill(number, signal.SIGSTOP)
    for number in processes:
        os.kill(number, signal.SIGKILL)


async def until(holds: Callable[[], bool | Awaitable[bool]], within: float) -> None:
    """Return when `holds` does; fails after `within` seconds.

    It looks again and again: what is waited for happens in other processes.
    """
    async with asyncio.timeout(within):
        while True:
            held = holds()
            if held if isinstance(held, bool) else await held:
                return
            await asyncio.sleep(0.02)
