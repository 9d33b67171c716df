"""Owns a day of a campaign: one push to each of many people all over the world, by a worker.

The worker is the examples', with the real client on a directory in memory; its jobs are kept in
memory, too, and its clock moves when it has nothing to do. What should become of each person is
computed from what they have chosen: by looking at the wall clock of their zone, minute by minute,
with `zoneinfo`.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from itertools import count
from uuid import UUID

import httpx
import msgspec
from jobs import Entry, Feedback, Job
from user_service_client import CacheOptions, UserServiceClient
from user_service_client.testing import VirtualClock
from user_service_schemas import (
    RULES,
    BatchOfUsers,
    BatchUsers,
    Channel,
    Choices,
    Decision,
    DeliveryDevice,
    Device,
    Envelope,
    FeedbackItem,
    User,
    effective_preferences,
)
from worker import Pace, Worker

from ..schemas.wall_clocks import zone_of

MINUTE = timedelta(minutes=1)
CATEGORY = "marketing"


@dataclass(frozen=True)
class Person:
    """Somebody, and what they have chosen. Times are minutes: of the day, or from the start."""

    id: str
    zone: str
    is_known: bool = True
    devices: int = 1
    push: bool = True
    category: bool = True
    muted_for: int | None = None
    quiet: tuple[int, int] | None = None
    opts_out_after: int | None = None


@dataclass(frozen=True)
class Fate:
    """What becomes of a person's push: why it is held or not sent, and the minute it comes."""

    first: str
    last: str
    at: int | None


@cache
def wall_minutes(zone: str, start: datetime) -> Sequence[int]:
    """Return what minute of the day a zone's clocks show, for each minute of two days and more."""
    local = [(start + n * MINUTE).astimezone(zone_of(zone)) for n in range(60 * 60)]
    assert all(wall.second == 0 for wall in local)
    return [wall.hour * 60 + wall.minute for wall in local]


def is_quiet(person: Person, start: datetime, minute: int) -> bool:
    if person.quiet is None:
        return False
    begin, end = person.quiet
    wall = wall_minutes(person.zone, start)[minute]
    return begin <= wall < end if begin < end else wall >= begin or wall < end


def fate_of(person: Person, start: datetime) -> Fate:
    """Return what the rules say, read from their table in words and nothing else."""
    for holds, reason in (
        (not person.is_known, "user_not_found"),
        (person.devices == 0, "no_active_device"),
        (not person.push, "channel_opted_out"),
        (not person.category, "category_opted_out"),
    ):
        if holds:
            return Fate(reason, reason, None)
    minute = person.muted_for or 0
    while is_quiet(person, start, minute):
        minute += 1
    if minute == 0:
        return Fate("allowed", "allowed", 0)
    first = "muted" if person.muted_for else "quiet_hours"
    if person.opts_out_after is not None and person.opts_out_after < minute:
        return Fate(first, "channel_opted_out", None)
    return Fate(first, "allowed", minute)


class MemoryQueue:
    """The jobs, in memory."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._numbers = count()
        self._jobs = deque(jobs)
        self._later: list[tuple[datetime, int, Job]] = []
        self._sent: defaultdict[str, set[str]] = defaultdict(set)
        self.in_hand: set[str] = set()
        self.buried: list[str] = []

    @property
    def next_due(self) -> datetime | None:
        return self._later[0][0] if self._later else None

    async def take(self, count: int, now: datetime) -> Sequence[Entry]:
        while self._later and self._later[0][0] <= now:
            self._jobs.append(heapq.heappop(self._later)[2])
        taken = [self._jobs.popleft() for _ in range(min(count, len(self._jobs)))]
        self.in_hand |= {job.id for job in taken}
        return [Entry(job.id, job) for job in taken]

    async def done(self, entry: Entry) -> None:
        self.in_hand.remove(entry.id)

    async def later(self, entry: Entry, job: Job, at: datetime) -> None:
        self.in_hand.remove(entry.id)
        heapq.heappush(self._later, (at, next(self._numbers), job))

    async def bury(self, entry: Entry, why: str) -> None:
        self.in_hand.remove(entry.id)
        self.buried.append(why)

    async def sent(self, job: Job) -> set[str]:
        return self._sent[job.id]

    async def mark_sent(self, job: Job, target: str, feedback: FeedbackItem | None) -> None:
        assert feedback is None
        self._sent[job.id].add(target)

    async def feedback(self, count: int) -> Sequence[Feedback]:  # noqa: ARG002 - as others
        return []

    async def reported(self, feedback: Iterable[Feedback]) -> None:
        assert not list(feedback)


@dataclass
class Seen:
    """What the worker did."""

    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_user: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    pushes: defaultdict[str, list[tuple[str, datetime]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    resolved: int = 0
    seconds: float = 0.0


class CampaignWorker(Worker[DeliveryDevice]):
    """Notes what is decided and sent, and when."""

    channel: Channel = "push"

    def __init__(self, client: UserServiceClient, queue: MemoryQueue, clock: VirtualClock) -> None:
        super().__init__(client, queue, Pace(batch=1000, concurrency=1000), now=clock.now)
        self.seen = Seen()

    async def resolve(self, entries: Sequence[Entry]) -> Sequence[Decision]:
        begin = time.process_time()  # and not what others have this machine do meanwhile
        decisions = await super().resolve(entries)
        self.seen.seconds += time.process_time() - begin
        self.seen.resolved += len(entries)
        return decisions

    async def follow(self, entry: Entry, decision: Decision) -> None:
        self.seen.decisions[decision.decision, decision.reason] += 1
        self.seen.by_user[str(entry.job.user_id)].append(decision.reason)
        await super().follow(entry, decision)

    def targets(self, decision: Decision) -> Mapping[str, DeliveryDevice]:
        return {device.id: device for device in decision.devices}

    async def send(self, job: Job, target: DeliveryDevice) -> None:
        self.seen.pushes[str(job.user_id)].append((target.token, self.now()))


def invent(size: int, zones: Sequence[str], chance: random.Random) -> list[Person]:
    """Return people, half of them with quiet hours; some with each reason not to be sent to."""
    people = []
    for number in range(size):
        quiet = None
        if number % 2:
            begin = chance.randrange(1440)
            length = chance.choice((1, 30, 480, 540, 600, 1439, chance.randrange(1, 1440)))
            quiet = begin, (begin + length) % 1440
        rare = chance.random
        people.append(
            Person(
                id=str(UUID(int=number)),
                zone=zones[number // 2 % len(zones)],
                is_known=rare() >= 0.02,
                devices=0 if rare() < 0.05 else 2 if rare() < 0.1 else 1,
                push=rare() >= 0.05,
                category=rare() >= 0.05,
                muted_for=chance.randrange(1, 1440) if rare() < 0.05 else None,
                quiet=quiet,
                opts_out_after=chance.randrange(1440) if rare() < 0.05 else None,
            )
        )
    return people


def time_of_day(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def document(person: Person, start: datetime, *, push: bool, version: int) -> User:
    """Return a person's document, as the service would show it."""
    quiet = (None, None) if person.quiet is None else tuple(map(time_of_day, person.quiet))
    muted = None if person.muted_for is None else start + person.muted_for * MINUTE
    choices = Choices(
        push=push,
        quiet_hours_start=quiet[0],
        quiet_hours_end=quiet[1],
        timezone=person.zone,
        muted_until=muted,
        categories={} if person.category else {CATEGORY: {"push": False}},
    )
    return User(
        id=person.id,
        external_id=None,
        name="Ada",
        email=f"{person.id}@example.com",
        phone=None,
        locale=None,
        email_deliverable=True,
        preferences=effective_preferences(choices, "UTC"),
        devices=tuple(
            Device(
                id=f"{person.id}/{number}",
                token=f"{person.id}/{number}",
                platform="ios",
                app=None,
                active=True,
                registered_at=start,
            )
            for number in range(person.devices)
        ),
        version=version,
        rules=RULES,
        created_at=start,
        updated_at=start,
    )


class Directory(httpx.AsyncBaseTransport):
    """The service as far as a campaign asks it: batches of users, who opt out in their time."""

    def __init__(self, people: Iterable[Person], start: datetime, clock: VirtualClock) -> None:
        self._people = {person.id: person for person in people if person.is_known}
        self._start = start
        self._clock = clock
        self.asked = 0
        self.seconds = 0.0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/api/v1/users/batch"
        begin = time.process_time()
        self.asked += 1
        asked = msgspec.json.decode(await request.aread(), type=BatchUsers).ids
        batch = BatchOfUsers(
            users=tuple(self._show(self._people[i]) for i in asked if i in self._people),
            missing=tuple(i for i in asked if i not in self._people),
        )
        envelope = Envelope(success=True, data=batch, message="Users retrieved", error=None)
        content = msgspec.json.encode(envelope)
        self.seconds += time.process_time() - begin
        return httpx.Response(200, content=content, headers={"X-Document-Tag": "e1.f1"})

    def _show(self, person: Person) -> User:
        minutes = (self._clock.now() - self._start) / MINUTE
        if person.opts_out_after is not None and minutes > person.opts_out_after:
            return document(person, self._start, push=False, version=2)
        return document(person, self._start, push=person.push, version=1)


async def assert_campaign_goes_right(
    size: int, start: datetime, zones: Sequence[str], seed: int
) -> str:
    """Send one push to each of `size` people; returns the figures in words."""
    people = invent(size, zones, random.Random(seed))  # noqa: S311 - no secret
    clock = VirtualClock(start)
    directory = Directory(people, start, clock)
    jobs = [
        Job(id=p.id, user_id=UUID(p.id), title="Sale", body="Now", category=CATEGORY)
        for p in people
    ]
    queue = MemoryQueue(jobs)
    cache_options = CacheOptions(max_documents=2 * size, max_bytes=1 << 30)
    async with UserServiceClient(
        "http://users", transport=directory, clock=clock, cache=cache_options
    ) as client:
        worker = CampaignWorker(client, queue, clock)
        while await worker.work():
            pass
        first_seconds = worker.seen.seconds - directory.seconds
        first_resolved = worker.seen.resolved
        while (due := queue.next_due) is not None:
            await clock.advance((due - clock.now()).total_seconds())
            while await worker.work():
                pass

    begin = time.perf_counter()
    fates = {p.id: fate_of(p, start) for p in people}
    oracle_seconds = time.perf_counter() - begin
    seen = worker.seen
    expected: Counter[str] = Counter()
    for person in people:
        fate, user_id = fates[person.id], person.id
        reasons = [fate.first] if fate.first == fate.last else [fate.first, fate.last]
        expected.update(reasons)
        assert seen.by_user[user_id] == reasons, (person, fate, seen.by_user[user_id])
        pushes = sorted(seen.pushes.get(user_id, ()))
        times = 0 if fate.at is None else person.devices
        at = start + (fate.at or 0) * MINUTE
        assert pushes == [(f"{person.id}/{n}", at) for n in range(times)], (person, fate, pushes)
        assert not pushes or not is_quiet(person, start, fate.at or 0)
    assert Counter({reason: n for (_, reason), n in seen.decisions.items()}) == expected
    assert not queue.in_hand
    assert not queue.buried
    held = expected["muted"] + expected["quiet_hours"]
    assert sum(expected.values()) == size + held
    figures = ", ".join(f"{d} {r} {n}" for (d, r), n in sorted(seen.decisions.items()))
    return (
        f"{size} people in {len({p.zone for p in people})} zones: {figures}. "
        f"Pushes: {sum(map(len, seen.pushes.values()))}. {directory.asked} requests. "
        f"Resolved {first_resolved} at once in {first_seconds:.2f} s, "
        f"{seen.resolved - first_resolved} deferred ones, one minute's after the other's, in "
        f"{seen.seconds - directory.seconds - first_seconds:.2f} s, of the client's own CPU time. "
        f"The oracle took {oracle_seconds:.1f} s."
    )
