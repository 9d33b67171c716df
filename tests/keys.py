"""Owns the service keys of the tests."""

from __future__ import annotations

import httpx
from user_service_schemas import Scope
from user_service_server.keys import repository
from user_service_server.settings import Settings
from user_service_server.storage.database import connected

SECRET_KEY = "0123456789abcdef0123456789abcdef"
REQUIRED = {"AUTH": "required", "SECRET_KEY": SECRET_KEY}
"""The settings of a service whose callers need keys."""

EVERYTHING = tuple(Scope)


async def make_key(settings: Settings, name: str, *scopes: str) -> str:
    async with connected(settings) as connection:
        key = await repository.create_key(connection, name, scopes, None)
        await connection.commit()
    return key


async def change_key(settings: Settings, key: str, change: str) -> None:
    """Change how a key is stored; `change` is SQL, such as `revoked_at = now()`."""
    async with connected(settings) as connection:
        await connection.exec_driver_sql(
            f"UPDATE service_keys SET {change} WHERE id = '{id_of(key)}'"  # noqa: S608 - ours
        )
        await connection.commit()


def id_of(key: str) -> str:
    """Return the part of a key that is no secret."""
    return key.split("_")[1]


def showing(key: str) -> dict[str, str]:
    """Return the headers of a caller with this key."""
    return {"Authorization": f"Bearer {key}"}


def authorized(http: httpx.AsyncClient, key: str) -> httpx.AsyncClient:
    """Let a client show a key with each request."""
    http.headers.update(showing(key))
    return http
