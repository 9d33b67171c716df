"""How the service logs: one JSON object a line, with the request's id and no personal data."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import msgspec
import structlog
from structlog.contextvars import merge_contextvars


def configure(level: str, style: Literal["json", "text"]) -> None:
    """Set up logging of the process: ours, and the warnings of the libraries below."""
    number = logging.getLevelNamesMapping()[level.upper()]
    renderer: Callable[..., Any] = (
        structlog.processors.JSONRenderer(serializer=_encode)
        if style == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    chain: list[Callable[..., Any]] = [
        merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
    ]
    structlog.configure(
        processors=[*chain, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=chain,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    # Libraries may write addresses and parameters at lower levels.
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)


def describe(error: BaseException) -> dict[str, Any]:
    """Return an error's type and where it happened, without its message.

    Messages of drivers hold values (`Key (email)=(…)`), and values are personal data.
    """
    causes: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in causes:
        causes.append(current)
        current = current.__cause__ or current.__context__
    return {
        "error": " < ".join(type(cause).__qualname__ for cause in causes),
        "frames": _frames(error.__traceback__),
    }


def _frames(trace: TracebackType | None) -> list[str]:
    return [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(trace)]


def _encode(event: Any, **_options: Any) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()
