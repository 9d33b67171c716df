"""The SQL of devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    FromClause,
    LargeBinary,
    Row,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    not_,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection
from user_service_schemas import DeviceDetails, RegisterDevice

from ..storage import revisions
from ..storage.direct import Direct, Fields, asking
from ..storage.document import is_one_of
from ..storage.revisions import Base, Effects
from ..storage.tables import devices, service_state, users
from ..storage.together import Together

MAX_DEVICES = 100
"""The most devices a user has, inactive ones included."""


_SWEEPER = 0x75737377  # "ussw": one process at a time
_TRY_SWEEP = text(f"SELECT pg_try_advisory_xact_lock({_SWEEPER})")
_ESTIMATE = text("SELECT greatest(reltuples, 0) FROM pg_class WHERE oid = to_regclass('devices')")
_SWITCH_OFF = text("""
    UPDATE devices
    SET active = false, inactive_reason = off.reason, deactivated_at = clock_timestamp()
    FROM unnest(CAST(:ids AS uuid[]), CAST(:reasons AS text[])) AS off (id, reason)
    WHERE devices.id = off.id
""")


_TOKEN = {"token_digest": "bytea", "token": "text", "platform": "text", "app": "text"}
_touching = asking(_TOKEN)


def _is_touched(device: FromClause) -> ColumnElement[bool]:
    return and_(
        device.c.token_digest == _touching.c.token_digest,
        device.c.user_id == _touching.c.id,
        device.c.token == _touching.c.token,
        device.c.platform == _touching.c.platform,
        device.c.app.is_not_distinct_from(_touching.c.app),
    )


# What another write has locked is left to the way that waits: this is a statement of many users.
_seen = (
    select(devices.c.id)
    .where(
        # By the array, too: see `revisions.reading`.
        is_one_of(devices.c.token_digest, bindparam("token_digest", type_=ARRAY(LargeBinary))),
        devices.c.active,
        exists().where(_is_touched(devices)),
    )
    .with_for_update(of=devices, key_share=True, skip_locked=True)
    .cte("seen")
)
_touched = (
    update(devices)
    .values(last_seen_at=func.clock_timestamp())
    .where(devices.c.id == _seen.c.id, users.c.id == devices.c.user_id)
    .returning(devices, users.c.version)
    .cte("touched")
)
# An app may ask twice.
_TOUCH = Direct(select(_touching.c.n, _touched).where(_is_touched(_touched)))
_theirs = devices.c.user_id == users.c.id
_adding = asking({"token_digest": "bytea", **revisions.KEY})
READ = revisions.reading(
    _adding,
    exists().where(devices.c.token_digest == _adding.c.token_digest).label("is_known"),
    select(func.count()).where(_theirs).scalar_subquery().label("held"),
    select(func.min(devices.c.deactivated_at)).where(_theirs).scalar_subquery().label("off_since"),
)
_ADD = revisions.writing(
    taking="""
        INSERT INTO devices (id, user_id, token, token_digest, platform, app, active,
            registered_at, last_seen_at)
        SELECT device_id, id, token, token_digest, platform, app, true, at, at
        FROM locked
        ON CONFLICT (token_digest) DO NOTHING
        RETURNING user_id AS id
    """,
    types={"device_id": "uuid", **_TOKEN},
)


async def touch(
    together: Together, user_id: str, digest: bytes, request: RegisterDevice
) -> tuple[DeviceDetails, int] | None:
    """Note that a user's own, active, unchanged token was seen; None if it is not such a one.

    Or if another write has locked it. The one write that changes no document, and so needs no lock
    of the user, no version and no announcement.
    Returns the device and the user's version.
    """
    touched = await together.fetch(
        _TOUCH,
        {
            "id": user_id,
            "token_digest": digest,
            "token": request.token,
            "platform": request.platform,
            "app": request.app,
        },
    )
    return None if touched is None else (details(touched), touched["version"])


def has_room(base: Base, max_active: int, retention_days: int) -> bool:
    """Whether one more device of a user puts none out, and none is to be pruned."""
    off_since, since = base.row["off_since"], base.at - timedelta(days=retention_days)
    return (
        len(base.document.user.devices) < max_active
        and base.row["held"] < MAX_DEVICES
        and (off_since is None or off_since >= since)
    )


def add(device: DeviceDetails, digest: bytes) -> Effects:
    """Return what is written when a user gets an active device more."""
    return Effects(
        _ADD,
        {
            "device_id": device.id,
            "token": device.token,
            "token_digest": digest,
            "platform": device.platform,
            "app": device.app,
        },
    )


async def read_owner(connection: AsyncConnection, digest: bytes) -> str | None:
    """Read whose a token is; stays true while the token is locked."""
    found = await connection.execute(
        select(devices.c.user_id).where(devices.c.token_digest == digest)
    )
    return found.scalar()


async def read_by_digest(connection: AsyncConnection, digest: bytes) -> Row[Any] | None:
    """Read the device that has a token."""
    found = await connection.execute(select(devices).where(devices.c.token_digest == digest))
    return found.first()


async def read_device(connection: AsyncConnection, user_id: str, device_id: str) -> Row[Any] | None:
    """Read one device of a user."""
    found = await connection.execute(
        select(devices).where(devices.c.id == device_id, devices.c.user_id == user_id)
    )
    return found.first()


async def list_devices(
    connection: AsyncConnection, user_id: str
) -> tuple[list[DeviceDetails], int] | None:
    """Read a user's devices, newest registration first, and version; None: no such user."""
    found = await connection.execute(
        select(users.c.version, devices)
        .outerjoin_from(users, devices)
        .where(users.c.id == user_id, users.c.deleted_at.is_(None))
        .order_by(devices.c.registered_at.desc(), devices.c.id.desc())
    )
    rows = found.all()
    if not rows:
        return None
    return [details(row._mapping) for row in rows if row.id is not None], rows[0].version


async def insert_device(
    connection: AsyncConnection,
    device_id: str,
    user_id: str,
    digest: bytes,
    request: RegisterDevice,
) -> Row[Any]:
    """Insert a device of a locked user; its token is locked and nobody's."""
    now = func.clock_timestamp()
    inserted = await connection.execute(
        insert(devices)
        .values(
            id=device_id,
            user_id=user_id,
            token_digest=digest,
            registered_at=now,
            last_seen_at=now,
            **_registered(request),
        )
        .returning(*devices.c)
    )
    return inserted.one()


async def renew_device(
    connection: AsyncConnection, device_id: str, request: RegisterDevice, *, anew: bool
) -> Row[Any]:
    """Note what an app says of its known token; `anew` if it becomes active by that."""
    now = func.clock_timestamp()
    values = _registered(request)
    if not request.active:
        # One that is off already stays so, for the reason and since the time that it is.
        values["inactive_reason"] = func.coalesce(devices.c.inactive_reason, "deactivated")
        values["deactivated_at"] = func.coalesce(devices.c.deactivated_at, now)
    renewed = await connection.execute(
        update(devices)
        .where(devices.c.id == device_id)
        .values(
            last_seen_at=now,
            registered_at=now if anew else devices.c.registered_at,
            **values,
        )
        .returning(*devices.c)
    )
    return renewed.one()


def _registered(request: RegisterDevice) -> dict[str, Any]:
    return {
        "token": request.token,
        "platform": request.platform,
        "app": request.app,
        **_activity(request.active),
    }


def _activity(active: bool, reason: str = "deactivated") -> dict[str, Any]:
    if active:
        return {"active": True, "inactive_reason": None, "deactivated_at": None}
    return {
        "active": False,
        "inactive_reason": reason,
        "deactivated_at": func.clock_timestamp(),
    }


async def set_active(connection: AsyncConnection, device_id: str, active: bool) -> Row[Any]:
    """Switch a device of a locked user on or off."""
    anew = {"registered_at": func.clock_timestamp()} if active else {}
    switched = await connection.execute(
        update(devices)
        .where(devices.c.id == device_id)
        .values(**_activity(active), **anew)
        .returning(*devices.c)
    )
    return switched.one()


async def switch_off(connection: AsyncConnection, reasons: Mapping[str, str]) -> None:
    """Switch off locked devices, each for its reason."""
    ids, said = list(reasons), list(reasons.values())
    await connection.execute(_SWITCH_OFF, {"ids": ids, "reasons": said})


async def delete_device(connection: AsyncConnection, device_id: str) -> None:
    """Delete a device of a locked user."""
    await connection.execute(delete(devices).where(devices.c.id == device_id))


async def evict(connection: AsyncConnection, user_id: str, keep: str, max_active: int) -> bool:
    """Hold a locked user to `max_active` devices: least recently seen out first, `keep` never.

    Returns whether any had to go.
    """
    surplus = (
        select(devices.c.id)
        .where(devices.c.user_id == user_id, devices.c.active, devices.c.id != keep)
        .order_by(devices.c.last_seen_at.desc(), devices.c.id.desc())
        .offset(max_active - 1)
    )
    evicted = await connection.execute(
        update(devices).where(devices.c.id.in_(surplus)).values(**_activity(False, "evicted"))
    )
    return evicted.rowcount > 0


async def prune(connection: AsyncConnection, user_id: str, retention_days: int) -> None:
    """Delete a locked user's devices that are inactive for long, or beyond `MAX_DEVICES`."""
    inactive = and_(devices.c.user_id == user_id, not_(devices.c.active))
    beyond = (
        select(devices.c.id)
        .where(devices.c.user_id == user_id)
        .order_by(devices.c.active.desc(), devices.c.deactivated_at.desc(), devices.c.id)
        .offset(MAX_DEVICES)
    )
    old = _is_old(retention_days)
    await connection.execute(delete(devices).where(inactive, or_(old, devices.c.id.in_(beyond))))


async def prune_all(connection: AsyncConnection, retention_days: int, limit: int) -> int:
    """Delete up to `limit` devices, of anybody, that are inactive for long; returns how many."""
    old = (
        select(devices.c.id)
        .where(_is_old(retention_days))
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    deleted = await connection.execute(delete(devices).where(devices.c.id.in_(old)))
    return deleted.rowcount


def _is_old(retention_days: int) -> ColumnElement[bool]:
    age = text("make_interval(days => :days)").bindparams(days=retention_days)
    return devices.c.deactivated_at < func.clock_timestamp() - age


class Found(NamedTuple):
    """A device of anybody."""

    id: str
    user_id: str


class Page(NamedTuple):
    """Some devices by ascending id: how many, and those that are wanted of them."""

    seen: int
    wanted: list[Found]
    last: str | None
    """The last id that was looked at; None: there are no more."""


class Sweep(NamedTuple):
    """How far the sweep under way is (`after`), and whether the next may begin."""

    now: datetime
    after: str | None
    is_due: bool


async def read_clock(connection: AsyncConnection) -> datetime:
    """Read Postgres' clock, by which devices are seen."""
    now: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
    return now


async def estimate(connection: AsyncConnection) -> int:
    """Read about how many devices there are; counting ten millions takes a second."""
    return int(await connection.scalar(_ESTIMATE) or 0)


def is_stale(seen_before: datetime) -> ColumnElement[bool]:
    """Select active devices that were not seen since."""
    return and_(devices.c.active, devices.c.last_seen_at < seen_before)


def is_off(reason: str, since: datetime) -> ColumnElement[bool]:
    """Select devices that were deactivated since, for this reason."""
    return and_(
        not_(devices.c.active),
        devices.c.inactive_reason == reason,
        devices.c.deactivated_at >= since,
    )


async def read_page(
    connection: AsyncConnection, after: str, which: ColumnElement[bool], limit: int
) -> Page:
    """Look at the next devices behind the id `after`, whatever is wanted: so it takes no longer."""
    page = (
        select(devices.c.id, devices.c.user_id, which.label("is_wanted"))
        .where(devices.c.id > after)
        .order_by(devices.c.id)
        .limit(limit)
    )
    rows = (await connection.execute(page)).all()
    wanted = [Found(row.id, row.user_id) for row in rows if row.is_wanted]
    return Page(len(rows), wanted, rows[-1].id if len(rows) == limit else None)


async def lock_devices(
    connection: AsyncConnection, ids: Sequence[str], which: ColumnElement[bool]
) -> list[Found]:
    """Lock those devices of locked users that `which` still selects."""
    rows = await connection.execute(
        select(devices.c.id, devices.c.user_id)
        .where(is_one_of(devices.c.id, ids), which)
        .order_by(devices.c.id)
        .with_for_update(key_share=True)
    )
    return [Found(row.id, row.user_id) for row in rows]


async def switch_on(
    connection: AsyncConnection,
    user_ids: Sequence[str],
    which: ColumnElement[bool],
    max_active: int,
) -> list[Found]:
    """Activate devices of locked users again, the most recently seen first, up to `max_active`.

    They keep their places in the document: nothing was registered.
    """
    theirs = is_one_of(devices.c.user_id, user_ids)
    place = func.row_number().over(
        partition_by=devices.c.user_id,
        order_by=[devices.c.last_seen_at.desc(), devices.c.id.desc()],
    )
    wanted = select(devices.c.id, devices.c.user_id, place.label("place")).where(theirs, which)
    w = wanted.cte("wanted").c
    held = (
        select(devices.c.user_id, func.count().label("active"))
        .where(theirs, devices.c.active)
        .group_by(devices.c.user_id)
        .cte("held")
    )
    fitting = (
        select(w.id)
        .outerjoin(held, held.c.user_id == w.user_id)
        .where(w.place + func.coalesce(held.c.active, 0) <= max_active)
    )
    rows = await connection.execute(
        update(devices)
        .where(devices.c.id.in_(fitting))
        .values(**_activity(True))
        .returning(devices.c.id, devices.c.user_id)
    )
    return [Found(row.id, row.user_id) for row in rows]


async def take_sweep(connection: AsyncConnection) -> Sweep | None:
    """Take the nightly sweep until the end of the transaction; None if another process has it."""
    if not await connection.scalar(_TRY_SWEEP):
        return None
    now = func.clock_timestamp()
    due = service_state.c.sweep_began_at < now - text("interval '20 hours'")
    found = await connection.execute(
        select(now.label("now"), service_state.c.sweep_after.label("after"), due.label("is_due"))
    )
    return Sweep(*found.one())


async def note_sweep(connection: AsyncConnection, after: str | None, *, begins: bool) -> None:
    """Note how far the sweep that was taken is; None: it is done."""
    began = {"sweep_began_at": func.clock_timestamp()} if begins else {}
    await connection.execute(update(service_state).values(sweep_after=after, **began))


async def erase(connection: AsyncConnection, user_id: str) -> None:
    """Delete all devices of a locked user."""
    await connection.execute(delete(devices).where(devices.c.user_id == user_id))


def details(row: Fields) -> DeviceDetails:
    """Return a device as `/devices` shows it."""
    return DeviceDetails(
        id=str(row["id"]),
        token=row["token"],
        platform=row["platform"],
        app=row["app"],
        active=row["active"],
        registered_at=row["registered_at"],
        last_seen_at=row["last_seen_at"],
        inactive_reason=row["inactive_reason"],
    )
