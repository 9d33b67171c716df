"""Owns the ceilings: bare ASGI applications that are run exactly as the service is run.

    python -m benchmarks.ceilings C0    # answers ready bytes
    python -m benchmarks.ceilings C1    # ready bytes out of Redis, by one GET of redis-py each time

Nothing is parsed but the id in the path, and no header is sent that a client could do without.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvloop
from redis.asyncio import Redis
from user_service_server.serving import Application, serve
from user_service_server.settings import load_settings

from benchmarks import documents


async def _send(send: Callable[[dict[str, Any]], Awaitable[None]], body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class ReadyBytes:
    """C0: the same bytes each time."""

    def __init__(self) -> None:
        self._body = documents.success(documents.encoded(0))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002
        await _send(send, self._body)

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Nothing is begun."""
        yield


class OneGet:
    """C1: the bytes that Redis has under the id."""

    def __init__(self, redis_url: str) -> None:
        self._redis = Redis.from_url(redis_url)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002
        body: Any = await self._redis.get(scope["path"].rpartition("/")[2])
        await _send(send, body or b"")

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Put the documents there."""
        ready = {
            documents.user_id(number): documents.success(documents.encoded(number))
            for number in range(documents.WARM)
        }
        async with self._redis:
            await self._redis.mset(ready)
            yield


async def _run(name: str) -> None:
    settings = load_settings(os.environ, None)
    apps: dict[str, Callable[[], Application]] = {
        "C0": ReadyBytes,
        "C1": lambda: OneGet(settings.redis_url),
    }
    await serve(apps[name](), settings, draining=asyncio.Event())


if __name__ == "__main__":
    uvloop.run(_run(sys.argv[1]))
