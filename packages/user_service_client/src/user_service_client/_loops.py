"""Which event loop and process a client lives in: connections and tasks cannot be taken along.

A worker that was forked, or a task queue that runs every task in a loop of its own, uses the same
client object: what belongs to the loop or process before is let go, and made anew.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

_forks = 0


def _count_fork() -> None:
    global _forks  # noqa: PLW0603 - there is one process
    _forks += 1


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_count_fork)


class Home:
    """The event loop that a client was last used in."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = _forks
        self._let_go: list[Callable[[], None]] = []
        self._arrive: list[Callable[[], None]] = []

    def on_move(self, let_go: Callable[[], None]) -> None:
        """Call `let_go` when the client has come to another loop: the one before is over."""
        self._let_go.append(let_go)

    def on_arrival(self, arrive: Callable[[], None]) -> None:
        """Call `arrive` in every loop that the client comes to, the first one, too."""
        self._arrive.append(arrive)

    def enter(self) -> None:
        """Say that the client is used in the running loop.

        Raises:
            RuntimeError: the loop it was used in before is running, too, in another thread.
        """
        if self.come():
            for arrive in self._arrive:
                arrive()

    def come(self) -> bool:
        """Let go of what belongs to another loop, and tell whether the running one is new.

        Raises:
            RuntimeError: as `enter`.
        """
        loop = asyncio.get_running_loop()
        if loop is self._loop and self._forks == _forks:
            return False
        if self._loop is not None:
            # Of a fork's parent, the child has a copy that looks as if it were running.
            if self._forks == _forks and self._loop.is_running():
                raise RuntimeError(
                    "this UserServiceClient is in use in the event loop of another thread:"
                    " make one client for each"
                )
            for let_go in self._let_go:
                let_go()
        self._loop, self._forks = loop, _forks
        return True

    def leave(self) -> None:
        """Say that the client was closed: it may come to any loop next."""
        self._loop = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop that the client was last used in, if that was in this process."""
        return self._loop if self._forks == _forks else None
