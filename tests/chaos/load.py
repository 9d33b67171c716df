"""Owns the load on two servers: writers and readers of the same users, and what they are answered.

HTTP is spoken here by hand: httpx takes more CPU for a request than the server does.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from .history import GONE, NEVER, History, Move, Read, Write

USERS = 50
WRITERS = 8
READERS = 16
WRITE_PAUSE = 0.03
READ_PAUSE = 0.012
"""Seconds between two requests of one caller: the machine is shared with the servers."""
TIMEOUT = 20.0
GONE_BEFORE = 20
"""How many of the users who were deleted last are still asked for."""
TOKENS = 6
"""Device tokens of each writer, which it moves from user to user."""
BATCH = 8
PAST_THE_CACHE = {"X-Min-Version": str(10**9)}
"""Asks for what is in Postgres: it tells what the cached copies should be, too."""


class Answer(NamedTuple):
    """An HTTP answer, and when it was asked for and read."""

    began: float
    ended: float
    status: int
    etag: str
    body: bytes

    @property
    def version(self) -> int:
        """The version that the entity tag names."""
        return int(self.etag.strip('"').rpartition(".")[2])


class Connection:
    """A connection to a server, made when it is needed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writer: asyncio.StreamWriter | None = None
        self._reader = asyncio.StreamReader()

    async def ask(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request and return its answer.

        Raises:
            OSError, EOFError, TimeoutError: there was none.
        """
        encoded = msgspec.json.encode(body) if body is not None else b""
        lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(encoded)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if encoded:
            lines.append("Content-Type: application/json")
        began = time.monotonic()
        try:
            async with asyncio.timeout(TIMEOUT):
                if self._writer is None:
                    self._reader, self._writer = await asyncio.open_connection(
                        "127.0.0.1", self._port
                    )
                self._writer.write("\r\n".join([*lines, "", ""]).encode() + encoded)
                head = await self._reader.readuntil(b"\r\n\r\n")
                status, fields = _parse(head)
                length = 0 if status == 304 else int(fields["content-length"])
                content = await self._reader.readexactly(length)
        except BaseException:
            self.close()
            raise
        return Answer(began, time.monotonic(), status, fields.get("etag", ""), content)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _parse(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode().split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


class _Device(msgspec.Struct):
    token: str


class _User(msgspec.Struct):
    id: str
    version: int
    devices: list[_Device] = []


class _Found(msgspec.Struct):
    data: msgspec.Raw


class _Batch(msgspec.Struct):
    users: list[msgspec.Raw]
    missing: list[str]


_found = msgspec.json.Decoder(_Found)
_batch = msgspec.json.Decoder(_Batch)
_user = msgspec.json.Decoder(_User)
_NO_ANSWER = (OSError, EOFError, TimeoutError)


@dataclass
class Place:
    """One of the people: whoever is registered under this email at the time."""

    email: str
    user: str = ""


@dataclass
class Load:
    """Writers and readers on the servers at `ports`, from `async with` to its end.

    Attributes:
        history: what they were answered.
        refused: how often which status was answered that is no answer of the matter; 0 for none.
    """

    ports: Sequence[int]
    users: int = USERS
    seed: int = 1
    history: History = field(default_factory=History)
    refused: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        # Nothing of another load is met, whose history is not known here.
        self.name = secrets.token_hex(4)
        self._places = [Place(f"{self.name}.{n}@example.com") for n in range(self.users)]
        # Some are asked for and written much more often than others, as people are.
        self._weights = list(itertools.accumulate(1 / (n + 3) for n in range(self.users)))
        self._gone: deque[str] = deque(maxlen=GONE_BEFORE)
        self._end = asyncio.Event()
        self._callers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        register = _Writer(self, 0)
        for place in self._places:
            await register.register(place)
        register.close()
        callers: list[_Caller] = [_Writer(self, number) for number in range(WRITERS)]
        callers += [_Reader(self, WRITERS + number) for number in range(READERS)]
        self._callers = [asyncio.create_task(caller.run(self._end)) for caller in callers]
        return self

    async def __aexit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        await asyncio.gather(*self._callers)

    async def go_on(self, seconds: float) -> None:
        """Let the callers call for this long; fails at once with a caller that fails."""
        done, _ = await asyncio.wait(
            self._callers, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION
        )
        for caller in done:
            caller.result()

    @property
    def has_deleted(self) -> bool:
        """Whether somebody was deleted already, and asked for since."""
        return any(read.version == GONE for read in self.history.reads)

    def place(self, choice: random.Random) -> Place:
        (place,) = choice.choices(self._places, cum_weights=self._weights)
        return place

    def person(self, choice: random.Random) -> str:
        """Return somebody to ask for, sometimes one who was deleted."""
        if self._gone and choice.random() < 0.1:
            return choice.choice(self._gone)
        return self.place(choice).user

    def left(self, user: str) -> None:
        """Note that a user was deleted."""
        self._gone.append(user)

    async def at_rest(self) -> list[str]:
        """Return how the servers' answers differ from what is in Postgres, when nobody writes."""
        different = []
        everybody = [place.user for place in self._places] + list(self._gone)
        for port in self.ports:
            connection = Connection(port)
            for user in everybody:
                path = f"/api/v1/users/{user}"
                usual = await connection.ask("GET", path)
                stored = await connection.ask("GET", path, headers=PAST_THE_CACHE)
                if (usual.status, usual.etag) != (stored.status, stored.etag):
                    different.append(f"{user}: {usual.etag} instead of {stored.etag}")
            connection.close()
        return different


class _Caller:
    """One of those who call: with a connection to each server, and choices of its own."""

    pause: float

    def __init__(self, load: Load, number: int) -> None:
        self.load = load
        self.number = number
        self.choice = random.Random(load.seed * 1000 + number)  # noqa: S311 - to be repeatable
        self._connections = [Connection(port) for port in load.ports]
        self._etags: dict[str, str] = {}

    async def run(self, end: asyncio.Event) -> None:
        while not end.is_set():
            with suppress(*_NO_ANSWER):
                await self.call(self.choice.randrange(len(self._connections)))
            await asyncio.sleep(self.pause * self.choice.uniform(0.5, 1.5))
        self.close()

    async def call(self, server: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    async def ask(
        self,
        server: int,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        try:
            answer = await self._connections[server].ask(
                method, f"/api/v1/users/{path}", body, headers
            )
        except _NO_ANSWER:
            self.load.refused[0] += 1
            raise
        if answer.status >= 500 or answer.status in (400, 412, 422, 429):
            self.load.refused[answer.status] += 1
        return answer

    async def read(self, server: int, user: str, at_least: int = 0) -> None:
        """Read a user, or its preferences, mostly as one who has a copy."""
        headers = {"X-Min-Version": str(at_least)} if at_least else {}
        if self.choice.random() < 0.05:
            headers = PAST_THE_CACHE
        if user in self._etags and self.choice.random() < 0.6:
            headers = {**headers, "If-None-Match": self._etags[user]}
        whole = self.choice.random() < 0.7
        path = user if whole else f"{user}/preferences"
        answer = await self.ask(server, "GET", path, headers=headers)
        if answer.status == 404:
            self.saw(answer, server, user, GONE, at_least=at_least)
        elif answer.status == 304:
            assert answer.etag == headers["If-None-Match"]
            self.saw(answer, server, user, answer.version, at_least=at_least)
        elif answer.status == 200:
            self._etags[user] = answer.etag
            document = _found.decode(answer.body).data if whole else None
            self.saw(answer, server, user, answer.version, document=document, at_least=at_least)

    def saw(
        self,
        answer: Answer,
        server: int,
        user: str,
        version: int,
        *,
        document: msgspec.Raw | None = None,
        at_least: int = 0,
    ) -> None:
        """Note what an answer showed of a user."""
        content: int | None = None
        tokens: tuple[str, ...] = ()
        if document is not None:
            shown = _user.decode(document)
            assert (shown.id, shown.version) == (user, version)
            content = hash(bytes(document))
            tokens = tuple(device.token for device in shown.devices)
        self.load.history.reads.append(
            Read(user, server, answer.began, answer.ended, version, content, tokens, at_least)
        )


class _Reader(_Caller):
    """Reads people, one by one and in batches."""

    pause = READ_PAUSE

    async def call(self, server: int) -> None:
        if self.choice.random() < 0.08:
            await self._read_many(server)
        else:
            await self.read(server, self.load.person(self.choice))

    async def _read_many(self, server: int) -> None:
        ids = list({self.load.person(self.choice) for _ in range(BATCH)})
        answer = await self.ask(server, "POST", "batch", {"ids": ids})
        if answer.status != 200:
            return
        batch = _batch.decode(_found.decode(answer.body).data)
        for document in batch.users:
            shown = _user.decode(document)
            self.saw(answer, server, shown.id, shown.version, document=document)
        for user in batch.missing:
            self.saw(answer, server, user, GONE)


class _Writer(_Caller):
    """Changes people, and reads what it has changed on both servers at once."""

    pause = WRITE_PAUSE

    def __init__(self, load: Load, number: int) -> None:
        super().__init__(load, number)
        self._tokens = [f"{load.name} {number} {n}" for n in range(TOKENS)]
        self._devices: dict[str, tuple[str, str]] = {}
        self._numbers = itertools.count()

    async def call(self, server: int) -> None:
        place = self.load.place(self.choice)
        user = place.user
        writes = [self._rename, self._choose, self._give_token, self._change_device, self._replace]
        (write,) = self.choice.choices(writes, [35, 25, 25, 10, 5])
        version = await write(server, place)
        if version and self.choice.random() < 0.5:
            at_least = version if version < GONE and self.choice.random() < 0.1 else 0
            for reading in (server, 1 - server, 1 - server):
                await self.read(reading, user, at_least)

    async def register(self, place: Place) -> None:
        """Register who is to have this email; the one who has it already is taken as it is."""
        person = {"name": f"Person {next(self._numbers)}", "email": place.email}
        answer = await self.ask(0, "POST", "", person)
        if answer.status == 201:
            user = _user.decode(_found.decode(answer.body).data).id
            self._acknowledge(answer, 0, user, 1)
            place.user = user
        elif answer.status == 409:
            answer = await self.ask(0, "POST", "lookup", {"email": place.email})
            found = msgspec.json.decode(answer.body)["data"]["users"]
            place.user = found[0]["id"] if found else place.user

    async def _rename(self, server: int, place: Place) -> int:
        user = place.user
        name = f"Name {self.number} {next(self._numbers)}"
        answer = await self.ask(server, "PATCH", user, {"name": name})
        return await self._conclude(answer, server, place, user, whole=True)

    async def _choose(self, server: int, place: Place) -> int:
        user = place.user
        chosen: dict[str, object] = {
            "push": self.choice.random() < 0.5,
            "categories": {f"category{self.choice.randrange(5)}": {"email": False}},
        }
        answer = await self.ask(server, "PATCH", f"{user}/preferences", chosen)
        return await self._conclude(answer, server, place, user)

    async def _give_token(self, server: int, place: Place) -> int:
        user = place.user
        token = self.choice.choice(self._tokens)
        began, ended = time.monotonic(), NEVER
        self._devices.pop(token, None)
        try:
            answer = await self.ask(
                server, "POST", f"{user}/devices", {"token": token, "platform": "ios"}
            )
            if answer.status in (200, 201):
                ended = answer.ended
                device = msgspec.json.decode(answer.body)["data"]["id"]
                self._devices[token] = (user, device)
        finally:
            self.load.history.moves.append(Move(token, user, server, began, ended))
        return await self._conclude(answer, server, place, user)

    async def _change_device(self, server: int, _place: Place) -> int:
        if not self._devices:
            return 0
        token = self.choice.choice(list(self._devices))
        user, device = self._devices[token]
        path = f"{user}/devices/{device}"
        if self.choice.random() < 0.5:
            del self._devices[token]
            answer = await self.ask(server, "DELETE", path)
        else:
            active = self.choice.random() < 0.5
            answer = await self.ask(server, "PATCH", path, {"active": active})
        if answer.status == 200:
            self._acknowledge(answer, server, user, answer.version)
        return 0

    async def _replace(self, server: int, place: Place) -> int:
        """Delete somebody, and register them anew."""
        user = place.user
        began, ended = time.monotonic(), NEVER
        try:
            answer = await self.ask(server, "DELETE", user)
            if answer.status == 200:
                ended = answer.ended
        finally:
            self.load.history.writes.append(Write(user, server, began, ended, GONE))
        self.load.left(user)
        for reading in (server, 1 - server):
            await self.read(reading, user)
        await self._fill(place, user)
        return GONE

    async def _conclude(
        self, answer: Answer, server: int, place: Place, user: str, *, whole: bool = False
    ) -> int:
        """Note what was acknowledged; returns the version, 0 for none."""
        if answer.status == 404:
            await self._fill(place, user)
            return 0
        if answer.status not in (200, 201):
            return 0
        content = hash(bytes(_found.decode(answer.body).data)) if whole else None
        self._acknowledge(answer, server, user, answer.version, content)
        return answer.version

    async def _fill(self, place: Place, gone: str) -> None:
        """Register somebody new where one was deleted, unless another writer has done so."""
        if place.user == gone:
            await self.register(place)

    def _acknowledge(
        self, answer: Answer, server: int, user: str, version: int, content: int | None = None
    ) -> None:
        self.load.history.writes.append(
            Write(user, server, answer.began, answer.ended, version, content)
        )
