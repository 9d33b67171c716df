"""Owns what both workers read of the environment, and how a worker is put together.

QUEUE_URL           the Redis with the jobs: redis://localhost:6379/1
USER_SERVICE_URL    http://localhost:3001
USER_SERVICE_KEY    a service key with the scopes users:read, changes:read and feedback:write
CONSUMER            this worker's name, another one for each: the host's
CLAIM_AFTER         seconds after which jobs of a dead worker are taken over: 300
BATCH, CONCURRENCY  how many jobs are taken at once, and sent at once: 100, 10
RETRY_AFTER         seconds until a provider is asked again, twice as long each time: 30
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping

from jobs import Queue, RedisQueue
from redis.asyncio import Redis
from user_service_client import UserServiceClient
from user_service_schemas import Channel
from worker import Pace, T, Worker

Make = Callable[[UserServiceClient, Queue, Pace, Mapping[str, str]], Worker[T]]


def start(channel: Channel, make: Make[T]) -> None:
    """Run a worker until it is told to end."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("httpx", "user_service_client"):
        logging.getLogger(name).setLevel("WARNING")
    asyncio.run(_run(channel, make, os.environ))


async def _run(channel: Channel, make: Make[T], environ: Mapping[str, str]) -> None:
    url = environ.get("QUEUE_URL", "redis://localhost:6379/1")
    service = environ.get("USER_SERVICE_URL", "http://localhost:3001")
    # `live`: an opt-out counts within some 100 ms, and copies need no other confirmation.
    async with (
        Redis.from_url(url, decode_responses=True) as redis,
        UserServiceClient(
            service, api_key=environ.get("USER_SERVICE_KEY") or None, live=True
        ) as client,
    ):
        queue = RedisQueue(
            redis,
            channel,
            consumer=environ.get("CONSUMER", socket.gethostname()),
            claim_after=float(environ.get("CLAIM_AFTER", "300")),
        )
        pace = Pace(
            batch=int(environ.get("BATCH", "100")),
            concurrency=int(environ.get("CONCURRENCY", "10")),
            retry_after=float(environ.get("RETRY_AFTER", "30")),
        )
        await make(client, queue, pace, environ).run()
