"""`client.devices`: where a push can reach a user."""

from __future__ import annotations

from typing import Unpack

import msgspec
from user_service_schemas import DeviceDetails, DeviceUpdate, Envelope, Platform, RegisterDevice

from user_service_client._calls import (
    Call,
    CallOptions,
    Calls,
    Id,
    WriteOptions,
    segment,
    user_path,
)
from user_service_client._writes import Writes

_DEVICE = msgspec.json.Decoder(Envelope[DeviceDetails])
_DEVICES = msgspec.json.Decoder(Envelope[tuple[DeviceDetails, ...]])


class Devices:
    """The devices of users. Options and errors are as at `Users`."""

    def __init__(self, calls: Calls, writes: Writes) -> None:
        self._calls = calls
        self._writes = writes

    async def list(self, user_id: Id, **options: Unpack[CallOptions]) -> tuple[DeviceDetails, ...]:
        """Return all devices of a user, active or not; `User.devices` has the active ones.

        Raises:
            NotFound: nobody has this id.
        """
        path = user_path(user_id, "/devices")
        floor = self._writes.floor(user_id)
        call = Call("devices.list", "GET", path, min_version=floor, **options)
        answer = await self._calls.send(call)
        return answer.data(_DEVICES)

    async def register(
        self,
        user_id: Id,
        *,
        token: str,
        platform: Platform,
        app: str | None = None,
        active: bool = True,
        **options: Unpack[WriteOptions],
    ) -> DeviceDetails:
        """Register a device, or say again that it is there: an app does so at every launch.

        A token that was another user's moves to this one.

        Args:
            user_id: Whose.
            token: What the push gateway gave the device, at most 4096 characters.
            platform: Which gateway that is.
            app: Tells several apps of a user apart, at most 128 characters.
            active: False registers it switched off.
            **options: See `WriteOptions`.

        Raises:
            NotFound: nobody has this id.
            Invalid: `details` names every bad field.
            VersionMismatch: the version is not that of `if_version`.
        """
        body = RegisterDevice(token=token, platform=platform, app=app, active=active)
        answer = await self._writes.send(
            "devices.register", "POST", user_id, options, rest="/devices", body=body
        )
        return answer.data(_DEVICE)

    async def update(
        self, user_id: Id, device_id: Id, *, active: bool, **options: Unpack[WriteOptions]
    ) -> DeviceDetails:
        """Switch a device on or off.

        Raises:
            NotFound: nobody has this id, or the user has no such device.
            VersionMismatch: the version is not that of `if_version`.
        """
        rest = f"/devices/{segment(device_id)}"
        body = DeviceUpdate(active=active)
        answer = await self._writes.send(
            "devices.update", "PATCH", user_id, options, rest=rest, body=body
        )
        return answer.data(_DEVICE)

    async def remove(self, user_id: Id, device_id: Id, **options: Unpack[WriteOptions]) -> None:
        """Remove a device.

        Raises:
            NotFound: nobody has this id, or the user has no such device.
            VersionMismatch: the version is not that of `if_version`.
        """
        rest = f"/devices/{segment(device_id)}"
        await self._writes.send("devices.remove", "DELETE", user_id, options, rest=rest)
