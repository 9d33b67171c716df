"""Statements of SQLAlchemy that asyncpg runs itself, and those that many ask at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import asyncpg
from sqlalchemy import CTE, ColumnClause, column, text
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.sql.expression import ClauseElement

_DIALECT = dialect()  # type: ignore[no-untyped-call]


class Fields(Protocol):
    """A row, of asyncpg or of SQLAlchemy (its mapping)."""

    def __getitem__(self, name: str, /) -> Any:
        """Return the value of a column."""


class Direct:
    """A statement of SQLAlchemy that is compiled once, and run by asyncpg itself.

    To run one through SQLAlchemy costs 200 to 280 µs of CPU, and so 45 to 110. What it returns are
    asyncpg's rows: an id in them is asyncpg's UUID.
    """

    def __init__(self, statement: ClauseElement) -> None:
        compiled = statement.compile(dialect=_DIALECT)
        self.text = str(compiled)
        self._constants = compiled.params
        self._names = tuple(compiled.positiontup)  # type: ignore[attr-defined]

    async def fetch(
        self, connection: asyncpg.Connection, parameters: Mapping[str, Any]
    ) -> list[Fields]:
        """Run it on a connection of `driver` or `Database.direct`."""
        said = {**self._constants, **parameters}
        rows: list[Fields] = await connection.fetch(self.text, *map(said.get, self._names))
        return rows


def rows_of(types: Mapping[str, str]) -> str:
    """Return the SELECT with a row for each who asks (see `together`), of the `types` of SQL.

    Beside them it has `id`, a UUID, and `n`, which says who it is, from 1. Only the ids are
    unnested, and those of a subquery's result (see `document.is_one_of`).
    """
    others = "".join(f", (CAST(:{name} AS {of}[]))[n] AS {name}" for name, of in types.items())
    return f"""
        SELECT id, n{others}
        FROM unnest((SELECT CAST(:id AS uuid[]))) WITH ORDINALITY AS given (id, n)
    """  # noqa: S608 - of constants


def asking(types: Mapping[str, str]) -> CTE:
    """Return these rows as the part `asked` of a statement of SQLAlchemy."""
    columns: list[ColumnClause[Any]] = [column(name) for name in ("id", "n", *types)]
    return text(rows_of(types)).columns(*columns).cte("asked")


def row_of(types: Mapping[str, str]) -> str:
    """Return the SELECT of one row, for a statement that nobody shares."""
    return "SELECT " + ", ".join(f"CAST(:{name} AS {of}) AS {name}" for name, of in types.items())
