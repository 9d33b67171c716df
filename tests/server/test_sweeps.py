"""Sweeps over all devices: the long unseen off, those that were switched off wrongly on again."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import asyncpg
import httpx
import msgspec
import pytest
from user_service_server.app import opened_sweeps
from user_service_server.devices.sweeps import AT_ONCE, Sweeps, is_night
from user_service_server.settings import Settings

from ..engines import settings_for
from .test_cli import run
from .test_devices import listed, new_token, post, shown, someone
from .test_documents import held_after
from .test_feedback import crowd, push, report
from .test_users import changes_of, fetch, rows

AGE = "UPDATE devices SET last_seen_at = now() - make_interval(days => $2) WHERE token = $1"


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    """Of the server, which does not sweep by itself."""
    return settings_for(database_url, redis_url, PASSWORD_REQUIRED="false")


@pytest.fixture
def urls(database_url: str, redis_url: str) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "REDIS_TIMEOUT_MS": "5000"}


@asynccontextmanager
async def sweeping(settings: Settings) -> AsyncIterator[Sweeps]:
    """Another process' sweeps."""
    stale = msgspec.structs.replace(settings, device_stale_days=270)
    async with opened_sweeps(stale) as sweeps:
        yield sweeps


async def command(directory: Path, *arguments: str, **environ: str) -> tuple[int, str, str]:
    return await asyncio.to_thread(run, directory, "devices", *arguments, **environ)


async def test_prune_deactivates_what_was_not_seen(
    http: httpx.AsyncClient, database_url: str, tmp_path: Path, urls: dict[str, str]
) -> None:
    user_id, other, tokens = await someone(http), await someone(http), [new_token(), new_token()]
    for token in tokens:
        await post(http, user_id, token)
    kept = new_token()
    await post(http, other, kept)
    await rows(database_url, AGE, tokens[0], 271)
    await rows(database_url, AGE, tokens[1], 269)
    untouched = await fetch(http, other)
    await fetch(http, user_id)
    code, output, errors = await command(tmp_path, "prune", "--older-than", "270d", **urls)
    assert (code, output) == (0, "Deactivated 1 devices of 1 users.\n"), errors
    assert await shown(http, user_id) == tokens[1:], "cached and as Postgres has it"
    off = next(device for device in await listed(http, user_id) if not device["active"])
    assert (off["token"], off["inactive_reason"]) == (tokens[0], "stale")
    assert (await changes_of(database_url, user_id))[3:] == [(4, "device.updated")]
    assert await fetch(http, other) == untouched
    code, output, _ = await command(tmp_path, "prune", "--older-than", "270d", **urls)
    assert (code, output) == (0, "Deactivated 0 devices of 0 users.\n")
    await post(http, user_id, tokens[0])
    assert await shown(http, user_id) == tokens, "the app came back"


async def test_what_is_seen_during_the_sweep_stays(
    http: httpx.AsyncClient, database_url: str, settings: Settings
) -> None:
    user_id, tokens = await someone(http), [new_token(), new_token()]
    for token in tokens:
        await post(http, user_id, token)
        await rows(database_url, AGE, token, 3000)
    async with sweeping(settings) as sweeps:
        with held_after("is_wanted") as held:

            async def prune() -> int:
                before = await sweeps.now() - timedelta(days=2900)
                return sum([step.changed async for step in sweeps.prune(before)])

            pruned = asyncio.create_task(prune())
            await held.reached.wait()
            await post(http, user_id, tokens[0])
            held.let_go()
            assert await pruned == 1
    assert await shown(http, user_id) == tokens[:1]


async def test_a_sweep_takes_a_few_at_a_time_and_all_in_the_end(
    http: httpx.AsyncClient, database_url: str, settings: Settings
) -> None:
    await crowd(database_url, 1500, "stale", seen="2020-01-01T00:00:00Z")
    async with sweeping(settings) as sweeps:
        steps = [step async for step in sweeps.prune(datetime(2021, 1, 1, tzinfo=UTC))]
    assert sum(step.changed for step in steps) == 1500
    assert max(step.changed for step in steps) <= AT_ONCE
    left = await rows(
        database_url, "SELECT count(*) FROM devices WHERE token LIKE 'stale-%' AND active"
    )
    assert left == [(0,)]
    versions = await rows(database_url, "SELECT DISTINCT version FROM users WHERE name ~ '^stale'")
    assert versions == [(2,)]
    ((user_id,),) = await rows(database_url, "SELECT id FROM users WHERE name = 'stale 7'")
    assert (await fetch(http, str(user_id)))["devices"] == []


async def test_reactivate_undoes_what_feedback_did(
    http: httpx.AsyncClient, database_url: str, tmp_path: Path, urls: dict[str, str]
) -> None:
    user_id, tokens = await someone(http), [new_token() for _ in range(4)]
    for token in tokens:
        await post(http, user_id, token)
    before = await fetch(http, user_id)
    await report(http, push(tokens[0]))
    ((since,),) = await rows(database_url, "SELECT clock_timestamp()")
    await report(http, push(tokens[1]), push(tokens[2], "expired"), push(tokens[3]))
    assert await shown(http, user_id) == []
    arguments = ("reactivate", "--since", since.isoformat(), "--reason", "unregistered")
    code, output, errors = await command(tmp_path, *arguments, **urls)
    assert (code, output) == (0, "Reactivated 2 devices of 1 users.\n"), errors
    assert await shown(http, user_id) == [tokens[3], tokens[1]], "in their places"
    after = await fetch(http, user_id)
    assert after["devices"] == [d for d in before["devices"] if d["token"] in tokens[1::2]]
    assert after["version"] == before["version"] + 3
    assert (await changes_of(database_url, user_id))[-1] == (after["version"], "device.updated")
    code, output, _ = await command(tmp_path, *arguments, **urls)
    assert (code, output) == (0, "Reactivated 0 devices of 0 users.\n")


async def test_reactivate_keeps_to_the_cap_and_takes_the_last_seen(
    http: httpx.AsyncClient, database_url: str, tmp_path: Path, urls: dict[str, str]
) -> None:
    user_id, tokens = await someone(http), [new_token() for _ in range(4)]
    for token in tokens:
        await post(http, user_id, token)
    ((since,),) = await rows(database_url, "SELECT clock_timestamp()")
    await post(http, user_id, tokens[0])  # seen last
    await report(http, *(push(token) for token in tokens[:3]))
    arguments = ("reactivate", "--since", since.isoformat(), "--reason", "unregistered")
    code, output, errors = await command(tmp_path, *arguments, **urls, MAX_ACTIVE_DEVICES="3")
    assert code == 0, errors
    assert output == (
        "Reactivated 2 devices of 1 users.\n"
        "1 stay inactive: their users have as many as may be active.\n"
    )
    assert set(await shown(http, user_id)) == {tokens[0], tokens[2], tokens[3]}


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (("prune",), "--older-than"),
        (("prune", "--older-than", "270"), "270d"),
        (("prune", "--older-than", "0d"), "270d"),
        (("reactivate", "--since", "2026-01-02", "--reason", "expired"), "with its offset"),
        (("reactivate", "--since", "then", "--reason", "expired"), "with its offset"),
        (("reactivate", "--since", "2026-01-02T03:04:05Z", "--reason", "deactivated"), "--reason"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_argument_is_said(tmp_path: Path, arguments: tuple[str, ...], wrong: str) -> None:
    code, output, errors = run(tmp_path, "devices", *arguments)
    assert (code, output) == (2, "")
    assert wrong in errors
    assert not re.search("Traceback", errors)


async def a_night_of_its_own(database_url: str, name: str) -> str:
    """Let no device be stale, and no sweep have been; returns a prefix that nobody has."""
    await rows(database_url, "UPDATE devices SET last_seen_at = now() WHERE active")
    await rows(
        database_url,
        "UPDATE service_state SET sweep_began_at = '2000-01-01', sweep_after = NULL",
    )
    return f"{name}-{uuid4().hex}"


async def test_the_nightly_sweep_begins_at_night_and_once(
    http: httpx.AsyncClient, database_url: str, settings: Settings
) -> None:
    nightly = await a_night_of_its_own(database_url, "nightly")
    await crowd(database_url, 450, nightly, seen="2020-01-01T00:00:00Z")
    user_id, token = await someone(http), new_token()
    await post(http, user_id, token)
    async with sweeping(settings) as one, sweeping(settings) as other:
        assert await one.nightly(is_night=False) == 0, "by day it does not begin"
        first = await one.nightly(is_night=True)
        assert 0 < first <= AT_ONCE
        assert await rows(database_url, "SELECT sweep_after IS NULL FROM service_state") == [
            (False,)
        ]
        # Whoever comes next goes on where it was, by day, too; and never two at once.
        done = first
        while some := sum(
            await asyncio.gather(one.nightly(is_night=False), other.nightly(is_night=False))
        ):
            assert some <= 2 * AT_ONCE
            done += some
        assert done == 450
        await crowd(database_url, 1, f"{nightly} again", seen="2020-01-01T00:00:00Z")
        assert await one.nightly(is_night=True) == 0, "not twice in one night"
        await rows(
            database_url,
            "UPDATE service_state SET sweep_began_at = sweep_began_at - interval '20 hours'",
        )
        assert await other.nightly(is_night=True) == 1, "the next night"
    reasons = Counter(
        await rows(
            database_url,
            "SELECT inactive_reason FROM devices WHERE token LIKE $1 || '%'",
            nightly,
        )
    )
    assert reasons == {("stale",): 451}
    assert await shown(http, user_id) == [token]


async def test_the_sweep_is_one_processes_at_a_time(database_url: str, settings: Settings) -> None:
    held = await a_night_of_its_own(database_url, "held")
    await crowd(database_url, 3, held, seen="2020-01-01T00:00:00Z")
    holder = await asyncpg.connect(database_url.replace("+asyncpg", ""))
    try:
        async with sweeping(settings) as sweeps:
            await holder.execute(f"SELECT pg_advisory_lock({0x75737377})")
            assert await sweeps.nightly(is_night=True) == 0
            await holder.execute(f"SELECT pg_advisory_unlock({0x75737377})")
            done = [await sweeps.nightly(is_night=True) for _ in range(4)]
            assert (sum(done), done[-1]) == (3, 0)
    finally:
        await holder.close()


def test_night_is_by_the_services_own_zone() -> None:
    three = datetime(2026, 7, 1, 1, 30, tzinfo=UTC)
    assert is_night(three, "Europe/Warsaw")
    assert not is_night(three, "UTC")
