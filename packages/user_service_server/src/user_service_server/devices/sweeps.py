"""What is done to the devices of all users, a few at a time: the long unseen off, others on again.

Each step is a write like any other, so that versions rise, changes are logged and caches follow.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo

from sqlalchemy import ColumnElement
from user_service_schemas import ChangeKind

from ..settings import Settings
from ..storage.database import Database
from ..storage.documents import Documents, Write
from . import repository
from .repository import Found, Page

STALE: Final = "stale"
PAGE = 1000
"""Devices looked at with one statement: by id, for there is no index by what is looked for."""
AT_ONCE = 200
"""Devices changed by one write, whose users nobody else can change meanwhile."""
PAGES_AT_ONCE = 20
"""Pages a nightly sweep looks at for devices to change, before others have their turn."""
NIGHT = 3
"""The hour in which a nightly sweep begins, in the service's own time zone."""
START = "00000000-0000-0000-0000-000000000000"

_Change = Callable[[Write, list[Found]], Awaitable[list[Found]]]


class Step(NamedTuple):
    """What one step of a sweep did."""

    seen: int
    """Devices looked at."""
    changed: int
    users: int
    left: int
    """Devices that were to be changed, and were not: something stood against it."""


class Sweeps:
    """Changes to the devices of all users."""

    def __init__(self, settings: Settings, database: Database, documents: Documents) -> None:
        self._max_active = settings.max_active_devices
        self._stale = timedelta(days=settings.device_stale_days)
        self._database = database
        self._documents = documents

    async def now(self) -> datetime:
        """Return the time by the clock by which devices are seen."""
        async with self._database.reading() as connection:
            return await repository.read_clock(connection)

    async def estimate(self) -> int:
        """Return about how many devices there are."""
        async with self._database.reading() as connection:
            return await repository.estimate(connection)

    async def prune(self, seen_before: datetime) -> AsyncIterator[Step]:
        """Deactivate the devices that were not seen since, as `stale`."""
        which = repository.is_stale(seen_before)

        async def switch_off(write: Write, found: list[Found]) -> list[Found]:
            return await self._switch_off(write, found, which)

        async for step in self._sweep(which, switch_off):
            yield step

    async def reactivate(self, since: datetime, reason: str) -> AsyncIterator[Step]:
        """Activate the devices again that were deactivated since, for this reason.

        The most recently seen first, and of no user more than may be active.
        """
        which = repository.is_off(reason, since)

        async def switch_on(write: Write, found: list[Found]) -> list[Found]:
            rows = await write.lock_users(*{device.user_id for device in found})
            on = await repository.switch_on(write.connection, list(rows), which, self._max_active)
            for device in on:
                write.changed(device.user_id, ChangeKind.DEVICE_UPDATED)
            return on

        async for step in self._sweep(which, switch_on):
            yield step

    async def nightly(self, is_night: bool) -> int:
        """Deactivate a few of those that were not seen for `DEVICE_STALE_DAYS`; returns how many.

        Begins `is_night`, once in 20 hours, and goes on where it was: in whichever process, one at
        a time. None: it is done, or has to wait.
        """
        for _ in range(PAGES_AT_ONCE):
            async with self._documents.write(None) as write:
                page, changed = None, 0
                sweep = await repository.take_sweep(write.connection)
                begins = sweep is not None and sweep.after is None and sweep.is_due and is_night
                after = START if begins else sweep and sweep.after
                if sweep is not None and after is not None:
                    which = repository.is_stale(sweep.now - self._stale)
                    page = await self._page(write, after, which)
                    if page.wanted:
                        changed = len(await self._switch_off(write, page.wanted, which))
                    await repository.note_sweep(write.connection, page.last, begins=begins)
                await write.conclude(lambda: None)
            if changed or page is None or page.last is None:
                return changed
        return 0

    async def _sweep(self, which: ColumnElement[bool], change: _Change) -> AsyncIterator[Step]:
        after: str | None = START
        while after is not None:
            async with self._database.reading() as connection:
                page = _cut(await repository.read_page(connection, after, which, PAGE))
            changed: list[Found] = []
            if page.wanted:
                async with self._documents.write(None) as write:
                    changed = await change(write, page.wanted)
                    await write.conclude(lambda: None)
            yield Step(
                seen=page.seen,
                changed=len(changed),
                users=len({device.user_id for device in changed}),
                left=len(set(page.wanted) - set(changed)),
            )
            after = page.last

    async def _page(self, write: Write, after: str, which: ColumnElement[bool]) -> Page:
        return _cut(await repository.read_page(write.connection, after, which, PAGE))

    async def _switch_off(
        self, write: Write, found: list[Found], which: ColumnElement[bool]
    ) -> list[Found]:
        await write.lock_users(*{device.user_id for device in found})
        # Under the lock, once more those that are to be: some were seen meanwhile.
        ids = [device.id for device in found]
        off = await repository.lock_devices(write.connection, ids, which)
        await repository.switch_off(write.connection, {device.id: STALE for device in off})
        for device in off:
            write.changed(device.user_id, ChangeKind.DEVICE_UPDATED)
        return off


def is_night(now: datetime, timezone: str) -> bool:
    """Whether it is the hour in which a nightly sweep begins."""
    return now.astimezone(ZoneInfo(timezone)).hour == NIGHT


def _cut(page: Page) -> Page:
    """End a page where there is enough for one write."""
    if len(page.wanted) <= AT_ONCE:
        return page
    wanted = page.wanted[:AT_ONCE]
    return Page(seen=page.seen * AT_ONCE // len(page.wanted), wanted=wanted, last=wanted[-1].id)
