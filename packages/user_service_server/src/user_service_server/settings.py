"""Owns the settings: their names, meanings, defaults and bounds, and how they are read, once."""

import math
import re
import ssl
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec
from dotenv import dotenv_values
from msgspec import Meta
from redis.asyncio.connection import parse_url
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError
from user_service_schemas import Catalogue, RuleViolation

_SECRET = {"secret": True}
_FILE = {"file": True}


class SettingsError(Exception):
    """A setting is missing or wrong; the text is one line that names every such variable.

    It never holds the value of a secret.
    """


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set. The environment variable is the field's name in upper case."""

    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535, description="TCP port to listen on")] = 3001
    database_url: Annotated[
        str,
        Meta(
            description="PostgreSQL, e.g. postgresql+asyncpg://user:password@host:5432/users",
            extra=_SECRET,
        ),
    ]
    database_replica_url: Annotated[
        str | None,
        Meta(description="a streaming replica, to read what is not cached", extra=_SECRET),
    ] = None
    redis_url: Annotated[
        str, Meta(description="Redis or Valkey, e.g. redis://host:6379/0", extra=_SECRET)
    ]
    secret_key: Annotated[
        str,
        Meta(
            description="keys the digests of the bodies that came with an Idempotency-Key",
            extra=_SECRET,
        ),
    ] = ""
    secret_key_previous: Annotated[
        str,
        Meta(
            description="another SECRET_KEY that is understood: the next, or for a day the last",
            extra=_SECRET,
        ),
    ] = ""
    auth: Annotated[
        Literal["off", "required"], Meta(description="whether callers need a service key")
    ] = "required"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least severe line logged")
    ] = "info"
    log_format: Annotated[Literal["json", "text"], Meta(description="how a log line looks")] = (
        "json"
    )
    docs: Annotated[bool, Meta(description="serve /docs")] = True
    default_timezone: Annotated[str, Meta(description="IANA time zone of users who gave none")] = (
        "UTC"
    )
    categories: Annotated[
        Catalogue | None,
        Meta(
            description="the catalogue of categories, JSON: per category and channel on, off or"
            " required; empty: names are free",
            extra=_FILE,
        ),
    ] = None
    password_required: Annotated[
        bool, Meta(description="whether a registration needs a password")
    ] = True
    max_active_devices: Annotated[
        int, Meta(ge=1, le=100, description="active devices of one user")
    ] = 20
    device_retention_days: Annotated[
        int, Meta(ge=1, le=3650, description="days until an inactive device is erased")
    ] = 30
    device_stale_days: Annotated[
        int,
        Meta(ge=0, le=3650, description="days unseen until a device is deactivated; 0: never"),
    ] = 0
    feedback_max_per_hour: Annotated[
        int,
        Meta(ge=1, le=10**9, description="reports of one caller that may take effect in an hour"),
    ] = 10_000
    database_pool_size: Annotated[
        int, Meta(ge=1, le=1000, description="connections to PostgreSQL of this process")
    ] = 10
    pgbouncer: Annotated[
        bool,
        Meta(description="whether DATABASE_URL leads through PgBouncer in transaction mode"),
    ] = False
    redis_cluster: Annotated[
        bool, Meta(description="whether REDIS_URL names a server of a Redis Cluster")
    ] = False
    cache_ttl: Annotated[
        int, Meta(ge=1, le=86400, description="seconds a cached document lives at most")
    ] = 300
    redis_timeout_ms: Annotated[
        int, Meta(ge=1, le=60000, description="milliseconds a request waits for Redis at most")
    ] = 100
    cpu_scheduling: Annotated[
        Literal["batch", "system"],
        Meta(
            description="batch: no thread interrupts another to answer (SCHED_BATCH of Linux);"
            " system: as the system has it, for a core that is shared with busy others"
        ),
    ] = "batch"
    hash_concurrency: Annotated[
        int,
        Meta(
            ge=0, le=1024, description="processes that hash passwords; 0: as many as the CPU quota"
        ),
    ] = 0
    hash_queue: Annotated[
        int,
        Meta(ge=0, le=100000, description="passwords that may wait to be hashed, or verified"),
    ] = 200
    startup_timeout: Annotated[
        float,
        Meta(ge=0, le=3600, description="seconds the start waits for PostgreSQL"),
    ] = 60.0
    shutdown_grace: Annotated[
        float, Meta(ge=0, le=3600, description="seconds served after SIGTERM, while not ready")
    ] = 5.0
    shutdown_timeout: Annotated[
        float, Meta(ge=0, le=3600, description="seconds that running requests get to finish then")
    ] = 10.0
    changes_retention_days: Annotated[
        int, Meta(ge=1, le=3650, description="days for which the change feed can be replayed")
    ] = 7
    stream_max_life: Annotated[
        float, Meta(ge=1, le=86400, description="seconds after which a stream is ended, about")
    ] = 1800.0
    rate_limit_read: Annotated[
        int, Meta(ge=0, le=10**9, description="reads a minute of one caller; 0: no limit")
    ] = 600_000
    rate_limit_write: Annotated[
        int, Meta(ge=0, le=10**9, description="writes a minute of one caller; 0: no limit")
    ] = 60_000
    rate_limit_credentials: Annotated[
        int,
        Meta(ge=1, le=10**9, description="passwords a minute that one caller may have judged"),
    ] = 600
    password_failures: Annotated[
        int,
        Meta(ge=1, le=10**6, description="wrong passwords for one email within 15 minutes"),
    ] = 10
    proxy_hops: Annotated[
        int,
        Meta(
            ge=0,
            le=10,
            description="proxies in front, each of which appends to X-Forwarded-For; wrong keys are"
            " limited per address",
        ),
    ] = 0
    cors_origins: Annotated[
        tuple[str, ...],
        Meta(
            description="origins whose scripts may call from a browser, by commas, e.g."
            " https://admin.example.com; empty: none"
        ),
    ] = ()
    body_timeout: Annotated[
        float, Meta(ge=1, le=3600, description="seconds within which a request's body must come")
    ] = 30.0
    metrics_port: Annotated[
        Annotated[int, Meta(ge=1, le=65535)] | None,
        Meta(description="a port of its own for /metrics; empty: on PORT"),
    ] = None


class Setting(NamedTuple):
    """One row of what `user-service settings` prints."""

    name: str
    """The environment variable."""
    current: str
    """What is in force, secrets hidden."""
    default: str
    meaning: str


def load_settings(
    environ: Mapping[str, str],
    dotenv: Path | None,
    *,
    defaults: Mapping[str, str] | None = None,
) -> Settings:
    """Read the settings: the environment wins over `dotenv`, which wins over `defaults`.

    An empty value counts as not set, as `${NAME:-}` in a compose file leaves it. A secret, and the
    catalogue, may be given as `NAME_FILE`, a file that holds it, instead.

    Raises:
        SettingsError: a variable is missing or wrong; the text names all of them.
    """
    values, problems = _read(environ, dotenv, defaults or {})
    found: dict[str, Any] = {}
    for field in _fields():
        raw = values.get(field.variable)
        if field.variable in problems:
            continue
        if raw is None:
            if field.required:
                problems[field.variable] = f"{field.variable} is missing"
            continue
        try:
            found[field.name] = _convert(field, raw)
        except msgspec.ValidationError as error:
            shown = field.variable if field.secret else f"{field.variable}={raw!a}"
            problems[field.variable] = f"{shown} is wrong: {error}"
    if problems:
        raise SettingsError("; ".join(problems.values()))
    return Settings(**found)


def check_secret_key(settings: Settings) -> None:
    """Refuse to serve callers with keys without a secret of one's own.

    Raises:
        SettingsError: SECRET_KEY is missing, a placeholder, or can be guessed.
    """
    secret = settings.secret_key
    if settings.auth == "required" and (
        len(secret) < 32 or secret.startswith("<") or len(set(secret)) < 8
    ):
        raise SettingsError(
            "SECRET_KEY is missing, a placeholder, or shorter than 32 characters; make one with"
            " `openssl rand -hex 32` (or set AUTH=off where only trusted callers reach the port)"
        )


def describe_settings(environ: Mapping[str, str], dotenv: Path | None) -> list[Setting]:
    """List all settings with what is in force, also where that is missing or wrong."""
    values, problems = _read(environ, dotenv, {})
    rows = []
    for field in _fields():
        raw = values.get(field.variable)
        if field.variable in problems:
            current = "(wrong)"
        elif raw is None:
            current = "(missing)" if field.required else field.default
        elif field.secret:
            current = hide_password(raw) if "://" in raw else "(hidden)"
        else:
            current = raw
        rows.append(Setting(field.variable, current, field.default, field.meaning))
    return rows


def hide_password(url: str) -> str:
    """Return `url` with its password, in front of the host or in the query, as `***`.

    It hides too much rather than too little: a password with an unescaped `@` or `/` is not
    where a parser looks for it.
    """
    url = re.sub(r"://([^:/?@]*):.*@", r"://\1:***@", url)
    return re.sub(r"(?i)([?&][^=&]*(?:password|secret|token)[^=&]*=)[^&]*", r"\1***", url)


_DATABASE_SCHEMES = {"postgres", "postgresql", "postgres+asyncpg", "postgresql+asyncpg"}
_SSL_MODES = {"disable", "allow", "prefer", "require", "verify-ca", "verify-full"}
# What may stay in the query: SQLAlchemy or asyncpg itself takes it, as a string.
_DATABASE_OPTIONS = {
    "host",
    "port",
    "user",
    "password",
    "passfile",
    "target_session_attrs",
    "krbsrvname",
    "gsslib",
    "prepared_statement_cache_size",
}
# asyncpg takes these as numbers only, and a URL holds strings only.
_DATABASE_NUMBERS: dict[str, type[int] | type[float]] = {
    "timeout": float,
    "command_timeout": float,
    "statement_cache_size": int,
    "max_cached_statement_lifetime": int,
    "max_cacheable_statement_size": int,
}


def database_engine_arguments(url: str) -> tuple[URL, dict[str, Any]]:
    """Return what `create_async_engine` takes for `url`: the URL for asyncpg and `connect_args`.

    `sslmode` and `sslrootcert`, in libpq's meaning, become asyncpg's `ssl`; where no root
    certificate is given, the system's are trusted. `channel_binding` is dropped: asyncpg always
    uses SCRAM without it. Several hosts, as libpq has them, become what SQLAlchemy takes.

    Raises:
        SettingsError: asyncpg would refuse the URL.
    """
    try:
        parsed = make_url(_with_hosts_in_query(url))
        # SQLAlchemy reads `?host=a:1` only when it connects; a wrong one is to be named here.
        parsed.set(drivername="postgresql+asyncpg").get_dialect()().create_connect_args(parsed)
    # Their texts repeat the URL, or parts of it that may be the password.
    except (ArgumentError, ValueError, TypeError, AssertionError):
        raise SettingsError("DATABASE_URL is wrong: it cannot be read as a URL") from None
    if parsed.drivername not in _DATABASE_SCHEMES:
        raise SettingsError(
            "DATABASE_URL is wrong: it must begin with postgresql+asyncpg:// or postgresql://"
        )
    query = dict(parsed.query)
    query.pop("channel_binding", None)
    mode = query.pop("sslmode", None) or query.pop("ssl", None)
    root = query.pop("sslrootcert", None)
    arguments: dict[str, Any] = {}
    for name, number in _DATABASE_NUMBERS.items():
        if name in query:
            try:
                arguments[name] = number(str(query.pop(name)))
            except ValueError:
                raise SettingsError(f"DATABASE_URL is wrong: {name} must be a number") from None
    if unknown := sorted(query.keys() - _DATABASE_OPTIONS):
        raise SettingsError(f"DATABASE_URL is wrong: asyncpg does not know {', '.join(unknown)}")
    if mode is not None or root is not None:
        arguments["ssl"] = _ssl(str(mode or "prefer"), None if root is None else str(root))
    return parsed.set(drivername="postgresql+asyncpg", query=query), arguments


_SEVERAL_HOSTS = re.compile(r"([^/]+://(?:[^/?]*@)?)([^/?@]+,[^/?@]+)(/[^?]*)(?:\?(.*))?")


def _with_hosts_in_query(url: str) -> str:
    """Return `…://a:1,b/users` as `…:///users?host=a,b&port=1,5432`."""
    several = _SEVERAL_HOSTS.fullmatch(url)
    if several is None:
        return url
    before, hosts, path, query = several.groups()
    names, ports = zip(*(host.partition(":")[::2] for host in hosts.split(",")), strict=True)
    listed = f"host={','.join(names)}&port={','.join(port or '5432' for port in ports)}"
    return f"{before}{path}?{listed}" + (f"&{query}" if query else "")


def _ssl(mode: str, root: str | None) -> str | ssl.SSLContext:
    if mode not in _SSL_MODES:
        raise SettingsError(
            f"DATABASE_URL is wrong: sslmode must be one of {', '.join(sorted(_SSL_MODES))}"
        )
    # libpq: with a root certificate, `require` means `verify-ca`.
    if mode == "require" and root is not None:
        mode = "verify-ca"
    if not mode.startswith("verify-"):
        return mode
    try:
        context = ssl.create_default_context(cafile=None if root in (None, "system") else root)
    except OSError as error:
        reason = error.strerror or "no certificate in it"
        raise SettingsError(f"DATABASE_URL is wrong: sslrootcert={root!a}: {reason}") from None
    context.check_hostname = mode == "verify-full"
    return context


class _Field(NamedTuple):
    name: str
    variable: str
    type: Any
    required: bool
    default: str
    meaning: str
    secret: bool
    may_be_file: bool


def _fields() -> Iterator[_Field]:
    for field in msgspec.structs.fields(Settings):
        (meta,) = field.type.__metadata__
        yield _Field(
            name=field.name,
            variable=field.name.upper(),
            type=field.type,
            required=field.required,
            default="" if field.required else _shown(field.default),
            meaning=meta.description,
            secret=meta.extra == _SECRET,
            may_be_file=meta.extra is not None,
        )


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value in (None, ()) else str(value)


def _read(
    environ: Mapping[str, str], dotenv: Path | None, defaults: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the raw values by variable, and what is wrong by variable."""
    written = dotenv_values(dotenv) if dotenv is not None and dotenv.is_file() else {}
    values: dict[str, str] = {}
    problems: dict[str, str] = {}
    for field in _fields():
        for source in (environ, written, defaults):
            value = (source.get(field.variable) or "").strip()
            file = f"{field.variable}_FILE"
            path = (source.get(file) or "").strip() if field.may_be_file else ""
            if value and path:
                problems[field.variable] = f"{field.variable} and {file} are both set"
            elif path:
                try:
                    value = Path(path).read_text(encoding="utf-8").strip()
                except (OSError, UnicodeDecodeError) as error:
                    reason = getattr(error, "strerror", None) or "it is not text"
                    problems[field.variable] = f"{file}={path!a} cannot be read: {reason}"
            if value or path:
                values[field.variable] = value
                break
    return values, problems


def _convert(field: _Field, raw: str) -> object:
    """Return the value of `raw`; raises `msgspec.ValidationError`, which never holds it."""
    if field.name in ("database_url", "database_replica_url"):
        return _database_url(raw)
    if field.name == "redis_url":
        return _redis_url(raw)
    if field.name == "default_timezone":
        return _timezone(raw)
    if field.name == "categories":
        return _categories(raw)
    if field.name == "cors_origins":
        return _origins(raw)
    if field.name in _WORDS:
        raw = raw.lower()
    if field.type.__origin__ is bool:
        try:
            return _BOOLEANS[raw.lower()]
        except KeyError:
            raise msgspec.ValidationError("Expected on or off") from None
    value = msgspec.convert(raw, field.type, strict=False)
    if isinstance(value, float) and not math.isfinite(value):
        raise msgspec.ValidationError("Expected a finite number")
    return value


_WORDS = {"auth", "log_level", "log_format"}
_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")
_BOOLEANS = {
    **dict.fromkeys(("on", "true", "1", "yes"), True),
    **dict.fromkeys(("off", "false", "0", "no"), False),
}


def _database_url(raw: str) -> str:
    try:
        database_engine_arguments(raw)
    except SettingsError as error:
        raise msgspec.ValidationError(str(error).partition("is wrong: ")[2]) from None
    return raw


def _redis_url(raw: str) -> str:
    # redis-py knows Valkey's servers, not its schemes.
    url = re.sub(r"^valkey(s?)://", r"redis\1://", raw)
    try:
        parse_url(url)
        target = urlsplit(url)
        complete = target.path if target.scheme == "unix" else target.hostname
    except ValueError:
        complete = None
    if not complete:
        raise msgspec.ValidationError(
            "Expected redis://host:6379/0, rediss://…, unix:///path or valkey://…"
        )
    return url


def _categories(raw: str) -> Catalogue:
    try:
        return Catalogue.parse(raw)
    except RuleViolation as violation:
        raise msgspec.ValidationError(str(violation)) from None


def _origins(raw: str) -> tuple[str, ...]:
    origins = tuple(origin.strip() for origin in raw.split(","))
    # As browsers send them, since they are compared as they are: in lower case, with no path.
    if not all(_ORIGIN.fullmatch(origin) for origin in origins):
        raise msgspec.ValidationError("Expected origins, e.g. https://admin.example.com")
    return origins


def _timezone(raw: str) -> str:
    zones = resources.files("tzdata").joinpath("zones").read_text(encoding="utf-8").splitlines()
    if raw not in zones:
        raise msgspec.ValidationError("Expected an IANA time zone, e.g. Europe/Berlin")
    return raw
