"""The workers of `examples/`, as processes against a live service and a fake of each provider."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypedDict, Unpack, cast
from uuid import uuid4

import httpx
import msgspec
import pytest
import redis
from user_service_client import UserServiceClient
from user_service_schemas import User

from ..servers import Server, free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
WITHIN = 20.0
"""Seconds; what is waited for takes one or two."""

CLAIM_AFTER = 0.5


class Program:
    """A program of the examples, in a process of its own."""

    def __init__(self, name: str, log: Path, **environ: str) -> None:
        self._command = [sys.executable, str(EXAMPLES / f"{name}.py")]
        inherited = {k: os.environ[k] for k in ("PATH", "PYTHONPATH") if k in os.environ}
        self._environ = {**inherited, **environ}
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environ, stdout=log, stderr=log, cwd=self._log.parent
            )

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(timeout=WITHIN)
        self.process = None
        return code

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


class Received(msgspec.Struct):
    """What the providers took."""

    mails: list[dict[str, str]]
    pushes: list[dict[str, str]]


class World:
    """The service, both providers, both workers, the jobs, and people who are written to."""

    def __init__(self, server: Server, valkey_url: str, directory: Path) -> None:
        self.queue_url = valkey_url.replace("db=0", "db=1")
        self.redis = redis.Redis.from_url(self.queue_url, decode_responses=True)
        self.redis.flushdb()
        smtp, fcm = free_port(), free_port()
        self._providers_url = f"http://127.0.0.1:{fcm}"
        common = {
            "QUEUE_URL": self.queue_url,
            "USER_SERVICE_URL": server.url,
            "CLAIM_AFTER": str(CLAIM_AFTER),
            "RETRY_AFTER": "0.2",
            "SMTP_PORT": str(smtp),
            "SMTP_HOST": "127.0.0.1",
            "FCM_URL": f"{self._providers_url}/v1/projects/example",
        }
        self.providers = Program(
            "providers", directory / "providers.log", SMTP_PORT=str(smtp), HTTP_PORT=str(fcm)
        )
        self.email = Program("email_worker", directory / "email.log", **common)
        self.push = Program("push_worker", directory / "push.log", **common)
        self.people: list[User] = []

    def end(self) -> None:
        for program in (self.email, self.push, self.providers):
            if program.process is not None:
                program.end(signal.SIGKILL)
        self.redis.close()

    async def received(self) -> Received:
        async with httpx.AsyncClient() as http:
            answer = await http.get(f"{self._providers_url}/received")
        return msgspec.json.decode(answer.content, type=Received)

    async def is_up(self) -> bool:
        try:
            await self.received()
        except httpx.TransportError:
            return False
        return True

    def enqueue(self, channel: str, user_id: str, id_: str | None = None, **others: str) -> str:
        job = {"id": id_ or str(uuid4()), "user_id": user_id, "title": "Hello", "body": "You"}
        self.redis.xadd(f"{{{channel}}}:jobs", {"job": msgspec.json.encode(job | others)})
        return job["id"]

    def dead(self, channel: str) -> dict[str, str]:
        """Why jobs were put aside, by their ids."""
        found = cast("list[tuple[str, dict[str, str]]]", self.redis.xrange(f"{{{channel}}}:dead"))
        return {msgspec.json.decode(f["job"])["id"]: f["why"] for _, f in found}

    def waiting(self, channel: str) -> int:
        """How many jobs are for another time."""
        return int(self.redis.zcard(f"{{{channel}}}:later"))

    async def all_is_done(self, channel: str) -> bool:
        return not self.redis.xlen(f"{{{channel}}}:jobs")


async def until(condition: Callable[[], Awaitable[bool]], world: World) -> None:
    deadline = time.monotonic() + WITHIN
    while not await condition():
        assert time.monotonic() < deadline, f"{world.email.log}\n{world.push.log}"
        await asyncio.sleep(0.02)


@pytest.fixture
async def world(server: Server, redis_url: str, tmp_path: Path) -> AsyncIterator[World]:
    world = World(server, redis_url, tmp_path)
    try:
        world.providers.start()
        await until(world.is_up, world)
        yield world
    finally:
        world.end()


@pytest.fixture(scope="module")
async def client(server: Server) -> AsyncIterator[UserServiceClient]:
    async with UserServiceClient(server.url, timeout=10, attempt_timeout=5, cache=None) as client:
        yield client


class Choices(TypedDict, total=False):
    """What people want, as `preferences.update` takes it."""

    email: bool
    push: bool
    quiet_hours_start: str
    quiet_hours_end: str
    muted_until: datetime


class People:
    """Registers people of each sort."""

    def __init__(self, client: UserServiceClient, world: World) -> None:
        self._client = client
        self._world = world

    async def add(
        self, begin: str = "ada", *, token: str | None = None, **choices: Unpack[Choices]
    ) -> str:
        unique = uuid4().hex[:12]
        user = await self._client.users.create(
            name="Ada", email=f"{begin}-{unique}@example.com", password="correct-zebra-Staple-77"
        )
        if choices:
            await self._client.preferences.update(user.id, **choices)
        if token is not None:
            await self._client.devices.register(
                user.id, token=f"{token}-{unique}", platform="android"
            )
        self._world.people.append(await self._client.users.get(user.id))
        return user.id


@pytest.fixture
def people(client: UserServiceClient, world: World) -> People:
    return People(client, world)


def in_quiet_hours_now() -> Choices:
    """Quiet hours that began a while ago and end in an hour or more."""
    now = datetime.now(UTC)
    start, end = now - timedelta(hours=2), now + timedelta(hours=2)
    return {"quiet_hours_start": f"{start:%H:%M}", "quiet_hours_end": f"{end:%H:%M}"}


async def test_mail_goes_to_those_who_may_have_it(world: World, people: People) -> None:
    """Each job ends as the directory says, and as the mail server answers."""
    allowed = world.enqueue("email", await people.add())
    urgent = world.enqueue(
        "email", await people.add("urgent", **in_quiet_hours_now()), priority="urgent"
    )
    busy = world.enqueue("email", await people.add("busy"))
    world.enqueue("email", await people.add("out", email=False))
    world.enqueue("email", await people.add("quiet", **in_quiet_hours_now()))
    world.enqueue("email", str(uuid4()))
    world.enqueue("email", await people.add("nobody"))
    blocked = world.enqueue("email", await people.add("blocked"))
    broken = world.enqueue("email", await people.add("broken"), title="Two\nlines")
    refused = world.enqueue("email", await people.add("refused"), category="No Such")
    world.redis.xadd("{email}:jobs", {"job": '{"id": "no user"}'})

    world.email.start()

    async def three_came() -> bool:
        return len((await world.received()).mails) >= 3 and await world.all_is_done("email")

    await until(three_came, world)
    await asyncio.sleep(0.3)  # for what must not come
    mails = (await world.received()).mails
    assert Counter(mail["to"].partition("-")[0] for mail in mails) == Counter(
        {"ada": 1, "urgent": 1, "busy": 1}
    )
    assert {mail["id"] for mail in mails} == {
        f"<{job}@example.com>" for job in (allowed, urgent, busy)
    }
    assert world.waiting("email") == 1
    assert world.dead("email") == {
        blocked: "smtp 550 5.7.1",
        broken: "message",
        refused: "validation_failed",
        "no user": "unreadable",
    }
    assert world.email.end() == 0


async def test_pushes_go_to_all_devices_that_may_have_them(
    world: World, people: People, client: UserServiceClient
) -> None:
    """Each job ends as the directory says, and as the provider answers."""
    two = await people.add(token="first")
    await client.devices.register(two, token=f"second-{two}", platform="ios")
    world.enqueue("push", two)
    world.enqueue("push", await people.add(token="busy"))
    world.enqueue("push", await people.add("none"))
    world.enqueue("push", await people.add("out", token="out", push=False))
    world.enqueue("push", await people.add("quiet", token="quiet", **in_quiet_hours_now()))
    bad = world.enqueue("push", await people.add(token="bad"))

    world.push.start()

    async def three_came() -> bool:
        return len((await world.received()).pushes) >= 3 and await world.all_is_done("push")

    await until(three_came, world)
    await asyncio.sleep(0.3)  # for what must not come
    pushes = (await world.received()).pushes
    assert Counter(push["token"].partition("-")[0] for push in pushes) == Counter(
        {"first": 1, "second": 1, "busy": 1}
    )
    assert world.waiting("push") == 1
    assert world.dead("push") == {bad: "fcm 400"}
    assert world.push.end() == 0


async def test_the_deferred_come_at_their_time_after_a_restart_too(
    world: World, people: People, client: UserServiceClient
) -> None:
    """What is held is asked again when its time has come, and not sent if it is not wanted then."""
    world.push.start()
    world.email.start()

    async def both_began() -> bool:
        return all("begins" in worker.log for worker in (world.push, world.email))

    await until(both_began, world)
    until_then = datetime.now(UTC) + timedelta(seconds=4)
    kept = await people.add("kept", token="kept", muted_until=until_then)
    other = await people.add("other", token="other", muted_until=until_then)
    for user_id in (kept, other):
        world.enqueue("push", user_id)
    world.enqueue("email", kept)

    async def all_wait() -> bool:
        return world.waiting("push") == 2 and world.waiting("email") == 1

    await until(all_wait, world)
    world.push.end(signal.SIGKILL)
    await client.preferences.update(other, push=False)
    assert datetime.now(UTC) < until_then, "this machine was too slow to show anything"
    world.push.start()  # perhaps when the time has come already, which makes no difference

    async def both_came() -> bool:
        received = await world.received()
        return bool(received.mails and received.pushes)

    await until(both_came, world)
    await asyncio.sleep(0.3)  # for the other, which must not come
    received = await world.received()
    (push,), (mail,) = received.pushes, received.mails
    assert push["token"].startswith("kept")
    assert datetime.fromisoformat(push["at"]) >= until_then
    lateness = datetime.fromisoformat(mail["at"]) - until_then
    assert timedelta(0) <= lateness < timedelta(seconds=3)
    print(f"\n{lateness / timedelta(milliseconds=1):.0f} ms late")  # noqa: T201
    assert world.waiting("push") == 0


async def test_a_worker_that_is_told_to_end_finishes_what_it_has_in_hand(
    world: World, people: People
) -> None:
    """SIGTERM amid a slow delivery: it arrives, once, and nothing is left pending."""
    job = world.enqueue("push", await people.add(token="slow"))
    world.push.start()

    async def is_in_hand() -> bool:
        return bool(world.redis.exists("{push}:jobs")) and pending(world, "push") == 1

    await until(is_in_hand, world)
    assert world.push.end() == 0
    assert [push["id"] for push in (await world.received()).pushes] == [job]
    assert world.redis.xlen("{push}:jobs") == 0


def pending(world: World, channel: str) -> int:
    groups = world.redis.xinfo_groups(f"{{{channel}}}:jobs")
    return int(groups[0]["pending"]) if groups else 0


async def test_nothing_is_sent_twice_by_a_worker_that_is_killed(
    world: World, people: People
) -> None:
    """Killed while one of ten is on its way: the next worker sends that one, and no other again."""
    jobs = [world.enqueue("push", await people.add(token="fast")) for _ in range(9)]
    jobs.append(world.enqueue("push", await people.add(token="slow")))
    world.push.start()

    async def nine_came() -> bool:
        # Noted, too: between the provider's yes and the note is the window that stays open.
        return len((await world.received()).pushes) == 9 and pending(world, "push") == 1

    await until(nine_came, world)
    world.push.end(signal.SIGKILL)
    jobs.append(world.enqueue("push", world.people[0].id, jobs[0]))  # the producer's own retry
    world.push.start()

    async def is_done() -> bool:
        return await world.all_is_done("push")

    await until(is_done, world)
    pushes = (await world.received()).pushes
    assert Counter(push["id"] for push in pushes) == dict.fromkeys(jobs, 1)


async def test_kills_at_any_time_lose_nothing(world: World, people: People) -> None:
    """Killed again and again: all is sent; twice only what was on its way, with the same id."""
    users = [await people.add(token="fast") for _ in range(10)]
    jobs = {world.enqueue("push", user) for user in users for _ in range(10)}
    kills = 0
    world.push.start()
    deadline = time.monotonic() + 2 * WITHIN
    while not await world.all_is_done("push"):
        assert time.monotonic() < deadline
        seen = len((await world.received()).pushes)
        await asyncio.sleep(0.01)
        if kills < 2 and len((await world.received()).pushes) > seen:
            world.push.end(signal.SIGKILL)
            kills += 1
            world.push.start()
    counts = Counter(push["id"] for push in (await world.received()).pushes)
    assert set(counts) == jobs
    twice = sum(counts.values()) - len(jobs)
    print(f"\n{len(jobs)} jobs, {kills} kills, {twice} sent twice")  # noqa: T201
    assert kills
    assert twice <= kills * 10  # so many are under way at once


async def test_jobs_wait_for_a_service_that_is_down(
    world: World, people: People, server: Server
) -> None:
    """Nothing is guessed and nothing dropped while the service cannot be asked."""
    user_id = await people.add(token="later")
    server.kill()
    try:
        world.push.start()
        job = world.enqueue("push", user_id)

        async def is_held() -> bool:
            return world.waiting("push") == 1

        await until(is_held, world)
        assert (await world.received()).pushes == []
    finally:
        server.start()

    async def came() -> bool:
        return bool((await world.received()).pushes)

    await until(came, world)
    assert [push["id"] for push in (await world.received()).pushes] == [job]
    assert world.dead("push") == {}


async def test_what_providers_say_reaches_the_directory(
    world: World, people: People, client: UserServiceClient
) -> None:
    """A token that is gone is switched off, a mailbox that is not there suppressed."""
    gone = await people.add(token="gone")
    await client.devices.register(gone, token=f"here-{gone}", platform="ios")
    nobody = await people.add("nobody")
    world.enqueue("push", gone)
    world.enqueue("email", nobody)
    world.push.start()
    world.email.start()

    async def both_were_told() -> bool:
        user = await client.users.get(gone)
        return len(user.devices) == 1 and not (await client.users.get(nobody)).email_deliverable

    await until(both_were_told, world)
    (device,) = [one for one in await client.devices.list(gone) if not one.active]
    assert device.token.startswith("gone")
    assert device.inactive_reason == "unregistered"

    async def all_is_reported() -> bool:
        return not any(world.redis.xlen(f"{{{channel}}}:feedback") for channel in ("push", "email"))

    await until(all_is_reported, world)
    second = world.enqueue("push", gone)
    world.enqueue("email", nobody)

    async def the_second_came() -> bool:
        received = await world.received()
        came = any(push["id"] == second for push in received.pushes)
        return came and "suppress: email_undeliverable" in world.email.log

    await until(the_second_came, world)
    pushes = Counter(push["token"].partition("-")[0] for push in (await world.received()).pushes)
    assert pushes == {"here": 2}


async def test_logs_hold_no_address_and_no_token(world: World, people: People) -> None:
    """Whatever becomes of a message, what is logged is ids and reasons."""
    for begin in ("ada", "nobody", "blocked", "busy"):
        world.enqueue("email", await people.add(begin))
    for token in ("fast", "gone", "bad", "busy"):
        world.enqueue("push", await people.add(token=token))
    world.email.start()
    world.push.start()

    async def all_was_tried() -> bool:
        received = await world.received()
        sent = len(received.mails) == 2 and len(received.pushes) == 2
        return sent and len(world.dead("email")) + len(world.dead("push")) == 2

    await until(all_was_tried, world)
    said = (world.email.log + world.push.log).lower()
    assert said.count("delivered") >= 4
    secrets = [user.email for user in world.people]
    secrets += [device.token for user in world.people for device in user.devices]
    assert len(secrets) == 12
    assert [secret for secret in secrets if secret.lower() in said] == []
    assert "@" not in said
