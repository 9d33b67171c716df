"""How settings are read, refused and shown."""

import ssl
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from user_service_server.settings import (
    Settings,
    SettingsError,
    database_engine_arguments,
    describe_settings,
    hide_password,
    load_settings,
)

URLS = {
    "DATABASE_URL": "postgresql+asyncpg://user:password@postgres:5432/users",
    "REDIS_URL": "redis://redis:6379/0",
}


def load(**environ: str) -> Settings:
    return load_settings({**URLS, **environ}, None)


def refusal(**environ: str) -> str:
    with pytest.raises(SettingsError) as refused:
        load(**environ)
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_only_the_urls_are_required() -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings({}, None)
    assert str(refused.value) == "DATABASE_URL is missing; REDIS_URL is missing"
    assert load().port == 3001


def test_environment_wins_over_dotenv_and_that_over_defaults(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("PORT=4000\nHOST=0.0.0.0\nLOG_LEVEL=error\n")
    defaults = {**URLS, "PORT": "6000", "HOST": "::1", "CACHE_TTL": "7"}
    settings = load_settings({"PORT": "5000", "LOG_LEVEL": ""}, dotenv, defaults=defaults)
    assert (settings.port, settings.host, settings.cache_ttl) == (5000, "0.0.0.0", 7)  # noqa: S104
    assert settings.log_level == "error", "an empty variable counts as not set"


def test_missing_dotenv_is_no_error(tmp_path: Path) -> None:
    assert load_settings(URLS, tmp_path / ".env") == load()


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("on", True),
        ("TRUE", True),
        ("1", True),
        ("yes", True),
        ("off", False),
        ("False", False),
        ("0", False),
        ("no", False),
    ],
)
def test_booleans(raw: str, value: bool) -> None:
    assert load(DOCS=raw).docs is value


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("PORT", "0"),
        ("PORT", "65536"),
        ("PORT", "3001a"),
        ("PORT", "3001.5"),
        ("METRICS_PORT", "-1"),
        ("DOCS", "maybe"),
        ("AUTH", "none"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
        ("DEFAULT_TIMEZONE", "Europe/Atlantis"),
        ("DEFAULT_TIMEZONE", "europe/berlin"),
        ("SHUTDOWN_GRACE", "nan"),
        ("SHUTDOWN_TIMEOUT", "inf"),
        ("STARTUP_TIMEOUT", "-1"),
        ("HASH_QUEUE", "many"),
        ("CACHE_TTL", "0"),
        ("CORS_ORIGINS", "*"),
        ("CORS_ORIGINS", "null"),
        ("CORS_ORIGINS", "https://*.example.com"),
        ("CORS_ORIGINS", "https://example.com/"),
        ("CORS_ORIGINS", "https://Example.com"),
        ("CORS_ORIGINS", "https://example.com,"),
        ("CORS_ORIGINS", "example.com"),
    ],
)
def test_wrong_value_is_named_and_shown(name: str, raw: str) -> None:
    assert refusal(**{name: raw}).startswith(f"{name}='{raw}' is wrong: ")


def test_all_wrong_values_are_named_in_one_line() -> None:
    text = refusal(PORT="x\ny", CACHE_TTL="-1", DATABASE_URL="")
    assert [part.partition("=")[0].split()[0] for part in text.split("; ")] == [
        "PORT",
        "DATABASE_URL",
        "CACHE_TTL",
    ]


@pytest.mark.parametrize(
    "url",
    [
        "mysql://user:hunter2@host/users",
        "postgresql+psycopg://user:hunter2@host/users",
        "user:hunter2@host",
        "postgresql://user:hunter2@host:port/users",
        "postgresql://user:pass@hunter2:x/users",
        "postgresql://user:hunter2@host/users?sslmode=perhaps",
        "postgresql://user:hunter2@host/users?sslmode=verify-full&sslrootcert=/nowhere",
        "postgresql://user:hunter2@host/users?pgbouncer=true",
        "postgresql://user:hunter2@host/users?timeout=soon",
        "postgresql://user:hunter2@/users?host=a:1&host=b:x",
        "postgresql://user:hunter2@a:1,b:x/users",
    ],
)
def test_wrong_database_url_is_named_without_its_password(url: str) -> None:
    text = refusal(DATABASE_URL=url)
    assert text.startswith("DATABASE_URL is wrong: ")
    assert "hunter2" not in text


@pytest.mark.parametrize("url", ["http://:hunter2@host", "hunter2", "redis://", "unix://"])
def test_wrong_redis_url_is_named_without_its_password(url: str) -> None:
    text = refusal(REDIS_URL=url)
    assert text.startswith("REDIS_URL is wrong: ")
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("valkey://:pw@host:6379/1", "redis://:pw@host:6379/1"),
        ("valkeys://host", "rediss://host"),
        ("rediss://host:6380/0", "rediss://host:6380/0"),
        ("unix:///run/redis.sock?db=2", "unix:///run/redis.sock?db=2"),
    ],
)
def test_redis_urls(given: str, taken: str) -> None:
    assert load(REDIS_URL=given).redis_url == taken


def test_secret_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    assert load(SECRET_KEY_FILE=str(file)).secret_key == "s3cret"
    both = refusal(SECRET_KEY="other", SECRET_KEY_FILE=str(file))
    assert both == "SECRET_KEY and SECRET_KEY_FILE are both set"
    assert "SECRET_KEY_FILE" in refusal(SECRET_KEY_FILE=str(tmp_path / "none"))
    assert load(PORT_FILE=str(file)).port == 3001, "only secrets are read from files"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
@pytest.mark.parametrize(
    ("rest", "arguments"),
    [
        ("u:p@h/d", {}),
        ("u:p@h/d?sslmode=require&channel_binding=require", {"ssl": "require"}),
        ("u:p@h/d?sslmode=disable", {"ssl": "disable"}),
        ("u:p@h/d?ssl=prefer", {"ssl": "prefer"}),
        ("u@/d?host=/run/postgresql", {}),
        ("u@/d?host=a:1&host=b:2&target_session_attrs=read-write", {}),
        ("u:p@a,b/d?target_session_attrs=read-write", {}),
        ("u:p@a:1,b,c/d", {}),
        ("u:p@h/d?command_timeout=5&statement_cache_size=0",
         {"command_timeout": 5.0, "statement_cache_size": 0}),
    ],
)  # fmt: skip
def test_database_urls(scheme: str, rest: str, arguments: dict[str, object]) -> None:
    url, connect = database_engine_arguments(f"{scheme}://{rest}")
    assert url.drivername == "postgresql+asyncpg"
    assert connect == arguments
    create_async_engine(url, connect_args=connect)


def test_several_hosts_are_all_asked() -> None:
    """As libpq has them in a URL, which is how clouds hand them out."""
    url, _ = database_engine_arguments(
        "postgres://u:p@a:1,b/users?sslmode=require&target_session_attrs=read-write"
    )
    _, connect = url.get_dialect()().create_connect_args(url)
    assert connect == {
        "host": ["a", "b"],
        "port": [1, 5432],
        "user": "u",
        "password": "p",
        "database": "users",
        "target_session_attrs": "read-write",
    }


@pytest.mark.parametrize(
    ("query", "checks_name"),
    [
        ("sslmode=verify-full", True),
        ("sslmode=verify-full&sslrootcert=system", True),
        ("sslmode=verify-ca", False),
    ],
)
def test_verifying_ssl_modes_trust_the_system(query: str, checks_name: bool) -> None:
    _, connect = database_engine_arguments(f"postgres://u:p@h/d?{query}")
    context = connect["ssl"]
    assert isinstance(context, ssl.SSLContext)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname is checks_name


def test_description_hides_secrets_and_survives_wrong_values(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("SECRET_KEY=hunter2\n")
    environ = {"DATABASE_URL": "postgres://user:hunter2@host/users", "PORT": "x"}
    rows = {row.name: row for row in describe_settings(environ, dotenv)}
    assert "hunter2" not in str(rows)
    assert rows["DATABASE_URL"].current == "postgres://user:***@host/users"
    assert rows["SECRET_KEY"].current == "(hidden)"
    assert rows["REDIS_URL"].current == "(missing)"
    assert (rows["PORT"].current, rows["PORT"].default) == ("x", "3001")
    assert all(row.meaning for row in rows.values())
    assert rows.keys() == {name.upper() for name in Settings.__struct_fields__}


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@host/0",
        "redis://user:hunter2@host/0",
        "redis://user:a@b/hunter2@host/0",
        "unix:///run/redis.sock?password=hunter2&db=1",
        "postgres:///users?user=a&password=hunter2",
    ],
)
def test_hidden_password(url: str) -> None:
    shown = hide_password(url)
    assert "hunter2" not in shown
    assert "***" in shown


def test_a_url_without_password_is_shown_as_it_is() -> None:
    assert hide_password("redis://host:6379/0") == "redis://host:6379/0"
