"""Owns the load of the tests: callers that note every answer they got, and how long it took."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from types import TracebackType
from typing import Literal, Self

import httpx

from ..servers import Server

Work = Literal["read", "write", "control"]

READERS = 4
WRITERS = 2
PAUSE = 0.02
"""Seconds a caller waits between two requests: the machine is to have time left for the server."""
TIMEOUT = 20.0
AROUND = 0.25
"""Seconds: a machine that is busy now was busy just before."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request and what became of it. Times are seconds of `time.monotonic`."""

    work: Work
    began: float
    ended: float
    status: int
    """0 where no answer came."""
    code: str | None
    """The code of an error, or the class of the exception."""
    retry_after: str | None
    behind: int = 0
    """How many versions a read was older than what had been acknowledged before it began."""

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Traffic:
    """Readers and writers of the users they are given, from `async with` to its end.

    Beside them a control asks for `control`, which does not need what gets into trouble: what a
    busy machine takes, it takes from the control, too.
    """

    def __init__(
        self, url: str, *, read: Sequence[str], write: Sequence[str], control: str = "/health/live"
    ) -> None:
        self._control_path = control
        self.answers: list[Answer] = []
        self.acknowledged: dict[str, int] = {}
        self._read = cycle(read)
        self._write = cycle(write)
        self._http = httpx.AsyncClient(
            base_url=url, timeout=TIMEOUT, limits=httpx.Limits(max_connections=None)
        )
        self._end = asyncio.Event()
        self._callers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        callers = [self._control(), *(self._reads() for _ in range(READERS))]
        callers += [self._writes(number) for number in range(WRITERS)]
        self._callers = [asyncio.create_task(caller) for caller in callers]
        return self

    async def __aexit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        await asyncio.gather(*self._callers)
        await self._http.aclose()

    async def go_on(self, seconds: float) -> tuple[float, float]:
        """Let the callers call for this long; returns when that began and ended."""
        began = time.monotonic()
        await asyncio.sleep(seconds)
        return began, time.monotonic()

    def of(self, work: Work, phase: tuple[float, float]) -> list[Answer]:
        """Return the answers to what was asked between two times."""
        since, until = phase
        return [a for a in self.answers if a.work == work and since <= a.began < until]

    def own_seconds(self, answer: Answer) -> float:
        """How much longer an answer took than the slowest control around that time."""
        controls = (
            control.seconds
            for control in self.answers
            if control.work == "control"
            and control.began < answer.ended + AROUND
            and answer.began - AROUND < control.ended
        )
        return answer.seconds - max(controls, default=0.0)

    async def _control(self) -> None:
        while not self._end.is_set():
            self.answers.append(await self._ask("control", "GET", self._control_path))
            await asyncio.sleep(PAUSE / 2)

    async def _reads(self) -> None:
        while not self._end.is_set():
            user = next(self._read)
            self.answers.append(
                await self._ask(
                    "read", "GET", f"/api/v1/users/{user}", known=self.acknowledged.get(user, 0)
                )
            )
            await asyncio.sleep(PAUSE)

    async def _writes(self, writer: int) -> None:
        for name in self._names(writer):
            user = next(self._write)
            self.answers.append(
                await self._ask("write", "PATCH", f"/api/v1/users/{user}", body={"name": name})
            )
            await asyncio.sleep(PAUSE)

    def _names(self, writer: int) -> Iterator[str]:
        number = 0
        while not self._end.is_set():
            number += 1
            yield f"Name {writer} {number}"

    async def _ask(
        self,
        work: Work,
        method: str,
        path: str,
        *,
        body: dict[str, str] | None = None,
        known: int = 0,
    ) -> Answer:
        began = time.monotonic()
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            return Answer(work, began, time.monotonic(), 0, type(error).__name__, None)
        ended = time.monotonic()
        answer = response.json()
        behind = 0
        if response.status_code == 200 and work != "control":
            user = answer["data"]
            behind = known - user["version"]
            if work == "write":
                seen = self.acknowledged.get(user["id"], 0)
                self.acknowledged[user["id"]] = max(seen, user["version"])
        return Answer(
            work,
            began,
            ended,
            response.status_code,
            (answer["error"] or {}).get("code"),
            response.headers.get("Retry-After"),
            max(behind, 0),
        )


async def register(url: str, count: int, *, prefix: str = "user") -> list[str]:
    """Register people and return their ids."""
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as http:
        answers = await asyncio.gather(
            *(http.post("/api/v1/users/", json=person(f"{prefix}{n}")) for n in range(count))
        )
    return [str(answer.raise_for_status().json()["data"]["id"]) for answer in answers]


def person(name: str) -> dict[str, object]:
    """Return a registration."""
    # Of this call alone: a test that runs once more registers its people once more.
    email = f"{name}.{secrets.token_hex(4)}@example.com"
    return {"name": name, "email": email, "password": "StrongPass123!"}


async def ask(
    server: Server,
    method: str,
    path: str,
    body: object = None,
    headers: Mapping[str, str] | None = None,
) -> httpx.Response:
    """Send one request on a connection of its own.

    Not through httpx: 500 requests in one pool cost its process seconds, which then look like the
    server's.
    """
    content = b"" if body is None else json.dumps(body).encode()
    shown = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{shown}"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        async with asyncio.timeout(60):
            head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
        await writer.wait_closed()
    first, *lines = head.split(b"\r\n")
    told = [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]
    return httpx.Response(int(first.split()[1]), headers=told, content=answer)
