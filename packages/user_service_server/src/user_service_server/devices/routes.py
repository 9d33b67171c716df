"""The HTTP of devices."""

from __future__ import annotations

from litestar import Router, delete, get, patch, post
from litestar.params import FromPath, JSONBody
from user_service_schemas import DeviceDetails, DeviceUpdate, ErrorCode, RegisterDevice, Scope

from ..http.answers import HTTPRequest, ReadyAnswer, answer
from ..http.idempotency import Idempotency
from ..http.operations import operation
from ..http.requests import device_id_of, if_match, user_id_of
from ..storage.documents import Documents
from .service import Devices, Registration

_SAMPLE = {"token": "fcm_device_token_123", "platform": "android", "active": True}


def devices_router(devices: Devices, documents: Documents, idempotency: Idempotency) -> Router:
    """Return the routes of devices."""

    @get(
        "/",
        **operation(
            "list_devices",
            "List a user's devices, newest registration first",
            tuple[DeviceDetails, ...],
            ErrorCode.USER_NOT_FOUND,
            etag=True,
            scope=Scope.USERS_READ,
        ),
    )
    async def list_devices(user_id: FromPath[str]) -> ReadyAnswer:
        found, version = await devices.list(user_id_of(user_id))
        return answer(found, "Devices listed", headers=[("ETag", documents.etag(version))])

    @post(
        "/",
        **operation(
            "register_device",
            "Register or update a device token",
            {201: DeviceDetails, 200: DeviceDetails},
            ErrorCode.USER_NOT_FOUND,
            body=RegisterDevice,
            example=_SAMPLE,
            writes_document=True,
            description="201 for a token that is new to the user, 200 for a known one. Another"
            " user's token moves: the last login wins.",
            scope=Scope.DEVICES_WRITE,
        ),
    )
    async def register_device(
        request: HTTPRequest, user_id: FromPath[str], data: JSONBody[RegisterDevice]
    ) -> ReadyAnswer:
        def render(registration: Registration) -> ReadyAnswer:
            device, version, is_new = registration
            return answer(
                device,
                "Device registered" if is_new else "Device updated",
                status=201 if is_new else 200,
                headers=[("ETag", documents.etag(version))],
            )

        subject = user_id_of(user_id)
        return await idempotency.run(
            request,
            render,
            lambda recorder: devices.register(subject, data, if_match(request), recorder),
        )

    @patch(
        "/{device_id:str}",
        **operation(
            "update_device",
            "Switch a device on or off",
            DeviceDetails,
            ErrorCode.USER_NOT_FOUND,
            ErrorCode.DEVICE_NOT_FOUND,
            body=DeviceUpdate,
            example={"active": False},
            writes_document=True,
            scope=Scope.DEVICES_WRITE,
        ),
    )
    async def update_device(
        request: HTTPRequest,
        user_id: FromPath[str],
        device_id: FromPath[str],
        data: JSONBody[DeviceUpdate],
    ) -> ReadyAnswer:
        def render(result: tuple[DeviceDetails, int]) -> ReadyAnswer:
            device, version = result
            return answer(device, "Device updated", headers=[("ETag", documents.etag(version))])

        subject, device = user_id_of(user_id), device_id_of(device_id)
        return await idempotency.run(
            request,
            render,
            lambda recorder: devices.update(subject, device, data, if_match(request), recorder),
        )

    @delete(
        "/{device_id:str}",
        **operation(
            "delete_device",
            "Delete a device",
            None,
            ErrorCode.USER_NOT_FOUND,
            ErrorCode.DEVICE_NOT_FOUND,
            writes_document=True,
            scope=Scope.DEVICES_WRITE,
        ),
    )
    async def delete_device(
        request: HTTPRequest, user_id: FromPath[str], device_id: FromPath[str]
    ) -> ReadyAnswer:
        def render(version: int) -> ReadyAnswer:
            return answer(None, "Device deleted", headers=[("ETag", documents.etag(version))])

        subject, device = user_id_of(user_id), device_id_of(device_id)
        return await idempotency.run(
            request,
            render,
            lambda recorder: devices.remove(subject, device, if_match(request), recorder),
        )

    return Router(
        "/users/{user_id:str}/devices",
        route_handlers=[list_devices, register_device, update_device, delete_device],
    )
