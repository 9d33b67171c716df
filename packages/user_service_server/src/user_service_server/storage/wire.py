"""One connection to Redis that all calls share: commands go out at once, replies come in order.

A call of redis-py's own client costs 80 µs of CPU: a connection out of a pool, a stream to read
from, two tasks and three timeouts. One of this costs 15: hiredis packs and parses, and one timer
stands for all who wait. What makes a connection is redis-py's all the same: addresses, TLS,
passwords, databases.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, cast

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import BusyLoadingError, ReadOnlyError, RedisError, ResponseError

MGET_LIMIT = 1000
"""Strings of one command: of more, others would wait too long in the meantime."""
LATE = 0.02
"""Seconds after which a timer of the event loop has come late."""
EXTENSIONS = 2
"""How often a call is given its time anew when the event loop was busy."""
TURNS = 3
"""How many turns of the event loop an answer takes at most from the socket to who asked."""

Command = tuple[Any, ...]
"""A command that concerns one key, which is its second word, or of EVAL its fourth. (EVAL may have
several where `RedisLink.is_one`.)"""


class Unreachable(Enum):
    """The answer of a server that gives none."""

    UNREACHABLE = "unreachable"


UNREACHABLE: Final = Unreachable.UNREACHABLE


@dataclass(slots=True, eq=False)
class _Call:
    """Some commands whose replies are awaited."""

    future: asyncio.Future[list[Any]]
    count: int
    asked: float
    worked: float
    """What the thread had worked when it was `asked`."""
    strings: Sequence[int]
    """Of how many strings each of its replies consists, if that is what it asks for."""
    replies: list[Any] = field(default_factory=list)
    extensions: int = 0
    turns: int = 0

    def end(self, replies: list[Any]) -> None:
        if self.future.done():
            return
        if self.strings:
            replies = [
                string
                for found, number in zip(replies, self.strings, strict=True)
                for string in (found if isinstance(found, list) else [found] * number)
            ]
        self.future.set_result(replies)


class Wire(asyncio.Protocol):
    """A connection to one server. It is over after the first call that was not answered in time.

    `lost` is called once, when it is over, unless it was closed: with the reason, or with None
    where the server ended it and nobody was waiting.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        timeout: float,
        lost: Callable[[BaseException | None], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._lost = lost
        self._reader = hiredis.Reader(replyError=_refusal)
        self._calls: deque[_Call] = deque()
        self._unsent: list[bytes] = []
        self._timer: asyncio.Handle | None = None
        self._due = 0.0
        self._heard = 0.0
        self._worked = 0.0
        self._is_closed = False
        # What redis-py has connected and greeted is taken from it, with nothing left to read. Its
        # writer is kept, since that closes the transport with its own end.
        self._writer = cast("asyncio.StreamWriter", connection._writer)
        connection._reader = connection._writer = None
        self._transport = self._writer.transport
        self._transport.set_protocol(self)

    def call(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Send commands and return their replies: `UNREACHABLE` for all where one is not in time.

        What the server refuses is answered by its error.
        """
        return self._call(commands)

    def strings(self, keys: Sequence[str]) -> asyncio.Future[list[Any]]:
        """Return the strings under `keys`; None, or as `call`, for what is none."""
        some = [keys[at : at + MGET_LIMIT] for at in range(0, len(keys), MGET_LIMIT)]
        return self._call([("MGET", *each) for each in some], [len(each) for each in some])

    def _call(
        self, commands: Sequence[Command], strings: Sequence[int] = ()
    ) -> asyncio.Future[list[Any]]:
        if not self._unsent:
            # Once a turn of the event loop: on a busy machine the system takes 6 µs to tell.
            self._worked = time.thread_time()
        call = _Call(
            self._loop.create_future(), len(commands), self._loop.time(), self._worked, strings
        )
        if self._is_closed or not commands:
            call.end([UNREACHABLE] * len(commands))
            return call.future
        # First all of them: one that cannot be packed, a fault of ours, must not be half a call.
        packed = list(map(hiredis.pack_command, commands))
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent += packed
        self._calls.append(call)
        if self._timer is None:
            self._look_at(call.asked + self._timeout)
        return call.future

    def _send(self) -> None:
        """Send all that was called for in one turn of the event loop, by one call of the system.

        That costs more than all the rest of a call where it has to wake the server.
        """
        unsent, self._unsent = self._unsent, []
        if not self._transport.is_closing():
            self._transport.write(b"".join(unsent))

    def data_received(self, data: bytes) -> None:
        """Hand replies to those who wait for them."""
        self._heard = self._loop.time()
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:
                if isinstance(reply, _USELESS):
                    raise reply
                call = self._calls[0]
                call.replies.append(reply)
                if len(call.replies) == call.count:
                    self._calls.popleft().end(call.replies)
        except (RedisError, hiredis.HiredisError, LookupError, TypeError) as error:
            self._end(error)
            return
        if self._is_closed and not self._calls:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the connection is gone."""
        self._end(exc or ConnectionResetError() if self._calls else None)

    def close(self) -> None:
        """Take no more calls, and end when those under way are answered."""
        self._is_closed = True
        if not self._calls:
            self._transport.close()

    def _look_at(self, due: float) -> None:
        self._due = due
        self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        """Look whether the oldest call has had its time.

        A busy event loop is no fault of the server: where this came late, or the thread was at work
        most of the time, the time counts anew, as it does where something has arrived meanwhile;
        and what has arrived by then but was not looked at yet counts, too.
        """
        self._timer = None
        if not self._calls:
            return
        call, now = self._calls[0], self._loop.time()
        took = now - call.asked
        if took < self._timeout:
            self._look_at(call.asked + self._timeout)
            return
        worked = time.thread_time()
        is_busy = now >= self._due + LATE or worked - call.worked >= took / 2
        if (is_busy or self._heard > call.asked) and call.extensions < EXTENSIONS:
            call.extensions += 1
            call.asked, call.worked = now, worked
            self._look_at(now + self._timeout)
        elif call.turns < TURNS:
            call.turns += 1
            self._timer = self._loop.call_soon(self._look)
        else:
            self._end(TimeoutError())

    def _end(self, error: BaseException | None) -> None:
        was_closed, self._is_closed = self._is_closed, True
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        calls, self._calls = self._calls, deque()
        for call in calls:
            call.end([UNREACHABLE] * call.count)
        if not was_closed:
            self._lost(error)


# A server that still loads its data, and one that takes no writes any more: an address may lead to
# another one by now.
_USELESS = (BusyLoadingError, ReadOnlyError)


def _refusal(text: str) -> RedisError:
    """Return the error of a server's reply."""
    errors = {"LOADING": BusyLoadingError, "READONLY": ReadOnlyError}
    return errors.get(text.partition(" ")[0], ResponseError)(text)
