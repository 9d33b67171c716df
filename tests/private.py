"""Owns what the whole run has sent that is nobody else's business, and looks for it in all logs.

Emails, keys and hashes are known by their form, whoever sent them. Passwords, tokens and the like
are noted as requests are made. A log is searched when it ends: what it holds was sent before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

_FIELDS = frozenset(
    {"password", "current_password", "token", "phone", "external_id", "email", "address"}
)
_FORMS = {
    "an email": re.compile(r"[\w.+%-]+(?:@|%40)[\w-]+(?:\.[\w-]+)+"),
    "a service key": re.compile(r"usk_[0-9a-z]{12}_\w+"),
    "a hash": re.compile(r"\$argon2"),
}
# All that a request's line may say: a route, not a path. Most of a log is such lines.
_REQUEST = re.compile(
    r'\{"method":"\w+","route":"[\w/{}.-]+","status":\d+,"ms":[\d.]+,"event":"request",'
    r'"request_id":"[0-9a-f-]{36}","level":"info","at":"[\dT:.Z-]+"\}'
)
_KINDS = (str.islower, str.isupper, str.isdigit, lambda text: not text.isalnum())


def is_telling(value: str) -> bool:
    """Whether a value in a log can only come from a request: no word, and no short number.

    Nor words without a space: Hypothesis sends what it finds in our sources, such as `Connection`.
    """
    if len(value) < 8 or value.isalpha():
        return False
    return sum(any(map(kind, value)) for kind in _KINDS) >= 2


def leaves(value: object, length: int) -> Iterator[str]:
    """Yield what of the values of a body would be recognised: texts and numbers so long."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item, length)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, length)
    elif isinstance(value, str | int | float) and len(text := str(value).strip()) >= length:
        yield text


class Private:
    """What was sent, and where it was found."""

    def __init__(self) -> None:
        self.values: set[str] = set()
        self.found: list[str] = []
        self.searched = 0

    def note(self, body: bytes) -> None:
        """Note what a request's body holds."""
        try:
            self._note(msgspec.json.decode(body))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return  # its senders look for what was in it by themselves

    def _note(self, part: Any) -> None:
        if isinstance(part, list):
            for item in part:
                self._note(item)
        elif isinstance(part, dict):
            for name, value in part.items():
                if name in _FIELDS and isinstance(value, str) and is_telling(value):
                    self.values.add(value)
                elif isinstance(value, (dict, list)):
                    self._note(value)

    def search(self, log: Path) -> None:
        """Look for all of it in a log that has ended."""
        self.searched += 1
        lines = log.read_text(errors="replace").splitlines()
        said = "\n".join(line for line in lines if not _REQUEST.fullmatch(line))
        self.found += [f"{kind} in {log}: {form[0]}" for kind, form in self._forms(said)]
        self.found += [f"in {log}: {value}" for value in self.values if value in said]

    def _forms(self, said: str) -> Iterator[tuple[str, re.Match[str]]]:
        for kind, pattern in _FORMS.items():
            for form in pattern.finditer(said):
                yield kind, form


PRIVATE = Private()
"""Of this process: each xdist worker has engines and servers of its own."""


@contextmanager
def noting() -> Iterator[None]:
    """Note the body of every request that this process makes."""
    init = httpx.Request.__init__

    def noted(self: httpx.Request, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        if isinstance(self.stream, httpx.ByteStream):
            PRIVATE.note(b"".join(self.stream))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(httpx.Request, "__init__", noted)
        yield
