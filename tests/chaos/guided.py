"""Fuzzing that is guided by what code an input reaches: `python -m tests.chaos.guided CORPUS …`.

Not one of the tests: atheris has no wheels for every platform, and libFuzzer wants a process of its
own, which ends with the first finding. `pip install atheris`; what stands behind the corpus is
libFuzzer's, such as `-max_total_time=600`.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["user_service_schemas", "user_service_server", "email_validator", "idna", "langcodes"]
):
    from user_service_server.changes.feed import Cursor
    from user_service_server.errors import InvalidCursor
    from user_service_server.http.requests import UUID_PATTERN, decode_cursor, encode_cursor
    from user_service_server.storage.document import EntityTags

    from ..engines import settings_for
    from ..server.garbling import Garbler
    from ..server.test_fuzz import Bodies, type_of

# Nothing is connected to. Instrumented code takes its time: others measure that.
bodies = Bodies(settings_for("postgresql+asyncpg://nobody@localhost/nothing", "redis://nobody"), 10)


def check(data: bytes) -> None:
    """Read what the first byte says: the body of one of the operations, or a text of a header."""
    which, rest = data[0] if data else 0, data[1:]
    if which < 2 * len(bodies.handlers):
        bodies.check_body(bodies.handlers[which % len(bodies.handlers)], rest)
    else:
        check_text(rest.decode("latin-1" if which % 2 else "utf-8", "replace"))


def check_text(text: str) -> None:
    """Read a cursor of each kind, and tags."""
    with contextlib.suppress(InvalidCursor):
        assert str(Cursor.parse(text)) == text
    for listing, pattern in (("users", UUID_PATTERN), ("history", "[0-9]{1,18}")):
        try:
            position = decode_cursor(listing, text, pattern)
        except InvalidCursor:
            continue
        assert position is not None
        assert decode_cursor(listing, encode_cursor(listing, position), pattern) == position
    assert not EntityTags(text).name_version("nowhere", 0) or text.strip() == "*"


def sow(corpus: Path) -> None:
    """Begin with bodies that are nearly right, and with cursors that are."""
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in range(1000):
        garbler = Garbler(seed)
        which = seed % len(bodies.handlers)
        body = garbler.body(type_of(bodies.handlers[which]), 2048)
        (corpus / f"body-{seed}").write_bytes(bytes([which]) + body)
    texts = ["c97e0d6c.36", encode_cursor("history", "12"), '"c97e0d6c.ab.3"', "*"]
    texts.append(encode_cursor("users", "01a205c7-a743-7a16-a135-c839ba84936e"))
    for number, text in enumerate(texts):
        (corpus / f"text-{number}").write_bytes(b"\xff" + text.encode())


if __name__ == "__main__":
    sow(Path(sys.argv[1]))
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
