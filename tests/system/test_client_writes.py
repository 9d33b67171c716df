"""Writes through the client whose answer is lost or late happen once, on a real server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest
from user_service_client import (
    AttemptEvent,
    Hooks,
    MaybeProcessed,
    User,
    UserServiceClient,
    UserServiceError,
)

from ..servers import Server
from .subscribers import connected
from .trouble import until

PASSWORD = "StrongPass123!"


class Proxy:
    """Passes connections on to a server, and loses answers.

    Attributes:
        losses: What becomes of the next answers, one after the other: None, and it is passed on;
            a number, and so many bytes of it are before the connection is cut; "unread", and the
            connection is cut as soon as the request was passed on.
        hold: Seconds that the next answer is held back.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.losses: list[int | str | None] = []
        self.hold = 0.0
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        below_reader, below = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            while await self._exchange(reader, writer, below_reader, below):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()
            below.close()  # in order: what the server was sent, it has

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        below_reader: asyncio.StreamReader,
        below: asyncio.StreamWriter,
    ) -> bool:
        request = await _message(reader)
        self.requests.append(request)
        loss = self.losses.pop(0) if self.losses else None
        hold, self.hold = self.hold, 0.0
        below.write(request)
        await below.drain()
        if loss == "unread":
            writer.transport.abort()
        answer = await _message(below_reader)
        await asyncio.sleep(hold)
        writer.write(answer[:loss] if isinstance(loss, int) else answer)
        await writer.drain()
        return loss is None

    def keys(self) -> list[str]:
        """Return the `Idempotency-Key` of each write that was passed on."""
        found = (re.search(rb"(?i)\r\nidempotency-key: (.*?)\r\n", r) for r in self.requests)
        return [key[1].decode() for key in found if key is not None]


async def _message(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return head + await reader.readexactly(int(length[1]) if length else 0)


class Trial:
    """A client behind a proxy before a server."""

    def __init__(self, proxy: Proxy, url: str) -> None:
        self.proxy = proxy
        self.told: list[AttemptEvent] = []
        self.client = UserServiceClient(
            url,
            timeout=15,
            attempt_timeout=1,
            retries=5,
            hooks=Hooks(attempt=self.told.append),
        )
        self.email = f"{uuid4()}@example.com"

    async def create(self, *, idempotency_key: str | None = None) -> User:
        return await self.client.users.create(
            name="J", email=self.email, password=PASSWORD, idempotency_key=idempotency_key
        )

    async def is_there_once(self, user: User) -> bool:
        return await self.client.users.lookup(email=self.email) == (user,)

    @property
    def statuses(self) -> list[int | None]:
        return [event.status for event in self.told if event.operation == "users.create"]


@pytest.fixture
async def trial(server: Server) -> AsyncIterator[Trial]:
    proxy = Proxy(server.port)
    listening = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    try:
        trial = Trial(proxy, f"http://127.0.0.1:{port}")
        async with trial.client:
            yield trial
    finally:
        listening.close()


@asynccontextmanager
async def claimed(database_url: str, email: str) -> AsyncIterator[None]:
    """Let whoever registers with an address wait until the block is left, and then have it."""
    async with connected(database_url) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(
            "INSERT INTO users (id, name, email, email_key, version, created_at, updated_at)"
            " VALUES (gen_random_uuid(), 'Somebody', $1, $1, 1, now(), now())",
            email,
        )
        try:
            yield
        finally:
            await transaction.rollback()


LOST: dict[str, list[int | str | None]] = {
    "before-the-answer": [0],
    "with-the-request": ["unread"],
    "in-the-head-of-the-answer": [20],
    "in-the-body-of-the-answer": [-5],
    "twice": [0, 300],
}


@pytest.mark.parametrize("losses", LOST.values(), ids=LOST)
async def test_a_write_whose_answer_is_lost_leaves_exactly_one_user(
    trial: Trial, losses: list[int | str | None]
) -> None:
    trial.proxy.losses = list(losses)
    user = await trial.create()
    keys = trial.proxy.keys()
    assert len(keys) > len(losses)
    assert len(set(keys)) == 1
    assert trial.statuses[: len(losses)] == [None] * len(losses)
    assert trial.statuses[-1] in {200, 201}
    assert user.version == 1
    assert await trial.is_there_once(user)


async def test_a_write_whose_answer_is_held_back_gets_it_at_the_repetition(trial: Trial) -> None:
    trial.proxy.hold = 3
    user = await trial.create()
    assert trial.statuses == [None, 201]
    assert await trial.is_there_once(user)


async def test_a_slow_write_whose_repetition_meets_it_under_way_ends_as_a_success(
    trial: Trial, database_url: str
) -> None:
    async with claimed(database_url, trial.email):
        writing = asyncio.create_task(trial.create())
        await until(lambda: 409 in trial.statuses, within=10)
    user = await writing
    assert (trial.statuses[0], trial.statuses[-1]) == (None, 201)
    assert len(set(trial.proxy.keys())) == 1
    assert await trial.is_there_once(user)


async def test_a_task_that_is_repeated_with_its_key_gets_the_user_of_the_first_time(
    trial: Trial,
) -> None:
    trial.proxy.losses = [0] * 6
    with pytest.raises(UserServiceError) as lost:
        await trial.create(idempotency_key="task-1")
    assert isinstance(lost.value, MaybeProcessed)
    assert lost.value.maybe_processed
    assert lost.value.attempts == 6
    user = await trial.create(idempotency_key="task-1")
    assert await trial.is_there_once(user)
    assert trial.proxy.keys()[:7] == ["task-1"] * 7


async def test_many_writes_over_a_network_that_loses_answers_happen_once_each(
    trial: Trial,
) -> None:
    users = [await trial.client.users.create(name="J", email=trial.email, password=PASSWORD)]
    trial.proxy.losses = [0, None, 40, None, None, "unread", None] * 5
    renamed: list[str] = []
    for number in range(15):
        name = f"Name {number}"
        user = await trial.client.users.update(users[0].id, name=name)
        renamed.append(user.name)
        assert user.version == number + 2, "each change raises the version once"
    assert renamed[-1] == (await trial.client.users.get(users[0].id)).name
