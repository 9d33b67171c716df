"""The fixtures of all tests: real engines, and a database of its own for each module."""

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import redis
import trustme
from litestar import Litestar
from user_service_server.app import create_app
from user_service_server.credentials import passwords
from user_service_server.embedded import EmbeddedPostgres, EmbeddedValkey
from user_service_server.settings import Settings

from .engines import Engines, engines, settings_for
from .private import PRIVATE, noting
from .servers import Server, serving


@pytest.fixture(scope="session", autouse=True)
def nothing_private_is_logged() -> Iterator[None]:
    """Whatever a test does: no log of a server or of Postgres holds what was sent to it."""
    with noting():
        yield
    assert PRIVATE.found == []


@pytest.fixture(scope="session", autouse=True)
def nobody_outside_is_trusted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test calls anybody outside, and to read all the world's certificates takes a client 20 ms.

    Tests make hundreds of clients, and look for a server with some while it starts.
    """
    certificates = tmp_path_factory.mktemp("tls") / "certificates.pem"
    trustme.CA().cert_pem.write_to_path(str(certificates))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SSL_CERT_FILE", str(certificates))
        yield


@pytest.fixture(scope="module")
def cheap_passwords() -> Iterator[None]:
    """Hashing takes most of a registration's time, and how well it is done is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passwords, "TIME_COST", 1)
        patched.setattr(passwords, "MEMORY_COST", 8)
        yield


@pytest.fixture(scope="session", name="engines")
def started_engines() -> Iterator[Engines]:
    with engines() as started:
        yield started


@pytest.fixture(scope="session")
def postgres(engines: Engines) -> EmbeddedPostgres:
    """A test that stops it starts it again."""
    return engines.postgres


@pytest.fixture(scope="session")
def valkey(engines: Engines) -> EmbeddedValkey:
    """A test that stops or pauses it lets it go on."""
    return engines.valkey


@pytest.fixture(scope="module")
def database_url(engines: Engines, request: pytest.FixtureRequest) -> str:
    """A database as it is after `migrate`, for this module alone."""
    return engines.create_database(request.node.nodeid)


@pytest.fixture(scope="module")
def redis_url(valkey: EmbeddedValkey) -> str:
    """An empty cache, for this module alone: modules of one worker run one after the other."""
    with redis.Redis.from_url(valkey.url) as connection:
        connection.flushall()
    return valkey.url


@pytest.fixture(scope="module")
def settings(database_url: str, redis_url: str) -> Settings:
    return settings_for(database_url, redis_url)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def app(settings: Settings) -> AsyncIterator[Litestar]:
    """The server's app in this process, started."""
    app = create_app(settings)
    async with app.lifespan():
        yield app


@pytest.fixture(scope="module")
async def http(app: Litestar) -> AsyncIterator[httpx.AsyncClient]:
    """Calls the app of this process, without a socket."""
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # Litestar's ASGI types are narrower
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture(scope="module")
def server(database_url: str, redis_url: str) -> Iterator[Server]:
    """A server in a process of its own, behind a real socket.

    Patient with Redis: on a busy machine it is late, and then nothing is cached for a while.
    """
    with serving(database_url, redis_url, REDIS_TIMEOUT_MS="2000") as started:
        yield started
