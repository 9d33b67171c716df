"""Programs that fork while they hold a client: `python -m tests.client.forking NAME URL`.

Each ends with 0 if parent and child have both read what they asked for.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable

from user_service_client import UserServiceClient

CALLS = 30


async def read(client: UserServiceClient, who: str) -> None:
    """Read users of whom nobody else reads; an answer to somebody else would be another's."""
    for number in range(CALLS):
        user = await client.users.get(f"{who}-{number}")
        assert user.id == f"{who}-{number}", user.id
    ids = [f"{who}-x{number}" for number in range(CALLS)]
    users = await asyncio.gather(*(client.users.get(user_id) for user_id in ids))
    assert [user.id for user in users] == ids


def in_child(work: Callable[[], None]) -> int:
    """Fork, do the work in the child, and return its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)  # noqa: T201
            raise
        finally:
            os._exit(code)
    return pid


def ended_well(*pids: int) -> None:
    for pid in pids:
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0


def prefork(url: str) -> None:
    """The loop has ended when the workers are forked."""
    client = UserServiceClient(url)
    asyncio.run(read(client, "before"))
    pids = [
        in_child(lambda: asyncio.run(read(client, "one"))),
        in_child(lambda: asyncio.run(read(client, "two"))),
    ]
    asyncio.run(read(client, "parent"))
    ended_well(*pids)
    asyncio.run(client.aclose())


async def closing(client: UserServiceClient, who: str) -> None:
    async with client:
        await read(client, who)


async def _fork_in_a_loop(url: str, *, live: bool) -> None:
    async with UserServiceClient(url, live=live) as client:
        await read(client, "before")
        under_way = asyncio.create_task(read(client, "during"))
        await asyncio.sleep(0.01)
        pids = [
            in_child(lambda: asyncio.run(read(client, "child"))),
            in_child(lambda: asyncio.run(closing(client, "closer"))),
            in_child(lambda: asyncio.run(client.aclose())),
            in_child(lambda: None),
        ]
        await under_way
        await read(client, "parent")
        await asyncio.to_thread(ended_well, *pids)
        await read(client, "after")


def fork_in_a_loop(url: str) -> None:
    """Calls of the parent are under way when the children are forked."""
    asyncio.run(_fork_in_a_loop(url, live=False))


def fork_while_live(url: str) -> None:
    """The parent follows the changes, and goes on with it."""
    asyncio.run(_fork_in_a_loop(url, live=True))


PROGRAMS = {program.__name__: program for program in (prefork, fork_in_a_loop, fork_while_live)}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](sys.argv[2])
