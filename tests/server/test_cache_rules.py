"""Each rule of the cache's protocol by itself: a schedule that goes wrong where it is left out.

The schedules are those of two servers on one Postgres and one Valkey, one effect at a time.
`tests/chaos/test_rules_are_needed.py` takes each rule out and sees its test fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection
from user_service_server.errors import DependencyUnavailable, UserNotFound
from user_service_server.settings import Settings
from user_service_server.storage import documents
from user_service_server.storage.buckets import ALL_BUCKETS, bucket_of
from user_service_server.storage.database import COMMAND_TIMEOUT
from user_service_server.storage.document import StoredDocument, decode_user
from user_service_server.storage.documents import CONCLUSION_TIMEOUT
from user_service_server.storage.state import renew_epoch

from ..engines import settings_for
from .statements import around_direct
from .stepped import WRITING, Replica, World, a_world


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    async with a_world(settings) as world:
        yield world


@pytest.fixture
async def here(world: World) -> Replica:
    return await world.replica()


@pytest.fixture
async def there(world: World) -> Replica:
    return await world.replica()


async def raise_generation(world: World, replica: Replica) -> None:
    """Write somebody else while the replica is cut off from Redis; all replicas look."""
    stranger = await world.user()
    await replica.write_cut_off(stranger)
    await world.look()


async def test_announcement_takes_the_lease_of_a_read_from_before(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    reading = await there.reading(user, "fill").until("fill")
    writing = await here.writing(user, stops=WRITING).until("publish")
    await writing.crash()
    assert await reading.finish() == 1
    assert await world.cached(user) != 1, "a read from before the write has filled the cache"
    assert await there.read(user) == 2


async def test_lease_that_is_gone_keeps_a_stalled_read_from_filling(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    stalled = await there.reading(user, "fill").until("fill")
    assert await here.write(user) == 2
    await world.evict(user)
    await stalled.finish()
    assert await world.cached(user) != 1, "a stalled read has brought version 1 back"
    assert await there.read(user) == 2


async def test_last_writer_publishes_and_no_one_before(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    first = await here.writing(user, stops=WRITING).until("publish")
    last = await there.writing(user, stops=WRITING).until("lock")
    assert await first.finish() == 2
    await (await last.until("publish")).crash()
    assert await world.cached(user) != 2, "version 2 was stored while another writer was at it"
    assert await here.read(user) == 3


async def test_highest_version_in_the_marker_keeps_an_older_one_from_being_stored(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    older = await here.writing(user, stops=WRITING).until("publish")
    assert await there.write(user) == 3
    assert await older.finish() == 2
    assert await world.cached(user) != 2, "version 2 was stored after version 3 was published"
    assert await here.read(user) == 3


async def test_generation_is_raised_by_a_write_that_could_not_announce(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    assert await there.read(user) == 1
    assert await here.write_cut_off(user) == 2
    assert await here.read(user) == 2, "the writing server does not see its own write"
    await world.look()
    assert await there.read(user) == 2, "what was cached before is still believed"


async def test_server_that_stood_still_looks_before_it_believes_the_cache(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    assert await there.read(user) == 1
    assert await here.write_cut_off(user) == 2
    there.state.stall()
    assert await there.read(user) == 2, "what was cached before the stall is still believed"
    there.state.stall()
    assert (await there.documents.get_many([user]))[user].version == 2


async def test_generation_is_raised_by_a_write_that_could_not_publish(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    writing = await here.writing(user, stops=WRITING).until("lock")
    await world.evict(user)
    reading = await there.reading(user, "fill").until("fill")
    await writing.until("publish")
    assert await reading.finish() == 1
    here.link.cut = True
    assert await writing.finish() == 2
    here.link.cut = False
    assert await here.read(user) == 2, "the writing server does not see its own write"
    await world.look()
    assert await there.read(user) == 2, "what was cached before the commit is still believed"


async def test_unpublished_write_whose_raise_fails_is_made_good_afterwards(
    world: World, here: Replica, there: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = await world.user()
    bucket = bucket_of(user)
    before = await world.generation(bucket)
    writing = await here.writing(user, stops=WRITING).until("publish")
    here.link.cut = True
    leave_behind, raised = here.state.leave_behind, asyncio.Event()

    async def fail_once(generations: Mapping[int, int], reason: str) -> None:
        if reason == "unpublished_write":
            raise DependencyUnavailable
        await leave_behind(generations, reason)
        raised.set()

    monkeypatch.setattr(here.state, "leave_behind", fail_once)
    with pytest.raises(DependencyUnavailable):
        await writing.finish()
    await asyncio.wait_for(raised.wait(), 5)
    assert await world.generation(bucket) > before
    await world.look()
    assert await there.read(user) == 2


async def test_generation_is_raised_for_a_redis_that_nobody_has_seen(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    await there.read(user)
    old = await world.stored.get(await world.key(user))
    assert await here.write(user) == 2
    assert old is not None
    await world.stored.set(await world.key(user), old)
    await here.state.recognise("restarted with its old data", ALL_BUCKETS)
    await world.look()
    assert await there.read(user) == 2, "old data of another start of Redis are believed"


async def test_quiet_time_after_a_raise_keeps_reads_from_filling(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    writing = await here.writing(user, stops=WRITING).until("conclude")
    await raise_generation(world, there)
    reading = there.reading(user, "fill")
    await reading.rest()
    assert await writing.finish() == 2
    assert await reading.finish() == 1
    await world.age(20)
    assert await there.read(user) == 2, "a read beside a write of the old generation has filled"


@pytest.fixture
def joined_at_any_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read under way can be joined however slow the machine is."""
    monkeypatch.setattr(documents, "FLIGHT_AGE", 60)


@pytest.mark.usefixtures("joined_at_any_age")
async def test_futures_are_detached_by_a_write(world: World, here: Replica) -> None:
    user = await world.user()
    early = await here.reading(user, "answer").until("answer")
    assert await here.write(user) == 2
    await world.evict(user)
    late = here.reading(user)
    await late.rest()
    assert await early.finish() == 1
    assert await late.finish() == 2, "a read after the write has joined one from before"


@contextmanager
def reads(meet: Callable[[], object] = lambda: None) -> Iterator[list[str]]:
    """Collect the statements that read documents; the first of them meets with something."""
    seen: list[str] = []

    async def note(statement: str, _connection: object) -> None:
        if "JOIN preferences" in statement:
            seen.append(statement)
            if len(seen) == 1:
                meet()

    with around_direct(note):
        yield seen


async def test_those_who_miss_different_documents_at_once_share_one_statement(
    world: World, here: Replica
) -> None:
    """Each gets the own document, or hears that there is none, and each document is cached."""
    known = [await world.user(bucket) for bucket in range(5)]
    nobody = str(uuid4())
    with reads() as statements:
        answers = await asyncio.gather(
            *(here.documents.get(user_id) for user_id in (*known, nobody)), return_exceptions=True
        )
        assert len(statements) == 1
        *documents, absence = answers
        found = [decode_user(d.body).id for d in documents if isinstance(d, StoredDocument)]
        assert found == known
        assert isinstance(absence, UserNotFound)
        await here.documents.close()
        assert [await world.cached(user_id) for user_id in known] == [1] * 5
        with pytest.raises(UserNotFound):
            await here.documents.get(nobody)
        assert len(statements) == 1, "who is nobody is remembered"


async def test_a_shared_statement_that_fails_is_told_to_all_and_joined_by_nobody_later(
    world: World, here: Replica
) -> None:
    """A failure is no answer for those who ask afterwards."""
    known = [await world.user() for _ in range(3)]

    def refuse() -> None:
        raise ConnectionRefusedError

    with reads(refuse) as statements:
        reading = [asyncio.ensure_future(here.documents.get(user_id)) for user_id in known]
        await asyncio.wait(reading)
        assert [type(read.exception()) for read in reading] == [DependencyUnavailable] * 3
        assert [await here.read(user_id) for user_id in known] == [1] * 3
    assert len(statements) == 1 + 3


async def test_who_leaves_a_shared_statement_takes_no_other_along(
    world: World, here: Replica
) -> None:
    """A caller who hangs up costs the others of the same turn nothing."""
    ids = [await world.user() for _ in range(2)]
    leaver, stayer = (asyncio.ensure_future(here.documents.get(user_id)) for user_id in ids)
    with reads(leaver.cancel) as statements:
        assert (await stayer).version == 1
    assert leaver.cancelled()
    assert len(statements) == 1


async def test_write_announced_in_a_quiet_time_stores_nothing(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    await raise_generation(world, there)
    announced = await here.writing(user, stops=WRITING).until("publish")
    assert await there.write_cut_off(user) == 3
    assert await announced.finish() == 2
    await world.age(20)
    assert await there.read(user) == 3, "version 2 was stored after an unannounced version 3"


async def test_deletion_publishes_its_version(world: World, here: Replica, there: Replica) -> None:
    user = await world.user()
    update = await here.writing(user, stops=WRITING).until("publish")
    assert await there.erasing(user).finish() is None
    assert await update.finish() == 2
    assert await world.cached(user) != 2, "an update from before has brought the user back"
    assert await here.read(user) is None


# Each bucket has its own generation.


async def test_raise_of_one_bucket_leaves_what_is_cached_in_others(
    world: World, here: Replica, there: Replica
) -> None:
    lost, kept = await world.user(bucket=0), await world.user(bucket=1)
    await there.read(lost)
    await there.read(kept)
    here.link.cut_buckets = {0}
    assert await here.write(lost) == 2
    await world.look()
    assert await there.read(lost) == 2
    for replica in here, there:
        reading = replica.reading(kept, "read")
        assert await reading.rest() is None, "Postgres is asked for what is cached"
        assert await reading.finish() == 1
    assert await there.write(kept) == 2
    assert await world.cached(kept) == 2


async def test_write_of_two_buckets_raises_the_one_that_it_could_not_announce(
    world: World, here: Replica, there: Replica
) -> None:
    told, untold = await world.user(bucket=0), await world.user(bucket=1)
    await there.read(told)
    await there.read(untold)
    before = [await world.generation(bucket) for bucket in (0, 1)]
    here.link.cut_buckets = {1}
    assert await here.write(told, untold) == 2
    here.link.cut_buckets = ()
    assert [await world.generation(bucket) for bucket in (0, 1)] == [before[0], before[1] + 1]
    assert await world.cached(told) == 2
    await world.look()
    assert await there.read(untold) == 2


async def test_write_of_two_buckets_raises_the_one_that_it_could_not_publish(
    world: World, here: Replica, there: Replica
) -> None:
    told, untold = await world.user(bucket=0), await world.user(bucket=1)
    before = [await world.generation(bucket) for bucket in (0, 1)]
    writing = await here.writing(told, untold, stops=WRITING).until("publish")
    here.link.cut_buckets = {1}
    assert await writing.finish() == 2
    here.link.cut_buckets = ()
    assert [await world.generation(bucket) for bucket in (0, 1)] == [before[0], before[1] + 1]
    assert await world.cached(told) == 2
    await world.look()
    assert await there.read(untold) == 2


async def test_write_of_two_buckets_without_redis_raises_both(
    world: World, here: Replica, there: Replica
) -> None:
    people = [await world.user(bucket) for bucket in (0, 1)]
    for user in people:
        await there.read(user)
    here.link.cut = True
    await here.write(*people)
    await world.look()
    assert [await there.read(user) for user in people] == [2, 2]


async def test_opposite_writes_of_two_buckets_without_redis_do_not_wait_for_each_other(
    world: World, here: Replica, there: Replica
) -> None:
    up = [await world.user(bucket) for bucket in (0, 1)]
    down = [await world.user(bucket) for bucket in (1, 0)]
    here.link.cut = there.link.cut = True
    async with world.locked_generation(0):
        first = here.writing(*up)
        await world.waiting(1)
        second = there.writing(*down)
        await world.waiting(2)
    assert await first.finish() == 2
    assert await second.finish() == 2


async def test_renewed_epoch_raises_every_bucket(world: World, here: Replica) -> None:
    before = [await world.generation(bucket) for bucket in ALL_BUCKETS]
    await renew_epoch(world.settings)
    await world.look()
    assert [here.state.generation(bucket) for bucket in ALL_BUCKETS] == [n + 1 for n in before]
    assert all(here.state.is_quiet(bucket) for bucket in ALL_BUCKETS)


async def test_stranger_raises_the_buckets_that_it_may_hold(world: World, here: Replica) -> None:
    before = [await world.generation(bucket) for bucket in ALL_BUCKETS]
    await here.state.recognise("another primary", [3, 5])
    raised = [b for b in ALL_BUCKETS if here.state.generation(b) > before[b]]
    assert raised == [b for b in ALL_BUCKETS if here.state.is_quiet(b)] == [3, 5]


# What was tried to break the protocol with, beyond the rules.


async def test_unannounced_write_that_waited_for_the_raise_of_another_sees_itself(
    world: World, here: Replica, there: Replica
) -> None:
    """It need not raise the generation any more, and must still leave the old one."""
    one, other = await world.user(), await world.user()
    assert await there.read(other) == 1
    here.link.cut = there.link.cut = True
    first = await here.writing(one, stops=["commit"]).until("commit")
    second = there.writing(other)
    await world.waiting(1)
    await first.finish()
    assert await second.finish() == 2
    there.link.cut = False
    assert await there.read(other) == 2, "the writing server does not see its own write"


async def test_write_that_announces_after_a_raise_that_came_in_between_stores_nothing(
    world: World, here: Replica, there: Replica
) -> None:
    """It began before the quiet time, waited for a name, and announced itself within."""
    user = await world.user()
    waited = await here.writing(user, stops=("lock_names", "publish")).until("lock_names")
    await raise_generation(world, there)
    await waited.until("publish")
    assert await there.write_cut_off(user) == 3
    assert await waited.finish() == 2
    await world.age(20)
    assert await there.read(user) == 3, "version 2 was stored after an unannounced version 3"


async def test_write_whose_second_user_is_announced_in_a_quiet_time_stores_nothing(
    world: World, here: Replica, there: Replica
) -> None:
    one, other = await world.user(), await world.user()
    moving = here.writing(one, other, stops=("lock", "publish"))
    await moving.until("lock")
    await raise_generation(world, there)
    await moving.step()
    await moving.until("publish")
    assert await there.write_cut_off(other) == 3
    await moving.finish()
    await world.age(20)
    assert await there.read(other) == 3, "version 2 was stored after an unannounced version 3"


async def test_renewed_epoch_keeps_reads_from_filling_beside_writes_of_the_old_one(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    writing = await here.writing(user, stops=WRITING).until("conclude")
    await renew_epoch(world.settings)
    await world.look()
    reading = there.reading(user, "fill")
    await reading.rest()
    assert await writing.finish() == 2
    assert await reading.finish() == 1
    await world.age(20)
    assert await there.read(user) == 2, "a read beside a write of the old epoch has filled"


async def test_unannounced_write_that_commits_slowly_is_not_outlived_by_the_quiet_time(
    world: World, here: Replica, there: Replica
) -> None:
    """It relies on a raise of 2 s ago, and commits as late as its time-outs allow."""
    user = await world.user()
    await raise_generation(world, here)
    await world.age(2)
    here.link.cut = True
    writing = await here.writing(user, stops=["commit"]).until("commit")
    here.link.cut = False
    await world.age(CONCLUSION_TIMEOUT + COMMAND_TIMEOUT - 0.2)
    assert await there.read(user) == 1
    assert await writing.finish() == 2
    await world.age(20)
    assert await there.read(user) == 2, "it was filled between the quiet time and the commit"


async def test_clock_of_postgres_that_steps_forward_does_not_end_the_quiet_time(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    writing = await here.writing(user, stops=["commit"]).until("commit")
    await raise_generation(world, there)
    await world.step_clock(60)
    assert await there.read(user) == 1
    assert await writing.finish() == 2
    await world.age(20)
    assert await there.read(user) == 2, "it was filled beside a write of the old generation"


async def test_clock_of_postgres_that_steps_back_does_not_hide_an_unannounced_write(
    world: World, here: Replica, there: Replica
) -> None:
    user = await world.user()
    await raise_generation(world, here)
    await world.step_clock(-3600)
    await world.age(20)
    assert await there.read(user) == 1
    assert await here.write_cut_off(user) == 2
    await world.look()
    assert await there.read(user) == 2, "no raise, since the last one lies in the future"


async def test_servers_of_two_formats_see_each_others_writes(
    world: World, here: Replica, database_url: str, redis_url: str
) -> None:
    """As while a release, or a setting that shapes documents, is being rolled out."""
    other = settings_for(database_url, redis_url, DEFAULT_TIMEZONE="Asia/Tokyo")
    there = await world.replica(other)
    assert there.documents.shape.format != here.documents.shape.format
    user = await world.user()
    assert await there.read(user) == 1
    assert await here.write(user) == 2
    assert await there.read(user) == 2, "the write reached the cache of its own format only"


async def test_erased_user_does_not_stay_with_servers_of_another_format(
    world: World, here: Replica, database_url: str, redis_url: str
) -> None:
    other = settings_for(database_url, redis_url, DEFAULT_TIMEZONE="Asia/Tokyo")
    there = await world.replica(other)
    user = await world.user()
    assert await there.read(user) == 1
    assert await here.erasing(user).finish() is None
    assert await there.read(user) is None, "an erased user is answered from another format's cache"


@pytest.mark.usefixtures("joined_at_any_age")
async def test_read_after_a_repeat_does_not_join_one_from_before_a_commit_without_an_answer(
    world: World, here: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit happened, its answer was lost; who repeats with the same key is told of it."""
    user = await world.user()
    early = await here.reading(user, "answer").until("answer")
    commit = AsyncConnection.commit

    async def committed_without_an_answer(connection: AsyncConnection) -> None:
        await commit(connection)
        raise ConnectionResetError

    with monkeypatch.context() as lost:
        lost.setattr(AsyncConnection, "commit", committed_without_an_answer)
        with pytest.raises(DependencyUnavailable):
            await here.write(user)
    assert await world.committed(user) == 2
    late = here.reading(user)
    await late.rest()
    assert await early.finish() == 1
    assert await late.finish() == 2, "a read has joined one from before the commit"


async def test_late_answers_of_redis_are_nobody_elses(
    world: World, database_url: str, redis_url: str
) -> None:
    """A pause longer than the time-out leaves answers on the way that nobody waits for."""
    replica = await world.replica(settings_for(database_url, redis_url, REDIS_TIMEOUT_MS="60"))
    people = [await world.user() for _ in range(6)]
    for user in people:
        await replica.read(user)
    for _ in range(3):
        await world.stored.client_pause(100)
        for _ in range(2):
            for user in people:
                document = await replica.documents.get_user(user)
                assert document.id == user
