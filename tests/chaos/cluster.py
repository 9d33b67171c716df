"""Owns a Redis Cluster of three primaries without replicas: three Valkeys on this machine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis
from user_service_server.embedded import EmbeddedValkey

from ..servers import free_port

PRIMARIES = 3
SLOTS = 16384
FORMED_WITHIN = 20.0


class Primary(EmbeddedValkey):
    """A Valkey that is one of a cluster; it keeps its data, and its place, over a restart."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir, persist=True)
        self.port = free_port()
        self.bus_port = free_port()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        return [
            *super()._command(),
            *("--port", str(self.port), "--bind", "127.0.0.1"),
            *("--cluster-enabled", "yes", "--cluster-port", str(self.bus_port)),
            *("--cluster-node-timeout", "1000"),
            # The slots of the others go on without it.
            *("--cluster-require-full-coverage", "no"),
        ]

    def command(self, *words: object) -> Any:
        """Run a command on this one."""
        with redis.Redis.from_url(self.url) as connection:
            return connection.execute_command(*words)

    def forget_data(self) -> None:
        """Delete what a restart would load, of a primary that is not running."""
        shutil.rmtree(self.data_dir / "appendonlydir")

    @property
    def sees_all(self) -> bool:
        """Whether it finds every slot served."""
        info = self.command("CLUSTER", "INFO").split()
        return {b"cluster_state:ok", b"cluster_slots_ok:%d" % SLOTS} <= set(info)


def slots_of(number: int) -> range:
    """The slots of one of the primaries."""
    return range(SLOTS * number // PRIMARIES, SLOTS * (number + 1) // PRIMARIES)


@contextmanager
def cluster(directory: Path) -> Iterator[list[Primary]]:
    """Start primaries, and let them share the slots."""
    primaries = [Primary(directory / f"primary{number}") for number in range(PRIMARIES)]
    with ExitStack() as stack:
        for primary in primaries:
            stack.enter_context(primary)
        first = primaries[0]
        for number, primary in enumerate(primaries):
            slots = slots_of(number)
            primary.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            primary.command("CLUSTER", "ADDSLOTSRANGE", slots[0], slots[-1])
            if primary is not first:
                primary.command("CLUSTER", "MEET", "127.0.0.1", first.port, first.bus_port)
        wait_until_whole(primaries)
        yield primaries


def wait_until_whole(primaries: list[Primary]) -> None:
    """Return when each primary finds every slot served."""
    deadline = time.monotonic() + FORMED_WITHIN
    while not all(primary.sees_all for primary in primaries):
        assert time.monotonic() < deadline, "the cluster was not formed"
        time.sleep(0.05)


def move_slot(slot: int, source: Primary, target: Primary, pause: float = 0.0) -> int:
    """Move a slot with its keys as `redis-cli --cluster reshard` does; returns how many there were.

    Both answer for the slot meanwhile, for `pause` seconds more: the one for the keys that it still
    has, the other for those whom the one sends there.
    """
    with (
        redis.Redis.from_url(source.url) as giver,
        redis.Redis.from_url(target.url) as taker,
    ):
        ids = [connection.execute_command("CLUSTER", "MYID") for connection in (giver, taker)]
        taker.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
        giver.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
        moved = 0
        while True:
            keys = giver.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10)
            if not keys:
                break
            to = ("127.0.0.1", target.port, "", 0, 5000)
            giver.execute_command("MIGRATE", *to, "KEYS", *keys)
            moved += len(keys)
            time.sleep(pause)
        for connection in (taker, giver):
            connection.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
    return moved
