"""The rules of devices: a token has one owner, and a user a bounded number of devices."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Row
from user_service_schemas import (
    ChangeKind,
    Device,
    DeviceDetails,
    DeviceUpdate,
    RegisterDevice,
    token_digest,
)
from uuid_utils import uuid7

from ..errors import DeviceNotFound, UserNotFound
from ..settings import Settings
from ..storage.database import Database
from ..storage.document import EntityTags
from ..storage.documents import Documents, Write
from ..storage.recorded_answers import Recorder
from ..storage.revisions import Base, Revision
from . import repository

PRUNED_AT_ONCE = 1000


class Registration(NamedTuple):
    """What became of a token: its device, the user's version, and whether it is new to the user."""

    device: DeviceDetails
    version: int
    is_new: bool


class Devices:
    """What can be done with a user's devices."""

    def __init__(self, settings: Settings, database: Database, documents: Documents) -> None:
        self._max_active = settings.max_active_devices
        self._retention_days = settings.device_retention_days
        self._database = database
        self._documents = documents

    async def list(self, user_id: str) -> tuple[list[DeviceDetails], int]:
        """Return all devices of a user, newest registration first, and the user's version."""
        async with self._database.reading() as connection:
            found = await repository.list_devices(connection, user_id)
        if found is None:
            raise UserNotFound
        return found

    async def register(
        self,
        user_id: str,
        request: RegisterDevice,
        if_match: EntityTags | None,
        recorder: Recorder,
    ) -> Registration:
        """Register a token. Another user's moves here: the last login wins.

        Raises:
            UserNotFound, VersionMismatch
        """
        digest = token_digest(request.token)
        if request.active:
            if if_match is None and recorder.key is None:
                touched = await repository.touch(self._database.together, user_id, digest, request)
                if touched:
                    return Registration(*touched, is_new=False)
            added = await self._add(user_id, digest, request, if_match, recorder)
            if added:
                return added
        async with self._documents.write(user_id, recorder) as write:
            await write.lock_names(digest)
            owner = await repository.read_owner(write.connection, digest)
            rows = await write.lock_users(*{user_id, owner or user_id})
            write.expect(rows, user_id, if_match)
            device, is_new = await self._take(write, user_id, digest, request)
            return await write.conclude(
                lambda: Registration(device, write.document.version, is_new)
            )

    async def _add(
        self,
        user_id: str,
        digest: bytes,
        request: RegisterDevice,
        if_match: EntityTags | None,
        recorder: Recorder,
    ) -> Registration | None:
        """Give a user who has room a token that nobody has; None if it is otherwise."""

        def decide(base: Base) -> Revision[Registration] | None:
            if base.row["is_known"] or not repository.has_room(
                base, self._max_active, self._retention_days
            ):
                return None
            device = DeviceDetails(
                id=str(uuid7()),
                token=request.token,
                platform=request.platform,
                app=request.app,
                active=True,
                registered_at=base.at,
                last_seen_at=base.at,
                inactive_reason=None,
            )
            shown = msgspec.convert(device, Device, from_attributes=True)
            user = base.changed(devices=(shown, *base.document.user.devices))
            return Revision(
                user,
                ChangeKind.DEVICE_REGISTERED,
                repository.add(device, digest),
                Registration(device, user.version, is_new=True),
                names=(digest,),
            )

        return await self._documents.revise(
            user_id, if_match, recorder, repository.READ, decide, token_digest=digest
        )

    async def _take(
        self, write: Write, user_id: str, digest: bytes, request: RegisterDevice
    ) -> tuple[DeviceDetails, bool]:
        """Give the locked token to the locked user."""
        connection = write.connection
        # Read again: until its owner was locked, the device could be switched off or deleted.
        known = await repository.read_by_digest(connection, digest)
        if known is not None and known.user_id == user_id:
            anew = request.active and not known.active
            row = await repository.renew_device(connection, known.id, request, anew=anew)
            if any(getattr(row, c) != getattr(known, c) for c in _SHOWN):
                write.changed(user_id, ChangeKind.DEVICE_UPDATED)
            is_new = False
        else:
            kind = ChangeKind.DEVICE_REGISTERED
            if known is not None:
                # A new id: the former owner's apps must not address what is another's now.
                await repository.delete_device(connection, known.id)
                write.changed(known.user_id, ChangeKind.DEVICE_MOVED)
                kind = ChangeKind.DEVICE_MOVED
            row = await repository.insert_device(connection, str(uuid7()), user_id, digest, request)
            write.changed(user_id, kind)
            is_new = True
        await self._bound(write, user_id, row)
        return repository.details(row._mapping), is_new

    async def update(
        self,
        user_id: str,
        device_id: str,
        request: DeviceUpdate,
        if_match: EntityTags | None,
        recorder: Recorder,
    ) -> tuple[DeviceDetails, int]:
        """Switch a device on or off; returns it and the user's version.

        Raises:
            UserNotFound, DeviceNotFound, VersionMismatch
        """
        async with self._documents.write(user_id, recorder) as write:
            await write.lock_user(user_id, if_match)
            row = await repository.read_device(write.connection, user_id, device_id)
            if row is None:
                raise DeviceNotFound
            if row.active != request.active:
                row = await repository.set_active(write.connection, device_id, request.active)
                await self._bound(write, user_id, row)
                write.changed(user_id, ChangeKind.DEVICE_UPDATED)
            device = repository.details(row._mapping)
            return await write.conclude(lambda: (device, write.document.version))

    async def remove(
        self, user_id: str, device_id: str, if_match: EntityTags | None, recorder: Recorder
    ) -> int:
        """Delete a device; returns the user's version. Raises as `update` does."""
        async with self._documents.write(user_id, recorder) as write:
            await write.lock_user(user_id, if_match)
            if await repository.read_device(write.connection, user_id, device_id) is None:
                raise DeviceNotFound
            await repository.delete_device(write.connection, device_id)
            write.changed(user_id, ChangeKind.DEVICE_REMOVED)
            return await write.conclude(lambda: write.document.version)

    async def prune(self) -> int:
        """Delete a batch of devices that are inactive for long; returns how many."""
        async with self._database.reading() as connection:
            return await repository.prune_all(connection, self._retention_days, PRUNED_AT_ONCE)

    async def _bound(self, write: Write, user_id: str, row: Row[Any]) -> None:
        """Hold the user to the caps after `row` was switched on or off, or added."""
        if row.active and await repository.evict(
            write.connection, user_id, row.id, self._max_active
        ):
            write.changed(user_id, ChangeKind.DEVICE_UPDATED)
        await repository.prune(write.connection, user_id, self._retention_days)


_SHOWN = ("token", "platform", "app", "active")
