"""Owns a service of two servers in memory, of which one lags, that knows all it has ever said.

Nothing happens by itself: requests are answered, answers arrive and events are sent when a test
says so. What was true when is kept, to judge by it what a client returns.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import httpx
import msgspec
from user_service_client.testing import VirtualClock

from .conftest import USER

LAG = 1.0
"""Seconds by which the second server is behind the first, at most."""
STREAM = "/api/v1/changes/stream"


class Fact(NamedTuple):
    """What was true of a user from some time on. Facts are numbered over all users and epochs."""

    number: int
    user: str
    epoch: str
    version: int
    at: float
    is_gone: bool


@dataclass
class Pending:
    """A request: first it waits to be answered, then the answer waits to arrive."""

    request: httpx.Request
    at: float
    answer: httpx.Response | None = None
    arrived: asyncio.Future[httpx.Response] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Stream(httpx.AsyncByteStream):
    """The change stream as one client reads it; `position` is what of the log comes next."""

    def __init__(self, replicas: Replicas, position: int) -> None:
        self._replicas = replicas
        self.position = position
        self.chunks: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (chunk := await self.chunks.get()) is not None:
            yield chunk
        raise httpx.ReadError("The stream was cut")

    async def aclose(self) -> None:
        if self._replicas.stream is self:
            self._replicas.stream = None


class Replicas(httpx.AsyncBaseTransport):
    """Two servers, their users and the log of changes."""

    def __init__(self, clock: VirtualClock, users: list[str]) -> None:
        self.clock = clock
        self.epoch = "e0"
        self.facts: list[Fact] = []
        self.now: dict[str, Fact | None] = dict.fromkeys(users)
        """What is true; None of who was never there."""
        self.log: list[Fact] = []
        self.pruned = 0
        self.seen_by_second = 0
        self.pending: list[Pending] = []
        self.stream: Stream | None = None
        self.is_down = False
        self._written: dict[str, httpx.Response] = {}

    # What is true

    def commit(self, user: str, *, erase: bool = False) -> Fact | None:
        """Create, change or erase a user; who was erased stays so."""
        now = self.now[user]
        if now is not None and now.is_gone:
            return None
        version = 1 if now is None else now.version + 1
        fact = self._note(user, version, is_gone=erase and now is not None)
        self.log.append(fact)
        return fact

    def renew(self, lost: int) -> None:
        """Begin another epoch, in which the last versions have not happened."""
        self.epoch = f"e{len({fact.epoch for fact in self.facts}) + 1}"
        for user, now in self.now.items():
            if now is not None and not now.is_gone:
                self._note(user, max(1, now.version - lost), is_gone=False)
            elif now is not None:
                self._note(user, now.version, is_gone=True)
        self.log = []
        self.pruned = self.seen_by_second = 0
        self.cut()

    def _note(self, user: str, version: int, *, is_gone: bool) -> Fact:
        fact = Fact(len(self.facts), user, self.epoch, version, self.clock.monotonic(), is_gone)
        self.facts.append(fact)
        self.now[user] = fact
        return fact

    def ended_at(self, user: str, fact: Fact | None) -> float:
        """Return when a fact (None: that there is nobody) ceased to be true."""
        number = -1 if fact is None else fact.number
        later = (f for f in self.facts if f.user == user and f.number > number)
        return next((f.at for f in later), math.inf)

    def fact(self, user: str, epoch: str, version: int) -> Fact:
        """Return what a document tells, as it was last committed."""
        return next(
            f
            for f in reversed(self.facts)
            if (f.user, f.epoch, f.version, f.is_gone) == (user, epoch, version, False)
        )

    def time_has_passed(self) -> None:
        """Let the second server see what it has to by now."""
        while (
            self.seen_by_second < len(self.log)
            and self.log[self.seen_by_second].at <= self.clock.monotonic() - LAG
        ):
            self.seen_by_second += 1

    def _seen(self, server: int, user: str) -> Fact | None:
        """Return what a server believes of a user."""
        now = self.now[user]
        unseen = [f for f in self.log[self.seen_by_second :] if f.user == user]
        if server == 0 or not unseen:
            return now
        before = [f for f in self.facts if f.user == user and f.number < unseen[0].number]
        return before[-1] if before else None

    # Requests

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        if self.is_down:
            raise httpx.ConnectError("Nobody is there")
        if request.url.path == STREAM:
            return self._open_stream(request)
        pending = Pending(request, self.clock.monotonic())
        self.pending.append(pending)
        return await pending.arrived

    def answer(self, pending: Pending, server: int) -> None:
        """Answer a request as a server sees things."""
        request, path = pending.request, pending.request.url.path.removesuffix("/")
        key = request.headers.get("Idempotency-Key")
        if path.endswith("/batch"):
            ids = msgspec.json.decode(request.content, type=dict[str, list[str]])["ids"]
            seen = [self._seen(server, user) for user in ids]
            users = [document(fact) for fact in seen if fact is not None and not fact.is_gone]
            headers = {"X-Document-Tag": f"{self.epoch}.f"}
            pending.answer = _success({"users": users, "missing": []}, headers)
        elif key is not None:
            user = path.rpartition("/")[2]
            if key not in self._written:
                fact = self.commit(user, erase=request.method == "DELETE")
                self._written[key] = self._shown(fact, is_write=True)
            pending.answer = self._written[key]
        else:
            user = path.rpartition("/")[2]
            fact = self._seen(server, user)
            if int(request.headers.get("X-Min-Version", "0")) > (fact.version if fact else 0):
                fact = self.now[user]
            shown = self._shown(fact)
            held = request.headers.get("If-None-Match")
            if held is not None and held == shown.headers.get("ETag"):
                shown = httpx.Response(304, headers={"ETag": held})
            pending.answer = shown

    def deliver(self, pending: Pending) -> None:
        """Let an answer arrive."""
        self.pending.remove(pending)
        if not pending.arrived.done():
            assert pending.answer is not None
            pending.arrived.set_result(pending.answer)

    def drop(self, pending: Pending) -> None:
        """Break the connection that a request is on."""
        self.pending.remove(pending)
        if not pending.arrived.done():
            pending.arrived.set_exception(httpx.ReadError("The connection was cut"))

    def _shown(self, fact: Fact | None, *, is_write: bool = False) -> httpx.Response:
        if fact is None or (fact.is_gone and not is_write):
            error = {"code": "user_not_found", "details": [], "request_id": "r"}
            body = {"success": False, "data": None, "message": "No", "error": error}
            return httpx.Response(404, content=msgspec.json.encode(body))
        if fact.is_gone:
            return _success(None, {})
        return _success(document(fact), {"ETag": f'"{fact.epoch}.f.{fact.version}"'})

    # The stream

    def _open_stream(self, request: httpx.Request) -> httpx.Response:
        epoch, _, position = request.headers.get("Last-Event-ID", "").partition(".")
        end = len(self.log)
        stream = self.stream = Stream(self, int(position) if position else end)
        if not epoch:
            stream.chunks.put_nowait(self._event("ready", self._completeness(), end))
        elif epoch != self.epoch or stream.position < self.pruned:
            stream.position = end
            stream.chunks.put_nowait(self._event("reset", {"reason": "age"}, end))
        return httpx.Response(200, stream=stream)

    def send_events(self, count: int) -> list[Fact]:
        """Send the next changes; returns them."""
        stream = self.stream
        if stream is None:
            return []
        sent = self.log[stream.position : stream.position + count]
        for fact in sent:
            stream.position += 1
            change = {
                "position": f"{fact.epoch}.{stream.position}",
                "user_id": fact.user,
                "version": fact.version,
                "kind": "user.updated",
                "at": self.clock.now(),
                "actor": None,
            }
            stream.chunks.put_nowait(self._event("change", change, stream.position))
        return sent

    def send_heartbeat(self) -> None:
        """Say up to when the stream has told of all changes."""
        if self.stream is not None:
            self.stream.chunks.put_nowait(self._event("heartbeat", self._completeness(), None))

    def _completeness(self) -> dict[str, object]:
        now = self.clock.now()
        unsent = self.log[self.stream.position :] if self.stream is not None else []
        lag = self.clock.monotonic() - unsent[0].at if unsent else 0.0
        return {"through": now - timedelta(seconds=lag), "now": now}

    def cut(self) -> None:
        """Break the stream."""
        if self.stream is not None:
            self.stream.chunks.put_nowait(None)
            self.stream = None

    def _event(self, name: str, data: dict[str, object], position: int | None) -> bytes:
        lines = [b"event: %b" % name.encode(), b"data: %b" % msgspec.json.encode(data)]
        if position is not None:
            lines.append(b"id: %b.%d" % (self.epoch.encode(), position))
        return b"\n".join([*lines, b"", b""])


def document(fact: Fact) -> dict[str, object]:
    """Return the document of a user at a version; its name tells the epoch."""
    return USER | {"id": fact.user, "version": fact.version, "name": fact.epoch}


def _success(data: object, headers: dict[str, str]) -> httpx.Response:
    body = {"success": True, "data": data, "message": "Done", "error": None}
    return httpx.Response(200, headers=headers, content=msgspec.json.encode(body))
