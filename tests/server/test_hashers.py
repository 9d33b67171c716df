"""The processes that hash: who goes first, who takes turns, and what dies with whom."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest
from argon2 import PasswordHasher
from user_service_server.credentials.hashers import Hashers
from user_service_server.errors import Overloaded

from ..servers import Server
from ..system.trouble import until
from .test_users import PASSWORD

CHEAP = (1, 8)
SLOW = (20, 19456)
"""A fifth of a second."""
HASH = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)


def may_advise() -> bool:
    """Whether huge pages are given to who asks for them, and glibc is there, which asks."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    is_asked = setting.exists() and "[madvise]" in setting.read_text()
    libc, version = platform.libc_ver()
    return is_asked and libc == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)


@pytest.fixture
async def hashers() -> AsyncIterator[Hashers]:
    """One process, which many wait for."""
    hashers = Hashers(1, 50, CHEAP)
    hashers.start()
    yield hashers
    await hashers.close()


def processes(parent: int | None = None) -> list[psutil.Process]:
    """Return the processes that hash for another one, this by default."""
    found = psutil.Process(parent).children()
    return [one for one in found if any("credentials.hasher" in part for part in one.cmdline())]


async def test_hashes_are_made_and_compared(hashers: Hashers) -> None:
    """What is no hash, and a line break in a password, are nobody's password."""
    made = await hashers.make(PASSWORD)
    assert made.startswith("$argon2id$v=19$m=8,t=1,p=1$")
    assert await hashers.compare(PASSWORD, made)
    for wrong in ("", f"{PASSWORD}\n", f'{PASSWORD}", "', "\U0001f511" * 256):
        assert not await hashers.compare(wrong, made)
    assert not await hashers.compare(PASSWORD, "no hash")
    strange = "\n\x00\u2028\U0001f511"
    assert await hashers.compare(strange, await hashers.make(strange))
    assert hashers.waiting == 0


async def test_a_hash_works_in_huge_pages() -> None:
    hashers = Hashers(1, 50, (2, 19456))
    hashers.start()
    try:
        for _ in range(2):
            await hashers.make(PASSWORD)
        (process,) = processes()
        # Where the system asks nobody, or malloc cannot be told, it says nothing.
        assert asks_for_huge_pages(process) == may_advise()
    finally:
        await hashers.close()


def asks_for_huge_pages(process: psutil.Process) -> bool:
    """Whether a process has said so of some of its memory, by madvise(2)."""
    mappings = Path(f"/proc/{process.pid}/smaps").read_text()
    return re.search(r"^VmFlags:.*\bhg\b", mappings, re.MULTILINE) is not None


async def test_a_process_is_there_when_it_is_needed_and_lets_others_go_first(
    hashers: Hashers,
) -> None:
    assert processes() == []
    await hashers.make(PASSWORD)
    (process,) = processes()
    assert process.nice() == psutil.Process().nice() + 10
    assert os.sched_getscheduler(process.pid) != os.SCHED_IDLE, "they have their turn in the end"
    await hashers.close()
    assert processes() == []


async def test_what_is_made_and_what_is_compared_take_turns(hashers: Hashers) -> None:
    """Fifty that wait to be compared do not keep one from being made, nor from waiting for it."""
    done: list[str] = []

    async def compare() -> None:
        await hashers.compare(PASSWORD, HASH)
        done.append("compared")

    async def make() -> None:
        await hashers.make(PASSWORD)
        done.append("made")

    crowd = [asyncio.create_task(compare()) for _ in range(51)]
    await asyncio.sleep(0)
    assert hashers.waiting == 51
    with pytest.raises(Overloaded):
        await hashers.compare(PASSWORD, HASH)
    await asyncio.gather(make(), *crowd)
    assert done.index("made") <= 2


async def test_for_those_who_gave_up_nothing_is_hashed() -> None:
    hashers = Hashers(1, 50, SLOW)
    hashers.start()
    first = asyncio.create_task(hashers.make(PASSWORD))
    hasty = [asyncio.create_task(hashers.make(PASSWORD)) for _ in range(40)]
    await asyncio.sleep(0.05)
    for task in hasty:
        task.cancel()
    await first
    async with asyncio.timeout(4):
        await hashers.make(PASSWORD)
    await hashers.close()


async def test_who_gives_up_in_the_middle_gets_no_others_answer(hashers: Hashers) -> None:
    made = await hashers.make(PASSWORD)
    for _ in range(20):
        given_up = asyncio.create_task(hashers.compare(PASSWORD, made))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        given_up.cancel()
        assert not await hashers.compare("Wrong-Password-1", made)


async def test_of_a_process_that_dies_one_is_told_to_come_again() -> None:
    hashers = Hashers(1, 50, SLOW)
    hashers.start()
    asked = [asyncio.create_task(hashers.make(PASSWORD)) for _ in range(2)]
    await until(lambda: processes() != [], 5)
    processes()[0].kill()
    told = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(one) for one in told] == [Overloaded, str]
    assert hashers.waiting == 0
    await hashers.close()


async def test_of_an_idle_process_that_dies_nobody_is_told(hashers: Hashers) -> None:
    await hashers.make(PASSWORD)
    (process,) = processes()
    process.kill()
    await until(lambda: not process.is_running(), 5)
    await asyncio.sleep(0.05)  # the loop hears of it, too
    assert await hashers.compare(PASSWORD, HASH)


async def test_what_waits_when_the_service_ends_is_dropped() -> None:
    hashers = Hashers(1, 50, SLOW)
    hashers.start()
    waiting = [asyncio.create_task(hashers.make(PASSWORD)) for _ in range(3)]
    await until(lambda: processes() != [], 5)
    async with asyncio.timeout(5):
        await hashers.close()
        await asyncio.wait(waiting)
    assert all(task.cancelled() for task in waiting)
    assert processes() == []


async def test_they_end_with_the_service_and_not_before_it(server: Server) -> None:
    """Ctrl-C reaches them, too, and requests are still served then."""
    body = {"email": "nobody@example.com", "password": PASSWORD}
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as http:

        async def verify() -> int:
            return (await http.post("/api/v1/credentials/verify", json=body)).status_code

        assert await verify() == 401
        assert server.process is not None
        (process, *_) = processes(server.process.pid)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process.pid, number)
        assert await verify() == 401
        assert process.is_running()
        found = processes(server.process.pid)
        for process in found:
            process.kill()
        told = [await verify() for _ in range(4)]
        assert told[-2:] == [401, 401], told
        found = processes(server.process.pid)
    server.kill()
    await until(lambda: not any(one.is_running() for one in found), 5)
    server.start()
