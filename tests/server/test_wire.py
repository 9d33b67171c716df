"""The way to Redis, against a Redis that says what a test tells it to, and when."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from redis.exceptions import ResponseError
from structlog.testing import capture_logs
from structlog.typing import EventDict
from user_service_server.storage.buckets import ALL_BUCKETS
from user_service_server.storage.link import PROBE_INTERVAL, RedisLink
from user_service_server.storage.wire import EXTENSIONS, UNREACHABLE

from ..engines import open_dir, settings_for
from ..system.trouble import bounded_in_time, until
from .scripted_redis import Connection, ScriptedRedis, Words, echo, encoded, nothing

TIMEOUT = 0.1
"""Seconds that each call of an impatient link may take."""
IMPATIENT = 3 * 1000 * TIMEOUT
"""REDIS_TIMEOUT_MS of such a link: a request may ask Redis three times."""
BOUND = (EXTENSIONS + 1) * TIMEOUT + 0.5
"""Seconds after which a call that is not answered has ended, on a busy machine too."""
PATIENT = 5000.0
"""REDIS_TIMEOUT_MS where a busy machine is not to be mistaken for a Redis that is late."""
SOON = 10.0
"""Seconds within which what must happen has happened."""

Recognise = Callable[[str, Collection[int]], Awaitable[None]]


@pytest.fixture(
    scope="module",
    params=[("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """Both: the server runs on uvloop, which looks at its timers before its sockets."""
    return request.param


@pytest.fixture
async def redis() -> AsyncIterator[ScriptedRedis]:
    redis = ScriptedRedis()
    with open_dir() as directory:
        async with redis.listening(directory):
            yield redis


async def _recognise(_identity: str, _buckets: Collection[int]) -> None: ...


def link_to(
    redis: ScriptedRedis,
    timeout_ms: float = PATIENT,
    recognise: Recognise = _recognise,
    *,
    cluster: str = "off",
) -> RedisLink:
    others = {"REDIS_TIMEOUT_MS": f"{timeout_ms:.0f}", "REDIS_CLUSTER": cluster}
    settings = settings_for("postgresql://nobody-asks-it/users", redis.url, **others)
    return RedisLink(settings, recognise)


@asynccontextmanager
async def linked(
    redis: ScriptedRedis, timeout_ms: float = PATIENT, recognise: Recognise = _recognise
) -> AsyncIterator[RedisLink]:
    """A link that has reached its Redis, and leaves nothing."""
    link = link_to(redis, timeout_ms, recognise)
    try:
        await link.start(SOON)
        assert link.reachable
        yield link
    finally:
        await link.close()


async def say(link: RedisLink, *words: bytes) -> list[Any]:
    """Run a command for each word, whose answer is the word; fails if that takes too long."""
    async with asyncio.timeout(SOON):
        return await link.run([("SAY", word) for word in words])


async def works(link: RedisLink) -> bool:
    """Whether calls are answered again, by what was asked."""
    (answer,) = await say(link, b"works")
    assert answer in (b"works", UNREACHABLE)
    return bool(answer == b"works")


@contextmanager
def told() -> Iterator[list[str]]:
    """Collect what is logged."""
    names: list[str] = []
    with capture_logs() as logged:
        yield names
        names += [_name(entry) for entry in logged]


def _name(entry: EventDict) -> str:
    return str(entry["event"])


def is_refusal(reply: object, text: str) -> bool:
    return isinstance(reply, ResponseError) and str(reply) == text


# Each gets its own.

VALUES = st.recursive(
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.binary(max_size=40)
    | st.builds(lambda byte, size: byte * size, st.binary(min_size=1, max_size=1), st.just(70_000)),
    lambda values: st.lists(values, max_size=4),
    max_leaves=8,
)
REFUSALS = st.from_regex(r"(ERR|WRONGTYPE) [a-z]{0,20}", fullmatch=True).map(ResponseError)
KEYS = st.lists(st.text("abc", max_size=3), min_size=1, max_size=5)
CALLS = st.lists(
    st.tuples(
        st.lists(VALUES | REFUSALS, max_size=4) | KEYS.map(tuple),
        st.integers(0, 4),  # turns of the event loop until it is asked
        st.none() | st.integers(0, 8),  # turns until it is cancelled
    ),
    min_size=1,
    max_size=12,
)
PIECES = st.lists(st.integers(1, 30) | st.integers(1, 100_000), min_size=1, max_size=20)


class Chopping:
    """Answers SAY by the reply that is its argument, and all in pieces of these sizes."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = itertools.cycle(sizes)
        self._owed = b""
        self._saying: asyncio.Task[None] | None = None

    def __call__(self, connection: Connection, words: Words) -> None:
        self._owed += encoded(words[1:]) if words[0] == b"MGET" else words[1]
        if self._saying is None or self._saying.done():
            self._saying = asyncio.create_task(self._say(connection))

    async def _say(self, connection: Connection) -> None:
        while self._owed:
            # In a thousand pieces at most: many more take longer than a call may.
            size = max(next(self._sizes), len(self._owed) // 1000)
            piece, self._owed = self._owed[:size], self._owed[size:]
            connection.say(piece)
            # What is said in one turn may be heard as one.
            for _ in range(2):
                await asyncio.sleep(0)


def same(replies: list[Any], expected: Sequence[Any]) -> bool:
    """Whether the replies are those; exceptions are compared by what they say."""
    shown = [
        [str(value) if isinstance(value, ResponseError) else value for value in values]
        for values in (replies, expected)
    ]
    return shown[0] == shown[1]


@examples(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CALLS, PIECES)
async def test_each_call_gets_its_own_replies_however_they_come(
    calls: list[tuple[list[Any] | tuple[str, ...], int, int | None]], sizes: list[int]
) -> None:
    redis = ScriptedRedis()
    redis.answer = Chopping(sizes)

    async def ask(link: RedisLink, wanted: list[Any] | tuple[str, ...], turns: int) -> list[Any]:
        for _ in range(turns):
            await asyncio.sleep(0)
        if isinstance(wanted, tuple):
            return await link.strings(wanted)
        return await link.run([("SAY", encoded(value)) for value in wanted])

    with open_dir() as directory:
        async with redis.listening(directory), linked(redis) as link:
            loop = asyncio.get_running_loop()
            tasks = []
            for wanted, turns, until_cancelled in calls:
                tasks.append(loop.create_task(ask(link, wanted, turns)))
                if until_cancelled is not None:
                    for _ in range(until_cancelled):
                        await asyncio.sleep(0)
                    tasks[-1].cancel()
            async with asyncio.timeout(SOON):
                answers = await asyncio.gather(*tasks, return_exceptions=True)
            for (wanted, _, until_cancelled), answer in zip(calls, answers, strict=True):
                if isinstance(answer, asyncio.CancelledError):
                    assert until_cancelled is not None
                    continue
                assert isinstance(answer, list)
                expected = [w.encode() for w in wanted] if isinstance(wanted, tuple) else wanted
                assert same(answer, expected)
            afterwards = await link.run([("SAY", encoded(b"afterwards"))])
            assert afterwards == [b"afterwards"]
            assert len(redis.open) == 1


async def test_calls_of_one_turn_go_out_at_once_and_by_one_connection(redis: ScriptedRedis) -> None:
    async with linked(redis) as link:
        redis.answer = nothing
        calls = [asyncio.ensure_future(say(link, b"%d" % number)) for number in range(1000)]
        await until(lambda: len(redis.asked) == 1000, SOON)
        assert len(redis.wire.asked) == 1000
        redis.wire.say(b"".join(encoded(words[1]) for words in redis.wire.asked))
        assert await asyncio.gather(*calls) == [[b"%d" % number] for number in range(1000)]


async def test_a_cancelled_call_takes_no_reply_of_another(redis: ScriptedRedis) -> None:
    async with linked(redis) as link:
        redis.answer = nothing
        calls = [asyncio.ensure_future(say(link, b"%da" % i, b"%db" % i)) for i in range(5)]
        await until(lambda: len(redis.asked) == 10, SOON)
        for cancelled in (calls[0], calls[2], calls[4]):
            cancelled.cancel()
        redis.wire.say(b"".join(encoded(words[1]) for words in redis.wire.asked))
        assert await calls[1] == [b"1a", b"1b"]
        assert await calls[3] == [b"3a", b"3b"]
        redis.answer = echo
        assert await say(link, b"next") == [b"next"]
        assert len(redis.open) == 1


async def test_a_refusal_answers_its_own_command_only(redis: ScriptedRedis) -> None:
    def refusing(connection: Connection, words: Words) -> None:
        refusal = ResponseError("ERR no")
        connection.say(encoded(refusal if words[1] == b"b" else words[1]))

    async with linked(redis) as link:
        redis.answer = refusing
        with told() as names:
            first, refused, last = await say(link, b"a", b"b", b"c")
            assert await say(link, b"d") == [b"d"]
        assert (first, last) == (b"a", b"c")
        assert is_refusal(refused, "ERR no")
        assert link.reachable
    assert names == []


async def test_a_command_that_cannot_be_sent_costs_no_other(redis: ScriptedRedis) -> None:
    async with linked(redis) as link:
        with pytest.raises(TypeError):
            await link.run([("SAY", b"fine"), ("SAY", None)])
        assert await say(link, b"next") == [b"next"]
        assert len(redis.open) == 1


async def test_no_commands_have_no_replies(redis: ScriptedRedis) -> None:
    async with linked(redis) as link:
        assert await link.run([]) == []
        assert redis.asked == []


# Strings.


async def test_strings_are_those_of_their_keys(redis: ScriptedRedis) -> None:
    def some(connection: Connection, words: Words) -> None:
        connection.say(encoded([None if key == b"none" else key for key in words[1:]]))

    async with linked(redis) as link:
        redis.answer = some
        assert await link.strings(["a", "none", "b"]) == [b"a", None, b"b"]
        assert await link.strings(["none"]) == [None]


async def test_many_strings_are_asked_for_by_commands_of_a_thousand(redis: ScriptedRedis) -> None:
    def some(connection: Connection, words: Words) -> None:
        refusal = ResponseError("ERR not these")
        connection.say(encoded(refusal if words[1] == b"1000" else list(words[1:])))

    async with linked(redis) as link:
        redis.answer = some
        found = await link.strings([str(number) for number in range(2500)])
        assert [len(words) - 1 for words in redis.asked] == [1000, 1000, 500]
        assert all(is_refusal(reply, "ERR not these") for reply in found[1000:2000])
        read = [*range(1000), *range(2000, 2500)]
        assert found[:1000] + found[2000:] == [str(number).encode() for number in read]
        assert await link.strings([]) == []


async def test_strings_that_are_refused_are_so_for_each_key(redis: ScriptedRedis) -> None:
    async with linked(redis) as link:
        redis.answer = lambda connection, _words: connection.say(b"-OOM no memory\r\n")
        refused = await link.strings(["a", "b", "c"])
        assert len(refused) == 3
        assert all(is_refusal(reply, "OOM no memory") for reply in refused)
        assert link.reachable


async def test_strings_of_a_closed_link_are_unreachable_each(redis: ScriptedRedis) -> None:
    async with linked(redis) as link:
        await link.close()
        assert await link.strings(["a", "b"]) == [UNREACHABLE] * 2
        assert await link.run([("SAY", b"a"), ("SAY", b"b")]) == [UNREACHABLE] * 2
        assert redis.asked == []


async def test_strings_of_a_redis_that_is_down_are_unreachable_each(redis: ScriptedRedis) -> None:
    redis.accepts = False
    link = link_to(redis, IMPATIENT)
    assert await link.strings(["a", "b"]) == [UNREACHABLE] * 2
    await link.close()


async def test_strings_that_are_not_answered_are_unreachable_each(redis: ScriptedRedis) -> None:
    async with linked(redis, IMPATIENT) as link:
        redis.answer = nothing
        assert await link.strings(["a", "b", "c"]) == [UNREACHABLE] * 3


# What is not answered.


async def test_what_is_not_answered_in_time_costs_all_who_wait(redis: ScriptedRedis) -> None:
    async with linked(redis, IMPATIENT) as link:
        redis.answer = nothing
        old = redis.wire
        with told() as names:
            began = time.monotonic()
            answers = await asyncio.gather(*(say(link, b"a", b"b") for _ in range(5)))
            took = time.monotonic() - began
        assert answers == [[UNREACHABLE] * 2] * 5
        assert TIMEOUT * 0.9 < took < BOUND
        assert names == ["redis.unreachable"]
        async with asyncio.timeout(SOON):
            await old.ended.wait()


async def test_who_asks_later_waits_no_longer_than_the_first(redis: ScriptedRedis) -> None:
    async with linked(redis, IMPATIENT) as link:
        redis.answer = nothing
        first = asyncio.ensure_future(say(link, b"first"))
        await asyncio.sleep(TIMEOUT / 2)
        began = time.monotonic()
        assert await say(link, b"second") == [UNREACHABLE]
        assert time.monotonic() - began < BOUND - TIMEOUT / 2
        assert await first == [UNREACHABLE]


async def test_each_call_has_its_whole_time(redis: ScriptedRedis) -> None:
    """One that is answered late, but in time, takes nothing of the others' times."""
    loop = asyncio.get_running_loop()
    timeout = 1.0

    def late(connection: Connection, words: Words) -> None:
        loop.call_later(timeout * 0.7, echo, connection, words)

    async with linked(redis, 3000 * timeout) as link:
        redis.answer = late
        calls = []
        for number in range(6):
            calls.append(asyncio.ensure_future(say(link, b"%d" % number)))
            await asyncio.sleep(timeout * 0.3)
        assert await asyncio.gather(*calls) == [[b"%d" % number] for number in range(6)]
        assert len(redis.open) == 1


@pytest.mark.parametrize("way", ["refuses", "is silent"])
async def test_nothing_is_asked_until_a_probe_has_succeeded(redis: ScriptedRedis, way: str) -> None:
    async with linked(redis, IMPATIENT) as link:
        redis.answer = nothing
        old = redis.wire
        redis.accepts, redis.greets = way != "refuses", way != "is silent"
        assert await say(link, b"lost") == [UNREACHABLE]
        assert not link.reachable
        asked = len(redis.asked)
        end = time.monotonic() + 5 * PROBE_INTERVAL
        with told() as names:
            while time.monotonic() < end:
                began = time.monotonic()
                assert await say(link, b"not asked") == [UNREACHABLE]
                assert time.monotonic() - began < TIMEOUT
                assert await link.strings(["not", "asked"]) == [UNREACHABLE] * 2
                assert not await link.ping()
                await asyncio.sleep(0.01)
        assert names == []
        assert len(redis.asked) == asked
        redis.answer, redis.accepts, redis.greets = echo, True, True
        with told() as names:
            await until(lambda: works(link), SOON)
        assert names == ["redis.reachable"]
        assert redis.wire is not old
        assert redis.wire.asked[-1] == [b"SAY", b"works"]


async def test_a_reply_that_comes_too_late_reaches_nobody(redis: ScriptedRedis) -> None:
    async with linked(redis, IMPATIENT) as link:
        redis.answer = nothing
        old = redis.wire
        assert await say(link, b"late") == [UNREACHABLE]
        redis.answer = echo
        if not old.transport.is_closing():
            old.say(encoded(b"late"))
        await until(lambda: works(link), SOON)
        assert await asyncio.gather(*(say(link, b"%d" % i) for i in range(20))) == [
            [b"%d" % i] for i in range(20)
        ]
        assert [words for words in old.asked if words[1] != b"late"] == []


async def test_a_redis_that_loads_its_data_is_not_there_yet(redis: ScriptedRedis) -> None:
    async with linked(redis) as link:
        redis.loads = True
        began = time.monotonic()
        answers = await asyncio.gather(say(link, b"a", b"b"), say(link, b"c"), link.strings(["d"]))
        assert list(answers) == [[UNREACHABLE] * 2, [UNREACHABLE], [UNREACHABLE]]
        assert time.monotonic() - began < 1
        redis.loads = False
        await until(lambda: works(link), SOON)


async def test_nothing_is_asked_of_a_redis_while_it_loads_its_data(redis: ScriptedRedis) -> None:
    """It says who it is meanwhile, but answers nothing else."""
    async with linked(redis) as link:
        redis.loads = True
        with told() as names:
            end = time.monotonic() + 5 * PROBE_INTERVAL
            while time.monotonic() < end:
                assert await say(link, b"loading") == [UNREACHABLE]
                await asyncio.sleep(0.01)
        assert names == ["redis.unreachable"]
        assert len(redis.asked) == 1
        assert len(redis.connections) <= 10
        redis.loads = False
        await until(lambda: works(link), SOON)


# What is no answer.

GARBAGE = [
    b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    b"\x00\xff\xfe\r\n",
    b"$-7\r\n",
    b"$999999999999999999999\r\n",
    b"*-2\r\n",
    b":one\r\n",
    b"%1\r\n*0\r\n:1\r\n",  # a map by a list, which is no dict of Python's
    b"*1\r\n" * 50,
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
async def test_garbage_costs_all_who_wait_and_no_later_call(
    redis: ScriptedRedis, garbage: bytes
) -> None:
    async with linked(redis, IMPATIENT) as link:

        def answer(connection: Connection, words: Words) -> None:
            connection.say(garbage if words[1] == b"garbage" else encoded(words[1]))

        redis.answer = answer
        began = time.monotonic()
        before, lost = await asyncio.gather(say(link, b"before"), say(link, b"garbage"))
        assert time.monotonic() - began < BOUND
        assert before == [b"before"]
        assert lost == [UNREACHABLE]
        await until(lambda: works(link), SOON)
        assert await say(link, b"after") == [b"after"]


@examples(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(min_size=1, max_size=60)
    | st.text("+-:$*_,#!=(~%>0123\r\n", min_size=1).map(str.encode)
)
async def test_whatever_is_answered_ends_every_call_and_is_recovered_from(garbage: bytes) -> None:
    redis = ScriptedRedis()
    with open_dir() as directory:
        async with redis.listening(directory), linked(redis, IMPATIENT) as link:
            redis.answer = lambda connection, _words: connection.say(garbage)
            replies = await asyncio.gather(say(link, b"a"), say(link, b"b", b"c"))
            assert [len(some) for some in replies] == [1, 2]
            # What looks like a reply is one. The connection that it came by may not be trusted.
            for connection in redis.open:
                connection.end()
            redis.answer = echo
            await until(lambda: works(link), SOON)
            assert await say(link, b"after", b"it") == [b"after", b"it"]


async def test_a_reply_that_nobody_asked_for_ends_the_connection(redis: ScriptedRedis) -> None:
    async with linked(redis) as link:
        old = redis.wire
        old.say(encoded(b"unasked"))
        async with asyncio.timeout(SOON):
            await old.ended.wait()
        await until(lambda: works(link), SOON)
        assert await say(link, b"a", b"b") == [b"a", b"b"]


async def test_a_reply_too_many_is_given_to_nobody(redis: ScriptedRedis) -> None:
    async with linked(redis) as link:
        redis.answer = lambda connection, words: connection.say(encoded(words[1]) * 2)
        assert await say(link, b"twice") == [b"twice"]
        redis.answer = echo
        await until(lambda: works(link), SOON)
        assert await say(link, b"a", b"b") == [b"a", b"b"]


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("half", [b"", b"$10\r\nhalf", b"*2\r\n$1\r\na\r\n"])
async def test_a_connection_cut_in_the_middle_of_a_reply(
    redis: ScriptedRedis, half: bytes, how: str
) -> None:
    def cut(connection: Connection, words: Words) -> None:
        if words[1] == b"cut":
            connection.say(half)
            getattr(connection, how)()
        else:
            echo(connection, words)

    async with linked(redis) as link:
        redis.answer = cut
        with told() as names:
            calls = (say(link, b"before"), say(link, b"cut"), say(link, b"behind"))
            _before, *lost = await asyncio.gather(*calls)
        assert lost == [[UNREACHABLE], [UNREACHABLE]]
        assert names[:1] == ["redis.unreachable"]
        await until(lambda: works(link), SOON)


# A connection that ends while nobody asks.


@pytest.mark.parametrize("way", ["unix", "tcp"])
@pytest.mark.parametrize("how", ["end", "reset"])
async def test_an_idle_connection_that_ends_is_made_anew_and_costs_no_call(
    way: str, how: str
) -> None:
    redis = ScriptedRedis()
    with open_dir() as directory:
        async with redis.listening(directory if way == "unix" else None), linked(redis) as link:
            for _ in range(3):
                # One that ends as soon as it is made is not made anew at once.
                await asyncio.sleep(PROBE_INTERVAL)
                old = redis.wire
                with told() as names:
                    getattr(old, how)()
                    async with asyncio.timeout(SOON):
                        await old.ended.wait()
                    # Until the link has heard of it; what is asked before is lost with it.
                    await until(lambda: len(redis.open) == 1 or not link.reachable, SOON)
                    assert await say(link, b"next") == [b"next"]
                    assert await link.strings(["a"]) == [b"a"]
                assert names == []
                assert redis.wire is not old


async def test_an_idle_connection_that_ends_with_its_redis_is_told_of(redis: ScriptedRedis) -> None:
    async with linked(redis, IMPATIENT) as link:
        redis.accepts = False
        await asyncio.sleep(PROBE_INTERVAL)  # what is lost sooner is not looked for at once
        with told() as names:
            redis.wire.end()
            await until(lambda: not link.reachable, SOON)
            assert await say(link, b"lost") == [UNREACHABLE]
        assert names == ["redis.unreachable"]
        redis.accepts = True
        await until(lambda: works(link), SOON)


async def test_a_redis_that_ends_every_connection_is_not_stormed(redis: ScriptedRedis) -> None:
    """It greets, and ends what it has greeted: as a proxy before a Redis that just went."""
    async with linked(redis) as link:
        made = len(redis.connections)
        end = time.monotonic() + 5 * PROBE_INTERVAL
        while time.monotonic() < end:
            for connection in redis.open:
                if connection.is_greeted:
                    connection.end()
            await asyncio.sleep(0)
        assert len(redis.connections) - made < 20
        await until(lambda: works(link), SOON)


# A busy event loop.


@pytest.mark.parametrize("calls", [1, 20])
async def test_what_has_come_while_the_event_loop_was_busy_is_in_time(
    redis: ScriptedRedis, calls: int
) -> None:
    def answer(connection: Connection, _words: Words) -> None:
        if len(connection.asked) == calls:
            connection.say_at_once(b"".join(encoded(words[1]) for words in connection.asked))
            time.sleep(3 * TIMEOUT)  # nothing else happens in this process

    async with linked(redis, IMPATIENT) as link:
        redis.answer = answer
        with told() as names:
            answers = await asyncio.gather(*(say(link, b"%d" % i) for i in range(calls)))
        assert answers == [[b"%d" % i] for i in range(calls)]
        assert names == []


@pytest.mark.parametrize("kind", ["asleep", "at work"])
async def test_a_redis_has_its_time_after_the_event_loop_was_busy(
    redis: ScriptedRedis, kind: str
) -> None:
    loop = asyncio.get_running_loop()

    def answer(connection: Connection, words: Words) -> None:
        end = time.monotonic() + 1.5 * TIMEOUT
        if kind == "asleep":
            time.sleep(1.5 * TIMEOUT)
        while time.monotonic() < end:
            pass
        loop.call_later(TIMEOUT / 3, echo, connection, words)

    async with linked(redis, IMPATIENT) as link:
        redis.answer = answer
        with told() as names:
            assert await say(link, b"late") == [b"late"]
        assert names == []


@bounded_in_time
async def test_what_has_come_counts_when_all_extensions_are_used_up(redis: ScriptedRedis) -> None:
    loop = asyncio.get_running_loop()
    go_on = asyncio.Event()

    def hold_up(times: int) -> None:
        if times < EXTENSIONS:
            loop.call_later(1.6 * TIMEOUT, hold_up, times + 1)
            time.sleep(1.5 * TIMEOUT)
        else:
            go_on.set()

    def answer(connection: Connection, words: Words) -> None:
        if words[1] == b"late":
            hold_up(0)
        else:
            # By a socket and not by a timer: after a socket uvloop looks at its timers at once.
            connection.say_at_once(encoded(b"late") + encoded(words[1]))
            time.sleep(1.5 * TIMEOUT)

    async with linked(redis, IMPATIENT) as link:
        redis.answer = answer
        with told() as names:
            late = asyncio.ensure_future(say(link, b"late"))
            await go_on.wait()
            assert await say(link, b"another") == [b"another"]
            assert await late == [b"late"]
        assert names == []


async def test_an_event_loop_that_is_always_busy_waits_no_longer_than_three_times(
    redis: ScriptedRedis,
) -> None:
    def hold_up() -> None:
        time.sleep(TIMEOUT / 10)

    async def be_busy() -> None:
        while True:
            hold_up()
            await asyncio.sleep(0)

    async with linked(redis, IMPATIENT) as link:
        redis.answer = nothing
        busy = asyncio.create_task(be_busy())
        began = time.monotonic()
        assert await say(link, b"lost") == [UNREACHABLE]
        assert time.monotonic() - began < BOUND
        busy.cancel()


# Strangers.


class Recognising:
    """Notes who is to be recognised, and what had been asked by then; returns when it is let."""

    def __init__(self, redis: ScriptedRedis) -> None:
        self.seen: list[tuple[str, Collection[int], int]] = []
        self.begun = asyncio.Event()
        self.let = asyncio.Event()
        self.let.set()
        self.failures = 0
        self._redis = redis

    async def __call__(self, identity: str, buckets: Collection[int]) -> None:
        self.seen.append((identity, buckets, len(self._redis.asked)))
        self.begun.set()
        await self.let.wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError

    @property
    def identities(self) -> list[str]:
        return [identity for identity, _, _ in self.seen]


@pytest.mark.parametrize("new", ["run_id", "replication_id"])
async def test_a_stranger_is_recognised_before_anything_is_asked_of_it(
    redis: ScriptedRedis, new: str
) -> None:
    recognise = Recognising(redis)
    async with linked(redis, IMPATIENT, recognise) as link:
        assert await say(link, b"known") == [b"known"]
        asked = len(redis.asked)
        setattr(redis, new, "another")
        recognise.begun.clear()
        recognise.let.clear()
        redis.wire.end()
        async with asyncio.timeout(SOON):
            await recognise.begun.wait()
        for _ in range(5):
            assert await say(link, b"not asked") == [UNREACHABLE]
            assert await link.strings(["not asked"]) == [UNREACHABLE]
        assert not link.reachable
        assert len(redis.asked) == asked
        recognise.let.set()
        await until(lambda: works(link), SOON)
    assert [len(recognise.seen), len(set(recognise.identities))] == [2, 2]
    assert recognise.seen[-1][1:] == (ALL_BUCKETS, asked)


async def test_nothing_is_asked_of_a_stranger_that_cannot_be_made_known(
    redis: ScriptedRedis,
) -> None:
    recognise = Recognising(redis)
    async with linked(redis, IMPATIENT, recognise) as link:
        redis.run_id = "another"
        recognise.failures = 3
        redis.wire.end()
        while recognise.failures:
            assert await say(link, b"not asked") == [UNREACHABLE]
            assert redis.asked == []
            await asyncio.sleep(0.01)
        await until(lambda: works(link), SOON)
    assert len(recognise.seen) == 5
    assert [asked for _, _, asked in recognise.seen] == [0] * 5


async def test_one_stranger_after_another_is_recognised(redis: ScriptedRedis) -> None:
    """It is another again when it was recognised: that one is not known."""
    recognise = Recognising(redis)
    async with linked(redis, IMPATIENT, recognise) as link:
        redis.run_id = "second"
        recognise.begun.clear()
        recognise.let.clear()
        redis.wire.end()
        async with asyncio.timeout(SOON):
            await recognise.begun.wait()
        redis.run_id = "third"
        recognise.let.set()
        await until(lambda: works(link), SOON)
    assert len(set(recognise.identities)) == 3
    assert "third" in recognise.identities[-1]


async def test_who_is_known_is_not_recognised_again(redis: ScriptedRedis) -> None:
    recognise = Recognising(redis)
    async with linked(redis, PATIENT, recognise) as link:
        for _ in range(3):
            old = redis.wire
            old.end()
            async with asyncio.timeout(SOON):
                await old.ended.wait()
            await until(lambda: works(link), SOON)
    assert len(recognise.seen) == 1


async def test_whoever_fails_to_recognise_is_asked_again(redis: ScriptedRedis) -> None:
    """Whatever it raises: nobody else would ever ask Redis again."""
    failing = iter([ValueError, RuntimeError])

    async def recognise(_identity: str, _buckets: Collection[int]) -> None:
        for error in failing:
            raise error

    with told() as names:
        async with linked(redis, IMPATIENT, recognise) as link:
            assert await say(link, b"works") == [b"works"]
    assert names.count("redis.failed") == 2


# The end.


async def close_and_look(link: RedisLink, redis: ScriptedRedis, before: set[Any]) -> None:
    """Close a link, and see that nothing of it is left."""
    async with asyncio.timeout(SOON):
        await link.close()
    await until(lambda: not redis.open, SOON)
    assert asyncio.all_tasks() - before == set()
    made = len(redis.connections)
    assert await say(link, b"closed") == [UNREACHABLE]
    await asyncio.sleep(2 * PROBE_INTERVAL)
    assert len(redis.connections) == made
    assert asyncio.all_tasks() - before == set()


@pytest.fixture
def nothing_unclosed() -> Iterator[None]:
    """What is left open is told of when it is collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        yield
        gc.collect()


@pytest.mark.usefixtures("nothing_unclosed")
async def test_a_closed_link_leaves_nothing(redis: ScriptedRedis) -> None:
    before = asyncio.all_tasks()
    link = link_to(redis)
    await link.start(SOON)
    assert await say(link, b"a") == [b"a"]
    await close_and_look(link, redis, before)


@pytest.mark.usefixtures("nothing_unclosed")
async def test_calls_under_way_are_answered_when_the_link_is_closed(redis: ScriptedRedis) -> None:
    before = asyncio.all_tasks()
    link = link_to(redis)
    await link.start(SOON)
    redis.answer = nothing
    call = asyncio.ensure_future(say(link, b"a", b"b"))
    await until(lambda: len(redis.asked) == 2, SOON)
    await link.close()
    redis.wire.say(encoded(b"a") + encoded(b"b"))
    assert await call == [b"a", b"b"]
    await close_and_look(link, redis, before)


@pytest.mark.usefixtures("nothing_unclosed")
@pytest.mark.parametrize("how", ["silent", "end", "garbage"])
async def test_calls_under_way_that_are_not_answered_are_unreachable_when_the_link_is_closed(
    redis: ScriptedRedis, how: str
) -> None:
    before = asyncio.all_tasks()
    link = link_to(redis, IMPATIENT)
    await link.start(SOON)
    redis.answer = nothing
    call = asyncio.ensure_future(say(link, b"a", b"b"))
    await until(lambda: len(redis.asked) == 2, SOON)
    with told() as names:
        await link.close()
        if how == "end":
            redis.wire.end()
        elif how == "garbage":
            redis.wire.say(b"garbage\r\n")
        assert await call == [UNREACHABLE] * 2
        await close_and_look(link, redis, before)
    assert names == []


@pytest.mark.usefixtures("nothing_unclosed")
@pytest.mark.parametrize("state", ["refused", "silent", "being recognised", "failed"])
async def test_a_link_that_has_not_reached_its_redis_is_closed(
    redis: ScriptedRedis, state: str
) -> None:
    before = asyncio.all_tasks()
    recognise = Recognising(redis)
    redis.accepts = state != "refused"
    redis.greets = state != "silent"
    if state == "being recognised":
        recognise.let.clear()
    if state == "failed":
        recognise.failures = 10**6
    link = link_to(redis, IMPATIENT, recognise)
    call = asyncio.ensure_future(say(link, b"a"))
    await until(lambda: bool(redis.connections), SOON)
    if state in ("being recognised", "failed"):
        async with asyncio.timeout(SOON):
            await recognise.begun.wait()
    await link.close()
    assert await call == [UNREACHABLE]
    await close_and_look(link, redis, before)


@pytest.mark.usefixtures("nothing_unclosed")
async def test_a_lost_wire_leaves_nothing(redis: ScriptedRedis) -> None:
    before = asyncio.all_tasks()
    link = link_to(redis, IMPATIENT)
    await link.start(SOON)
    redis.answer = nothing
    assert await say(link, b"lost") == [UNREACHABLE]
    redis.answer = echo
    await until(lambda: works(link), SOON)
    assert len(redis.open) == 1
    await close_and_look(link, redis, before)


@pytest.mark.usefixtures("nothing_unclosed")
async def test_a_closed_link_to_a_cluster_follows_nobody() -> None:
    """A call that was under way is sent to another server: that is not looked for any more."""
    before = asyncio.all_tasks()
    redis = ScriptedRedis()
    asked = asyncio.Event()

    def answer(connection: Connection, words: Words) -> None:
        _, _, port = redis.url.rpartition(":")
        if words[0] == b"GET":
            asked.set()
        elif words[0].upper() == b"CLUSTER SLOTS" or words[1].upper() == b"SLOTS":
            connection.say(encoded([[0, 16383, [b"127.0.0.1", int(port), b"id"]]]))
        else:
            nodes = f"id 127.0.0.1:{port}@1 myself,master - 0 0 1 connected 0-16383\n"
            connection.say(encoded(nodes.encode()))

    async with redis.listening():
        redis.answer = answer
        link = link_to(redis, cluster="on")
        await link.start(SOON)
        call = asyncio.ensure_future(link.strings(["a"]))
        async with asyncio.timeout(SOON):
            await asked.wait()
        await link.close()
        (wire,) = (connection for connection in redis.open if [b"GET", b"a"] in connection.asked)
        wire.say(b"-MOVED 1 %b\r\n" % redis.url.removeprefix("redis://").encode())
        async with asyncio.timeout(SOON):
            assert await call == [UNREACHABLE]
        await until(lambda: not redis.open, SOON)
        assert asyncio.all_tasks() - before == set()
