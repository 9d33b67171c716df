"""A client whose process forks, whose event loop ends, that is closed too early or never."""

from __future__ import annotations

import asyncio
import gc
import ssl
import subprocess
import sys
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
from user_service_client import (
    Hooks,
    NotSent,
    RetryEvent,
    User,
    UserServiceClient,
    UserServiceError,
)
from user_service_client._aiohttp import tls_context

from tests.client.conftest import ETAG, USER, envelope
from tests.client.forking import PROGRAMS
from tests.client.threaded import ThreadedService, threaded_service
from tests.system.trouble import until

WITHIN = 10.0
"""Seconds that nothing here takes; a hang does."""


@pytest.fixture
def threaded() -> Iterator[ThreadedService]:
    with threaded_service() as service:
        yield service


def run(work: Awaitable[object]) -> None:
    """Run in an event loop of its own, which is closed then."""

    async def limited() -> None:
        async with asyncio.timeout(WITHIN):
            await work

    asyncio.run(limited())


async def get(client: UserServiceClient, user_id: str) -> None:
    assert (await client.users.get(user_id)).id == user_id


async def closed(service: ThreadedService) -> None:
    await until(lambda: service.connections() == 0, WITHIN)


# Forks


@pytest.mark.parametrize("program", PROGRAMS)
def test_parent_and_child_both_read_what_they_asked_for(
    threaded: ThreadedService, program: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.client.forking", program, threaded.url],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


# Event loops


def test_a_client_goes_on_in_a_second_loop(threaded: ThreadedService) -> None:
    client = UserServiceClient(threaded.url)
    for number in range(3):
        run(get(client, f"user-{number}"))
        assert threaded.connections() <= 1
    run(get(client, "user-0"))
    assert len(threaded.asked) == 3, "copies are kept"
    run(client.aclose())
    assert threaded.connections() == 0


@pytest.mark.parametrize("live", [False, True])
def test_a_client_can_be_closed_in_another_loop(threaded: ThreadedService, live: bool) -> None:
    client = UserServiceClient(threaded.url, live=live)
    run(get(client, "user-1"))
    run(client.aclose())
    assert threaded.connections() == 0
    run(client.aclose())


@pytest.mark.parametrize("live", [False, True])
def test_a_client_goes_on_after_a_loop_that_ended_with_calls_under_way(
    threaded: ThreadedService, live: bool
) -> None:
    client = UserServiceClient(threaded.url, live=live, timeout=WITHIN, attempt_timeout=WITHIN)

    async def leave() -> None:
        calls = [client.users.get(f"slow-{i}") for i in range(5)]
        others = [client.users.delete(f"slow-{i}") for i in range(5)]
        tasks = [asyncio.create_task(call) for call in [*calls, *others]]
        await until(lambda: len(threaded.asked) >= len(tasks), WITHIN)

    run(leave())  # asyncio.run cancels them
    run(get(client, "user-1"))
    threaded.let_go.set()
    run(get(client, "slow-1"))
    run(client.aclose())
    assert threaded.connections() == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_client_goes_on_after_a_loop_that_was_closed_under_its_calls(
    threaded: ThreadedService,
) -> None:
    client = UserServiceClient(threaded.url, timeout=WITHIN, attempt_timeout=WITHIN)
    first = asyncio.new_event_loop()
    call = first.create_task(client.users.get("slow-1"))
    first.run_until_complete(until(lambda: len(threaded.asked) == 1, WITHIN))
    first.close()
    threaded.let_go.set()
    run(get(client, "slow-1"))  # it does not join the request of the loop that is over
    run(get(client, "user-1"))
    assert not call.done()
    del call, first
    gc.collect()
    run(client.aclose())
    assert threaded.connections() == 0


def test_a_call_that_waits_for_its_retry_goes_on_when_its_loop_does() -> None:
    answers = iter([503, 200, 200])

    async def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(
            next(answers), content=envelope(USER), headers={"Retry-After": "0", "ETag": ETAG}
        )

    retried: list[RetryEvent] = []
    client = UserServiceClient(
        "http://h", transport=httpx.MockTransport(answer), hooks=Hooks(retry=retried.append)
    )
    first = asyncio.new_event_loop()
    call = first.create_task(client.users.update("a", name="J"))
    first.run_until_complete(until(lambda: bool(retried), WITHIN))
    run(client.users.update("b", name="J"))
    assert first.run_until_complete(asyncio.wait_for(call, WITHIN)).version == 3
    first.run_until_complete(client.aclose())
    first.close()


def test_a_second_thread_is_told_to_make_its_own_client(threaded: ThreadedService) -> None:
    client = UserServiceClient(threaded.url, timeout=WITHIN, attempt_timeout=WITHIN)
    errors: list[BaseException] = []

    def other_thread() -> None:
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: client.users.get("user-2"),
            lambda: client.users.get("slow-1"),  # which the first thread waits for
            lambda: client.users.get_many(["slow-1"]),
            lambda: client.users.delete("user-2"),
            client.health,
            client.aclose,
            client.__aenter__,
        ]
        for call in calls:
            try:
                run(call())
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

    async def first_thread() -> None:
        async with client:
            slow = asyncio.create_task(get(client, "slow-1"))
            await until(lambda: "slow-1" in threaded.asked, WITHIN)
            thread = threading.Thread(target=other_thread)
            thread.start()
            await asyncio.to_thread(thread.join, WITHIN)
            assert not thread.is_alive()
            await get(client, "user-3")
            threaded.let_go.set()
            await slow

    run(first_thread())
    assert [type(error) for error in errors] == [RuntimeError] * 7
    assert all("thread" in str(error) for error in errors)
    assert "user-2" not in threaded.asked


def test_two_threads_may_use_it_one_after_the_other(threaded: ThreadedService) -> None:
    client = UserServiceClient(threaded.url)
    run(get(client, "user-1"))
    thread = threading.Thread(target=run, args=(get(client, "user-2"),))
    thread.start()
    thread.join(WITHIN)
    assert not thread.is_alive()
    run(get(client, "user-3"))
    assert threaded.asked == ["user-1", "user-2", "user-3"]
    run(client.aclose())


# Forgotten


def tasks_of_clients() -> int:
    return sum(task.get_name().startswith("user-service-") for task in asyncio.all_tasks())


async def forget(threaded: ThreadedService, *, live: bool) -> None:
    client = UserServiceClient(threaded.url, live=live)
    await get(client, "user-1")
    if live:
        await until(lambda: threaded.streams == 1, WITHIN)
    assert threaded.connections() == 1 + live


@pytest.mark.parametrize("live", [False, True])
async def test_a_forgotten_client_warns_and_lets_go_of_its_connections(
    threaded: ThreadedService, live: bool
) -> None:
    with pytest.warns(ResourceWarning, match="was not closed"):
        await forget(threaded, live=live)
    await until(lambda: tasks_of_clients() == 0, WITHIN)
    await closed(threaded)
    await until(lambda: threaded.streams == 0, WITHIN)


@pytest.mark.parametrize("live", [False, True])
def test_a_client_that_is_forgotten_after_its_loop_warns_too(
    threaded: ThreadedService, live: bool
) -> None:
    with pytest.warns(ResourceWarning, match="was not closed"):
        run(forget(threaded, live=live))
    assert threaded.connections() == 0


async def test_a_live_client_that_is_forgotten_at_once_does_not_follow_for_ever(
    threaded: ThreadedService,
) -> None:
    async def enter() -> None:
        await UserServiceClient(threaded.url, live=True).__aenter__()

    with pytest.warns(ResourceWarning, match="was not closed"):
        await enter()
    await until(lambda: tasks_of_clients() == 0, WITHIN)
    await closed(threaded)


async def test_a_forgotten_live_client_on_the_transport_of_a_user_stops_following() -> None:
    asked = asyncio.Event()

    async def never(_: httpx.Request) -> httpx.Response:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def enter() -> None:
        transport = httpx.MockTransport(never)
        await UserServiceClient("http://h", transport=transport, live=True).__aenter__()
        await asked.wait()

    with pytest.warns(ResourceWarning, match="was not closed"):
        await enter()
    await until(lambda: tasks_of_clients() == 0, WITHIN)


async def test_a_client_forgotten_with_reads_under_way_ends_them(
    threaded: ThreadedService,
) -> None:
    async def leave() -> None:
        client = UserServiceClient(threaded.url)
        call = asyncio.create_task(client.users.get("slow-1"))
        await until(lambda: threaded.asked == ["slow-1"], WITHIN)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    with pytest.warns(ResourceWarning, match="was not closed"):
        await leave()
    await until(lambda: tasks_of_clients() == 0, WITHIN)
    await closed(threaded)


async def test_a_client_that_was_never_used_does_not_warn(threaded: ThreadedService) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UserServiceClient(threaded.url)
        gc.collect()


# Closed


async def test_closing_twice_and_without_use_does_nothing(threaded: ThreadedService) -> None:
    client = UserServiceClient(threaded.url, live=True)
    await client.aclose()
    await get(client, "user-1")
    await asyncio.gather(client.aclose(), client.aclose())
    await client.aclose()
    await closed(threaded)


@pytest.mark.parametrize("live", [False, True])
async def test_a_closed_client_can_be_used_again(threaded: ThreadedService, live: bool) -> None:
    client = UserServiceClient(threaded.url, live=live)
    for number in range(3):
        async with client:
            await get(client, f"user-{number}")
        await closed(threaded)
    assert tasks_of_clients() == 0


CALLS: dict[str, Callable[[UserServiceClient], Awaitable[object]]] = {
    "read": lambda client: client.users.get("slow-1"),
    "read-with-headers": lambda client: client.users.get("slow-1", headers={"X-Test": "1"}),
    "read-past-the-cache": lambda client: client.users.get_with_etag("slow-1"),
    "write": lambda client: client.users.delete("slow-1"),
}


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("live", [False, True])
async def test_calls_under_way_end_with_an_error_when_the_client_is_closed(
    threaded: ThreadedService,
    make: Callable[[UserServiceClient], Awaitable[object]],
    live: bool,
) -> None:
    client = UserServiceClient(threaded.url, live=live, timeout=WITHIN, attempt_timeout=WITHIN)
    calls = [asyncio.ensure_future(make(client)) for _ in range(3)]
    await until(lambda: any(name != "stream" for name in threaded.asked), WITHIN)
    await asyncio.sleep(0.05)
    asked = len(threaded.asked)
    async with asyncio.timeout(1):
        await client.aclose()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, UserServiceError) for outcome in outcomes), outcomes
    await asyncio.sleep(0.1)
    assert len(threaded.asked) == asked, "nothing is tried again"
    await closed(threaded)
    assert tasks_of_clients() == 0


async def test_a_call_that_waits_for_its_retry_ends_when_the_client_is_closed() -> None:
    asked = 0

    def answer(_: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        return httpx.Response(503, headers={"Retry-After": "1"})

    retried: list[RetryEvent] = []
    client = UserServiceClient(
        "http://h",
        transport=lambda: httpx.MockTransport(answer),
        hooks=Hooks(retry=retried.append),
    )
    call = asyncio.create_task(client.users.delete("user-1"))
    await until(lambda: bool(retried), WITHIN)
    await client.aclose()
    with pytest.raises(UserServiceError):
        await call
    assert asked == 1


@pytest.mark.parametrize("live", [False, True])
async def test_a_block_that_is_left_by_an_exception_closes(
    threaded: ThreadedService, live: bool
) -> None:
    calls: list[asyncio.Future[User]] = []

    async def work() -> None:
        async with UserServiceClient(threaded.url, live=live) as client:
            calls.append(asyncio.ensure_future(client.users.get("slow-1")))
            await until(lambda: "slow-1" in threaded.asked, WITHIN)
            raise ZeroDivisionError

    async with asyncio.timeout(WITHIN):
        with pytest.raises(ZeroDivisionError):
            await work()
    await closed(threaded)
    with pytest.raises(UserServiceError):
        await calls[0]
    assert tasks_of_clients() == 0


async def test_a_caller_that_is_cancelled_while_it_closes_leaves_no_connection(
    threaded: ThreadedService,
) -> None:
    client = UserServiceClient(threaded.url, live=True)
    await get(client, "user-1")
    closer = asyncio.create_task(client.aclose())
    await asyncio.sleep(0)
    closer.cancel()
    await asyncio.gather(closer, return_exceptions=True)
    await client.aclose()
    await closed(threaded)
    assert tasks_of_clients() == 0


async def test_the_context_of_tls_is_made_with_the_first_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes 25 ms, which no call and no loop of a task has to wait for."""
    made: list[bool] = []

    def make(*, verify: bool) -> ssl.SSLContext:
        made.append(verify)
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    monkeypatch.setattr(httpx, "create_ssl_context", make)
    tls_context.cache_clear()
    try:
        UserServiceClient("http://127.0.0.1:1")
        assert made == []
        client = UserServiceClient("HTTPS://127.0.0.1:1", retries=0)
        assert made == [True]
        for _ in range(2):
            with pytest.raises(NotSent):
                await client.users.get("ada")
            await client.aclose()
        UserServiceClient("https://127.0.0.1:1")
        assert made == [True]
    finally:
        tls_context.cache_clear()
