"""Tells those who wait for what is done at once for many. Whoever has hung up is passed over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def tell(waiting: Iterable[asyncio.Future[T]], result: T) -> None:
    """Give a result to all who wait for it."""
    for future in waiting:
        if not future.done():
            future.set_result(result)


def fail(waiting: Iterable[asyncio.Future[Any]], error: BaseException) -> None:
    """Raise an error, whatever it is, for all who wait: else they would wait without end."""
    for future in waiting:
        if not future.done():
            future.set_exception(error)
