"""Owns the commands: serve, dev, migrate, keys, devices, epoch, settings."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import uvloop
from user_service_schemas import Scope

from user_service_server.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedValkey
from user_service_server.errors import ServiceError
from user_service_server.serving import ServingError, bind
from user_service_server.serving import serve as serve_app
from user_service_server.settings import (
    Settings,
    SettingsError,
    describe_settings,
    hide_password,
    load_settings,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from user_service_server.devices.sweeps import Step, Sweeps

# ruff: noqa: PLC0415
# The tables and the application are imported by the commands that need them: `settings` and
# `--help` answer at once, and a wrong setting is named before anything else can fail.


class _Duration(click.ParamType[timedelta]):
    """A number with its unit: `90d`, `24h`, `30m`, `10s`."""

    name = "duration"

    def convert(
        self, value: str | timedelta, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        if isinstance(value, timedelta):
            return value
        units = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
        number, unit = value[:-1], value[-1:]
        if not number.isdecimal() or unit not in units or len(number) > 5:
            self.fail("expected a duration such as 90d, 24h, 30m or 10s", param, ctx)
        return timedelta(**{units[unit]: int(number)})


DURATION = _Duration()
_DOTENV = Path(".env")
_DATABASE = "users"

_FIRST_CURL = """\
curl -X POST {service}/api/v1/users/ \\
-H "Content-Type: application/json" \\
-d '{{
  "name": "John Doe",
  "email": "john@example.com",
  "password": "StrongPass123!",
  "preferences": {{"email": true, "push": false}}
}}'"""


def main() -> None:
    """Run the command line; ends the process: 2 for a wrong setting, 1 for what did not start."""
    try:
        commands(prog_name="user-service")
    except SettingsError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (EmbeddedError, ServingError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except ServiceError as error:
        print(error.shown, file=sys.stderr)
        sys.exit(1)


@click.group()
def commands() -> None:
    """Users, notification preferences and devices over HTTP."""


@commands.command()
def serve() -> None:
    """Serve, with the settings of the environment and of .env."""
    settings = load_settings(os.environ, _DOTENV)
    _configure_logs(settings)
    _run(settings)


@commands.command()
@click.option("--host", help="Address to listen on.  [default: HOST or 127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 65535), help="[default: PORT or 3001]")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".user-service"),
    show_default=True,
    help="Where the databases are kept between runs.",
)
def dev(host: str | None, port: int | None, data_dir: Path) -> None:
    """Serve for development: AUTH=off, on a PostgreSQL and a Valkey of its own.

    DATABASE_URL and REDIS_URL of the environment, when set, win. Settings come from the
    environment only: .env describes the deployment with Docker, whose addresses mean nothing here.
    """
    postgres = EmbeddedPostgres(data_dir / "postgres")
    # Not kept between runs: a cache that lost the last second of writes would be wrong.
    valkey = EmbeddedValkey(data_dir / "valkey")
    said = {"AUTH": "off", "HOST": host, "PORT": None if port is None else str(port)}
    settings = load_settings(
        {**os.environ, **{name: value for name, value in said.items() if value is not None}},
        None,
        defaults={
            "DATABASE_URL": postgres.url(_DATABASE),
            "REDIS_URL": valkey.url,
            "LOG_FORMAT": "text",
            "SHUTDOWN_GRACE": "0",
        },
    )
    _configure_logs(settings)
    with bind(settings.host, settings.port) as listener, _ending_in_order() as engines:
        if settings.redis_url == valkey.url:
            engines.enter_context(valkey)
        if settings.database_url == postgres.url(_DATABASE):
            engines.enter_context(postgres)
            postgres.create_database(_DATABASE, exist_ok=True)
        _migrate(settings)
        _run(settings, listener, lambda: print(_welcome(settings, data_dir), flush=True))


@commands.command()
def migrate() -> None:
    """Bring the tables to what this release needs."""
    settings = load_settings(os.environ, _DOTENV)
    _configure_logs(settings)
    _migrate(settings)


@commands.group()
def keys() -> None:
    """The keys with which other services call."""


class _KeyName(click.ParamType[str]):
    """Whose a key is; it stands in the change log, in logs and in the names of counters."""

    name = "name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from user_service_server.keys.repository import ANYBODY

        if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value) or value == ANYBODY:
            self.fail(
                f"expected 1 to 64 letters, digits, dots, hyphens or underscores, not {ANYBODY}",
                param,
                ctx,
            )
        return value


@keys.command("create")
@click.argument("name", type=_KeyName())
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice([scope.value for scope in Scope]),
    help="What it may do; give it once for each.",
)
@click.option("--expires", type=DURATION, help="After how long it ends, such as 90d.")
def create_key(name: str, scopes: tuple[str, ...], expires: timedelta | None) -> None:
    """Make a key for the service NAME, and print it: it is never shown again.

    Keys of one name are one caller: they share limits and Idempotency-Keys.
    """
    from user_service_server.keys import repository

    async def create() -> str:
        async with _connected() as connection:
            return await repository.create_key(connection, name, sorted(set(scopes)), expires)

    print(asyncio.run(create()))


@keys.command("list")
def list_keys() -> None:
    """Print all keys, without their secrets."""
    from user_service_server.keys import repository

    async def read() -> list[tuple[str, ...]]:
        async with _connected() as connection:
            return [
                (
                    row.id,
                    row.name,
                    " ".join(row.scopes),
                    *map(_shown, (row.created_at, row.expires_at)),
                    *map(_shown, (row.revoked_at, row.last_used_at)),
                )
                for row in await repository.list_keys(connection)
            ]

    header = ("ID", "NAME", "SCOPES", "CREATED", "EXPIRES", "REVOKED", "LAST USED")
    _print_table([header, *asyncio.run(read())])


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
def revoke_key(key_id: str) -> None:
    """End the key ID (the part between usk_ and the secret): servers see it within 30 s."""
    from user_service_server.keys import repository

    async def revoke() -> bool:
        async with _connected() as connection:
            return await repository.revoke_key(connection, key_id, timedelta())

    if not asyncio.run(revoke()):
        raise click.ClickException("there is no such key, or it was revoked before")


@keys.command("rotate")
@click.argument("key_id", metavar="ID")
@click.option("--grace", type=DURATION, default="24h", show_default=True)
@click.option("--expires", type=DURATION, help="After how long the new one ends.")
def rotate_key(key_id: str, grace: timedelta, expires: timedelta | None) -> None:
    """Make a key like ID and print it; ID itself ends after the grace."""
    from user_service_server.keys import repository

    async def rotate() -> str | None:
        async with _connected() as connection:
            old = await repository.read_to_rotate(connection, key_id)
            if old is None:
                return None
            await repository.revoke_key(connection, key_id, grace)
            return await repository.create_key(connection, old.name, old.scopes, expires)

    made = asyncio.run(rotate())
    if made is None:
        raise click.ClickException("there is no such key, or it was revoked before")
    print(made)


@commands.group()
def epoch() -> None:
    """The mark by which caches, clients and cursors know the database they belong to."""


@epoch.command()
def show() -> None:
    """Print the epoch."""
    from user_service_server.storage.state import read_epoch

    settings = load_settings(os.environ, _DOTENV)
    print(asyncio.run(read_epoch(settings)))


@epoch.command()
def renew() -> None:
    """Begin a new epoch, after a backup was restored: nothing of before is believed any more."""
    from user_service_server.storage.state import renew_epoch

    settings = load_settings(os.environ, _DOTENV)
    print(asyncio.run(renew_epoch(settings)))


def _age(text: str) -> timedelta:
    """Read a number of days, such as `270d`."""
    found = re.fullmatch(r"([1-9][0-9]{0,3})d", text)
    if found is None:
        raise click.BadParameter("Expected a number of days, such as 270d.")
    return timedelta(days=int(found[1]))


def _instant(text: str) -> datetime:
    """Read a time with its offset (RFC 3339)."""
    with contextlib.suppress(ValueError):
        instant = datetime.fromisoformat(text)
        if instant.tzinfo is not None and 1970 <= instant.year < 9999:
            return instant.astimezone(UTC)
    raise click.BadParameter("Expected a time with its offset, such as 2026-01-02T03:04:05Z.")


@commands.group()
def devices() -> None:
    """The devices of all users."""


@devices.command()
@click.option(
    "--older-than", type=_age, metavar="DAYS", required=True, help="Not seen for so long: 270d."
)
def prune(older_than: timedelta) -> None:
    """Deactivate the devices that were not seen for long (reason: stale)."""

    async def work(sweeps: Sweeps) -> None:
        now = await sweeps.now()
        done = await _show_steps(sweeps, "Pruning", sweeps.prune(now - older_than))
        print(f"Deactivated {done.changed} devices of {done.users} users.")

    _sweep(work)


@devices.command()
@click.option(
    "--since", type=_instant, metavar="TIME", required=True, help="Deactivated then or later."
)
@click.option(
    "--reason",
    type=click.Choice(["unregistered", "expired", "stale"]),
    required=True,
    help="Deactivated for this reason.",
)
def reactivate(since: datetime, reason: str) -> None:
    """Undo what feedback or prune has done wrongly: activate the devices again."""

    async def work(sweeps: Sweeps) -> None:
        steps = sweeps.reactivate(since, reason)
        done = await _show_steps(sweeps, "Reactivating", steps)
        print(f"Reactivated {done.changed} devices of {done.users} users.")
        if done.left:
            print(f"{done.left} stay inactive: their users have as many as may be active.")

    _sweep(work)


class _Done(NamedTuple):
    changed: int
    users: int
    left: int


async def _show_steps(sweeps: Sweeps, label: str, steps: AsyncIterator[Step]) -> _Done:
    """Do the steps, with a bar on standard error if that is a terminal; returns what was done."""
    changed = users = left = 0
    with click.progressbar(
        length=await sweeps.estimate(),
        label=label,
        file=sys.stderr,
        hidden=not sys.stderr.isatty(),
    ) as bar:
        async for step in steps:
            bar.update(step.seen)
            changed, users, left = changed + step.changed, users + step.users, left + step.left
    return _Done(changed, users, left)


def _sweep(work: Callable[[Sweeps], Coroutine[None, None, None]]) -> None:
    from user_service_server.app import opened_sweeps

    settings = load_settings(os.environ, _DOTENV)
    _configure_logs(settings)

    async def run() -> None:
        async with opened_sweeps(settings) as sweeps:
            await work(sweeps)

    asyncio.run(run())


@commands.command("settings")
def print_settings() -> None:
    """Print every setting with what is in force, its default and its meaning."""
    rows = describe_settings(os.environ, _DOTENV)
    _print_table([("NAME", "IN FORCE", "DEFAULT", "MEANING"), *rows])
    load_settings(os.environ, _DOTENV)


def _run(
    settings: Settings,
    listener: socket.socket | None = None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    from user_service_server.app import create_app

    async def run() -> None:
        draining = asyncio.Event()
        app = create_app(settings, draining)
        await serve_app(app, settings, draining=draining, listener=listener, on_ready=on_ready)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


@contextlib.asynccontextmanager
async def _connected() -> AsyncIterator[AsyncConnection]:
    """Give a connection, and commit what was done on it."""
    from user_service_server.storage.database import connected

    async with connected(load_settings(os.environ, _DOTENV)) as connection:
        yield connection
        await connection.commit()


def _shown(instant: datetime | None) -> str:
    return "-" if instant is None else instant.isoformat(" ", "seconds")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, of which the last column may be long."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]))


def _configure_logs(settings: Settings) -> None:
    from user_service_server.logs import configure

    configure(settings.log_level, settings.log_format)


def _migrate(settings: Settings) -> None:
    from user_service_server.storage.migrations import upgrade

    upgrade(settings)


@contextlib.contextmanager
def _ending_in_order() -> Iterator[contextlib.ExitStack]:
    """Yield a stack that is unwound also when a signal ends the command."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    with contextlib.ExitStack() as stack:
        yield stack


def _welcome(settings: Settings, data_dir: Path) -> str:
    everywhere = {"127.0.0.1", "0.0.0.0", "::", "::1"}  # noqa: S104 - they are only shown
    host = "localhost" if settings.host in everywhere else settings.host
    service = f"http://{host}:{settings.port}"
    places = {
        "service": service,
        "docs": f"{service}/docs",
        "database": hide_password(settings.database_url),
        "redis": hide_password(settings.redis_url),
        "data": str(data_dir.absolute()),
    }
    lines = [f"{name:<10}{place}" for name, place in places.items()]
    curl = _FIRST_CURL.format(service=service)
    return "\n".join(["", *lines, "", "Try:", "", curl, "", "Ctrl-C ends it."])
