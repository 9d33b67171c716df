"""Where a push can reach a user: device tokens as they are shown and registered."""

from __future__ import annotations

from datetime import datetime

from ._base import Request, Response
from .fields import AnyPlatform, AppName, Platform, Token


class Device(Response, frozen=True):
    """A device as the document shows it: an active token."""

    id: str
    token: str
    platform: AnyPlatform
    app: str | None
    active: bool
    registered_at: datetime


class DeviceDetails(Device, frozen=True):
    """A device as `/devices` shows it, active or not."""

    last_seen_at: datetime
    inactive_reason: str | None


class RegisterDevice(Request, frozen=True):
    """Register a token, or say again that it is there. `active: false` switches it off."""

    token: Token
    platform: Platform
    app: AppName | None = None
    active: bool = True


class DeviceUpdate(Request, frozen=True):
    """Switch a registered device on or off."""

    active: bool
