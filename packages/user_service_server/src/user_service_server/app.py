"""Where everything is wired: settings in, an ASGI app out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from importlib.metadata import version

import prometheus_client
import structlog
from litestar import Litestar, Router
from litestar.datastructures import State

from .changes.feed import ChangeFeed
from .changes.routes import changes_router
from .credentials.passwords import Passwords
from .credentials.routes import credentials_router
from .credentials.service import Credentials
from .deliveries.routes import deliveries_router
from .deliveries.service import Deliveries
from .devices.routes import devices_router
from .devices.service import Devices
from .devices.sweeps import Sweeps, is_night
from .feedback.routes import feedback_router
from .feedback.service import Feedback
from .health.routes import health_router, metrics_router
from .http.bodies import MAX_BODY, StrictBody
from .http.callers import Gate, make_admission, open_routes
from .http.cors import CrossOrigin
from .http.docs import get_docs_file, get_openapi, show_docs
from .http.failures import answer_failure
from .http.idempotency import Idempotency
from .http.limits import RateLimits
from .http.observation import Observation
from .keys.ring import KeyRing
from .logs import RequestLog
from .metrics import Metrics
from .preferences.routes import preferences_router
from .preferences.service import PreferenceCenter
from .settings import Settings, check_secret_key
from .storage.cache import DocumentCache
from .storage.database import Database
from .storage.document import DocumentShape
from .storage.documents import Documents
from .storage.link import RedisLink
from .storage.replica import Replica
from .storage.state import StateWatcher
from .upkeep import Upkeep
from .users.routes import DirectUsers, users_router
from .users.service import Users

REDIS_PATIENCE = 5.0
"""Seconds the start waits for Redis, without which the service works."""

_log = structlog.get_logger()


def create_app(settings: Settings, draining: asyncio.Event | None = None) -> Litestar:
    """Make the app. It connects in its lifespan, and is not ready once `draining` is set.

    Raises:
        SettingsError: callers need keys, and there is no SECRET_KEY.
    """
    check_secret_key(settings)
    draining = draining or asyncio.Event()
    release = version("user-service-server")
    metrics = Metrics()
    database = Database(settings)
    state = StateWatcher(settings, database, metrics)
    link = RedisLink(settings, state.recognise)
    shape = DocumentShape(settings)
    cache = DocumentCache(
        link, state, document_format=shape.format, ttl=settings.cache_ttl, metrics=metrics
    )
    replica = Replica(settings, state, shape, metrics)
    documents = Documents(database, state, cache, shape, replica)
    passwords = Passwords(settings)
    idempotency = Idempotency(settings, database, metrics)
    users = Users(settings, documents, passwords)
    limits = RateLimits(settings, link, metrics)
    ring = KeyRing(database, metrics)
    gate = Gate(settings, ring, limits)
    credentials = Credentials(settings, database, documents, passwords, limits)
    preferences = PreferenceCenter(settings, database, documents)
    devices = Devices(settings, database, documents)
    deliveries = Deliveries(settings, documents)
    feedback = Feedback(settings, documents, metrics)
    sweeps = Sweeps(settings, database, documents)

    feed = ChangeFeed(settings, database, state, replica, metrics)
    jobs = {
        "changes": feed.prune,
        "recorded_answers": idempotency.prune,
        "devices": devices.prune,
    }
    if settings.device_stale_days:
        zone = settings.default_timezone
        jobs["stale_devices"] = lambda: sweeps.nightly(is_night(datetime.now(UTC), zone))
    upkeep = Upkeep(jobs)

    metrics.redis_reachable.set_function(lambda: link.reachable)
    metrics.postgres_reachable.set_function(lambda: database.reachable)
    metrics.replica_usable.set_function(lambda: replica.is_well)
    metrics.passwords_waiting.set_function(lambda: passwords.waiting)

    @asynccontextmanager
    async def lifespan(_app: Litestar) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            passwords.start()
            stack.push_async_callback(passwords.close)
            stack.push_async_callback(link.close)
            stack.push_async_callback(database.close)
            stack.push_async_callback(state.close)
            stack.push_async_callback(documents.close)
            stack.push_async_callback(replica.close)
            stack.push_async_callback(feed.close)
            stack.push_async_callback(upkeep.close)
            stack.push_async_callback(ring.close)
            if settings.metrics_port is not None:
                server, _thread = prometheus_client.start_http_server(
                    settings.metrics_port, settings.host, metrics.registry
                )
                stack.callback(server.server_close)
                stack.callback(server.shutdown)
            await state.start(settings.startup_timeout)
            await link.start(REDIS_PATIENCE)
            await feed.start()
            replica.start()
            upkeep.start()
            ring.start()
            ending = asyncio.create_task(_end_streams(feed, draining))
            stack.callback(ending.cancel)
            if settings.auth == "off":
                _log.warning("auth.off", note="every caller may do everything")
            yield

    admit = make_admission(gate)
    api = Router(
        "/api/v1",
        route_handlers=[
            users_router(users, documents, idempotency),
            preferences_router(preferences, documents, idempotency),
            devices_router(devices, documents, idempotency),
            credentials_router(credentials, idempotency),
            deliveries_router(deliveries),
            feedback_router(feedback, documents, idempotency),
            changes_router(feed, settings, draining, metrics, ring),
        ],
        before_request=admit,
    )
    health = health_router(
        release, database=database, state=state, replica=replica, link=link, draining=draining
    )
    app = Litestar(
        [
            api,
            health,
            *([] if settings.metrics_port is not None else [metrics_router(metrics)]),
            *([show_docs, get_docs_file, get_openapi] if settings.docs else []),
        ],
        dto=StrictBody,
        return_dto=None,
        exception_handlers={Exception: answer_failure},
        request_max_body_size=MAX_BODY,
        lifespan=[lifespan],
        state=State({"version": release}),
        openapi_config=None,
        logging_config=None,
    )
    if forgotten := list(open_routes(app, admit)):
        raise RuntimeError(f"nobody is asked for a key with a scope by {', '.join(forgotten)}")
    routed, told = app.asgi_handler, None
    if settings.cors_origins:
        origins = CrossOrigin(routed, settings.cors_origins)
        routed, told = origins, origins.told
    log = RequestLog(settings.log_level, settings.log_format)
    # Around the router, so that what no route was found for is observed, too.
    observation = Observation(routed, metrics, log, settings.body_timeout, told)
    app.asgi_handler = DirectUsers(observation, gate, documents)
    return app


@asynccontextmanager
async def opened_sweeps(settings: Settings) -> AsyncIterator[Sweeps]:
    """Give a command the sweeps over all devices, with a cache that hears of what it writes.

    Raises:
        DependencyUnavailable: Postgres did not come, or nobody migrated it.
    """
    metrics = Metrics()
    database = Database(settings)
    state = StateWatcher(settings, database, metrics)
    link = RedisLink(settings, state.recognise)
    shape = DocumentShape(settings)
    cache = DocumentCache(
        link, state, document_format=shape.format, ttl=settings.cache_ttl, metrics=metrics
    )
    replica = Replica(settings, state, shape, metrics)
    documents = Documents(database, state, cache, shape, replica)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(link.close)
        stack.push_async_callback(replica.close)
        stack.push_async_callback(database.close)
        stack.push_async_callback(state.close)
        stack.push_async_callback(documents.close)
        await state.start(settings.startup_timeout)
        await link.start(REDIS_PATIENCE)
        yield Sweeps(settings, database, documents)


async def _end_streams(feed: ChangeFeed, draining: asyncio.Event) -> None:
    # On the signal itself: an open stream would hold the shutdown up until it is cut off.
    await draining.wait()
    feed.end_streams()
