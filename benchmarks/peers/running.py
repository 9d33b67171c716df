"""Owns how the peer of the service is run: its environment, its database and who is in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import asyncpg
from sqlalchemy import make_url

SERVICE = Path(__file__).with_name("fastapi_service.py")
_REQUIREMENTS = Path(__file__).with_name("fastapi.txt")
_ENVIRONMENTS = Path(__file__).parents[1] / ".environments"


def command() -> list[str]:
    """Return the command that runs the peer, which DATABASE_URL, REDIS_URL and PORT tell the rest.

    Isolated: neither this directory nor PYTHONPATH lets it import anything of ours.
    """
    return [str(_python()), "-I", str(SERVICE)]


def _python() -> Path:
    """Return the Python of an environment that has what `fastapi.txt` names; made when it is not.

    The service's own environment would do, but then its versions would be the peer's.
    """
    home = _ENVIRONMENTS / "fastapi"
    python, noted = home / "bin" / "python", home / "installed"
    wanted = f"{sys.version}\n{_REQUIREMENTS.read_text()}"
    if not noted.exists() or noted.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([python, *install, "--requirement", _REQUIREMENTS], check=True)
        noted.write_text(wanted)
    return python


async def create_database(beside: str, name: str) -> str:
    """Create a database on the server of another one, whose URL is given, and return its URL."""
    connection = await _connect(beside)
    try:
        await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
    finally:
        await connection.close()
    return make_url(beside).set(database=name).render_as_string(hide_password=False)


async def load_users(database_url: str, numbers: range) -> None:
    """Put users into the tables that the peer has made: what `documents.user` says of each number.

    PostgreSQL makes them itself, 100,000 in 7 s on a busy machine.
    """
    assert numbers.step == 1
    connection = await _connect(database_url)
    try:
        async with connection.transaction():
            for statement in _LOAD:
                await connection.execute(statement, numbers.start, numbers.stop - 1)
        await connection.execute("VACUUM (ANALYZE)")
    finally:
        await connection.close()


async def _connect(database_url: str) -> asyncpg.Connection:
    arguments = make_url(database_url).translate_connect_args(username="user")
    query = make_url(database_url).query
    return await asyncpg.connect(**arguments, **query)


# `documents.user_id`, and the rest of `documents.user`, in SQL.
_LOW = "lpad(to_hex({} * 2654435761 % (1::bigint << 48)), 12, '0')"
_ID = f"('01a205c7-a743-7a16-a135-' || {_LOW})::uuid"
_AT = "timestamptz '2026-03-14 15:09:26.535897Z'"
_NUMBERS = "FROM generate_series($1::bigint, $2::bigint) AS number"
_TOKEN = "repeat(lpad(to_hex(number), 8, '0'), 20)"
_LOAD = (
    f"""
    INSERT INTO users (id, external_id, name, email, email_key, phone, locale, email_deliverable,
        version, created_at, updated_at)
    SELECT {_ID.format("number")}, 'customer-' || number, 'Maximiliane Mustermann ' || number,
        'maximiliane.' || number || '@example.com', 'maximiliane.' || number || '@example.com',
        '+4930' || lpad(number::text, 8, '0'), 'de-DE', true, 7, {_AT}, {_AT}
    {_NUMBERS}
    """,
    f"""
    INSERT INTO preferences (user_id, email, push, quiet_hours_start, quiet_hours_end, timezone,
        categories)
    SELECT {_ID.format("number")}, true, true, '22:00', '07:00', 'Europe/Berlin',
        '{{"marketing": {{"email": false, "push": true}},
          "security": {{"email": true, "push": true}}}}'
    {_NUMBERS}
    """,
    f"""
    INSERT INTO devices (id, user_id, token, token_digest, platform, app, active, registered_at,
        last_seen_at)
    SELECT {_ID.format("(number + 1000000)")}, {_ID.format("number")}, {_TOKEN},
        sha256(convert_to({_TOKEN}, 'UTF8')), 'android', 'shop', true, {_AT}, {_AT}
    {_NUMBERS}
    """,
)
