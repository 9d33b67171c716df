"""Owns what garbles requests: bodies that are nearly right, texts that are traps, torn bytes.

All of it is drawn from a seed, so that what was found is found again.
"""

from __future__ import annotations

import json
import random
import re
import traceback
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import UnsetType

Seeds = Iterable[int]
MAX_FINDINGS = 20

PLAIN = [
    *(
        "Jane Roe",
        "jane@example.com",
        "Strong-Pass-123!",
        "+48221234567",
        "pl-PL",
        "22:00",
        "07:00",
    ),
    *("Europe/Warsaw", "2026-01-02T03:04:05Z", "marketing", "com.example.app"),
    "01a205c7-a743-7a16-a135-c839ba84936e",
]
"""What nobody has anything against, in some field."""

TEXTS = [
    *("", " ", "a", "Jane Roe", "null", "true", "0", "body", "zqxjkv" * 3),
    *("\u00a0Jane\u2003", "Ja\x00ne", "Jane\n", "\x85Jane", "Ja\u2028ne", "Jane\x7f", "\ufeffJane"),
    *(
        "\u202eenaJ",
        "J\u200dane",
        "Jane\U000e0041",
        "\U0001f469\u200d\U0001f4bb",
        "a" + "\u0300" * 60,
    ),
    *(
        "\u00e9",
        "e\u0301",
        "\ufb01",
        "\u212a",
        "\u0130",
        "\u0131",
        "\u00df",
        "\u1e9e",
        "\ufdfa",
        "\uffff",
    ),
    *("x" * 63, "x" * 64, "x" * 65, "x" * 128, "x" * 129, "\U0001f600" * 200, "\ufdfa" * 201),
    *(
        "\u0390" * 128,
        "x" * 1024,
        "\u00e9" * 1024,
        "x" * 4096,
        "x" * 4097,
        "' OR 1=1 --",
        "%s{0}$1",
    ),
    *("jane@example.com", "JANE@EXAMPLE.COM", "jane@m\u00fcnchen.example", "j\u00e4ne@example.com"),
    *(
        "ja\u0308ne@example.com",
        "jane@xn--mnchen-3ya.example",
        "jane@fa\u00df.example",
        "jane@xn--a",
    ),
    *("jane@\uff45xample.com", "jane@example\u3002com", "jane@example.com.", "\u0130@example.com"),
    *(
        "jane@[127.0.0.1]",
        "jane@[IPv6:::1]",
        '"jane roe"@example.com',
        "jane@-example.com",
        "@",
        "a@b",
    ),
    *(
        "jane@" + "a." * 120 + "com",
        "j" * 64 + "@example.com",
        "jane@\u0660.example",
        "a@\u200d.com",
    ),
    *("jane@" + "\u00fc" * 60 + ".com", "jane@xn--" + "9" * 58 + ".com", "\u0345@example.com"),
    *(
        "+48221234567",
        "+4812",
        "+1" + "0" * 14,
        "+999999999999999",
        "+\u0664\u0668221234567",
        "0048",
    ),
    *(
        "en",
        "pl-PL",
        "de-1901-1901",
        "i-klingon",
        "x-private",
        "en-x",
        "zh-min-nan",
        "a-b-c-d-e",
        "art-lojban",
    ),
    *("sl-rozaj-biske-1994", "en-u-co-phonebk", "zz-ZZ", "root", "en_US", "mis", "\u0131d"),
    *("22:00", "07:00", "24:00", "00:00", "23:59", "7:00", "2\u0662:00", "22:00\n"),
    *(
        "Europe/Warsaw",
        "europe/warsaw",
        "UTC",
        "Factory",
        "localtime",
        "posixrules",
        "../etc/passwd",
    ),
    *("Europe/", "Etc/GMT+12", "America/Argentina/ComodRivadavia", "zone.tab", "right/UTC", "/UTC"),
    *("2026-01-02T03:04:05Z", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999-23:59"),
    *("1970-01-01T00:00:00Z", "1969-12-31T23:59:59.9999999Z", "9998-12-31T23:59:59-23:59"),
    *("2016-12-31T23:59:60Z", "2026-02-30T00:00:00Z", "2026-01-02t03:04:05.123456789z"),
    *(
        "2026-01-02 03:04:05+00:00",
        "2026-01-02T03:04:05",
        "0001-01-01T00:00:00Z",
        "12026-01-01T00:00:00Z",
    ),
    *("01a205c7-a743-7a16-a135-c839ba84936e", "01A205C7-A743-7A16-A135-C839BA84936E"),
    *("01a205c7a7437a16a135c839ba84936e", "{01a205c7-a743-7a16-a135-c839ba84936e}", "\u0660" * 36),
    *("marketing", "a.b", "__proto__", "constructor", "..", "marketing\n", "-"),
    *(
        '{"endpoint":"https://push.example/1","keys":{}}',
        '{"endpoint":"\\ud800"}',
        '{"endpoint":1}',
    ),
    *(
        '{"endpoint":"' + "\\u0000" * 9 + '"}',
        '{"a":' * 600 + "1",
        '{"endpoint":"a","endpoint":"b"}',
    ),
    *(
        "Strong-Pass-123!",
        "Password1",
        "p\u00e4ssw\u00f6rd-\U0001f600",
        "\x00" * 8,
        "\U0001f600" * 128,
    ),
]
"""What somebody fell for once, valid or not, for whatever field."""

_RAW = [
    *(b"-0", b"-0.0", b"0", b"1", b"-1", b"1e400", b"-1e400", b"1e-400", b"1E+2", b"0.1", b"1.0"),
    *(
        b"9" * 30,
        b"9" * 4300,
        b"9" * 5000,
        b"-" + b"9" * 400,
        b"1e" + b"9" * 30,
        b"0." + b"1" * 500,
    ),
    *(b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"9007199254740993"),
    *(b"NaN", b"Infinity", b"-Infinity", b"01", b"+1", b"1.", b".5", b"0x10", b"1_0", b"--1", b"-"),
    *(b"true", b"false", b"null", b"True", b"nul", b"undefined", b"[]", b"{}", b"[[]]", b'{"":{}}'),
    *(b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\ud83d\\ude00"', b'"\\u0000"', b'"\\x41"', b'"\\u12"'),
    *(
        b'"\xed\xa0\x80"',
        b'"\xff"',
        b'"\xc0\xaf"',
        b'"\xf4\x90\x80\x80"',
        b"'a'",
        b'"a',
        b'"\t"',
        b'""',
    ),
    *(b"/**/1", b"[1,]", b'{"a":1,}', b"[,]", b"{1:2}", b"\xef\xbb\xbf", b"\x00", b""),
]
"""What may stand in the place of a value, or of what is none."""

_TORN = [
    *(
        b"\x00",
        b"\xef\xbb\xbf",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
    ),
    *(
        b",",
        b":",
        b" ",
        b"\n",
        b"\\u",
        b"\\ud800",
        b"-",
        b"e",
        b"9",
        b"\xe2\x80\xa8",
        b"//",
        b"\x1f",
    ),
]


class Garbler:
    """Draws from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self._rate = self.random.choice([0.0, 0.03, 0.1, 0.5])

    def body(self, type_: type[Any], limit: int) -> bytes:
        """Return a body that is a `type_`, or was meant to be; of at most `limit` bytes."""
        how = self.random.random()
        if how < 0.03:
            return self._deep(limit)
        if how < 0.08:
            return self._much(type_, limit)
        body = self._value(type_)
        if how < 0.35:
            body = self.torn(body)
        return body[:limit]

    def torn(self, data: bytes) -> bytes:
        """Return bytes a few of which are others, or gone, or there twice."""
        for _ in range(self.random.choice([1, 1, 2, 5])):
            at = self.random.randint(0, len(data))
            to = min(len(data), at + self.random.choice([0, 1, 1, 2, 8, 64]))
            inserted = self.random.choice(
                [
                    self.random.choice(_TORN),
                    self.random.choice(_RAW),
                    self.random.randbytes(self.random.randint(1, 4)),
                    data[at:to] * 2,
                    b"",
                ]
            )
            data = data[:at] + inserted + data[to:]
        if self.random.random() < 0.2:
            data = data[: self.random.randint(0, len(data))]
        return data

    def text(self) -> str:
        """Return a text that is no friend."""
        text = self.random.choice(TEXTS)
        if self.random.random() < 0.2:
            at = self.random.randint(0, len(text))
            inserted = self.random.choice([*TEXTS, chr(self.random.randint(0, 0xD7FF))])
            text = text[:at] + inserted[: self.random.randint(1, 40)] + text[at:]
        return text

    def _value(self, type_: Any) -> bytes:
        if self.random.random() < self._rate:
            return self._anything()
        declared = type_
        if get_origin(type_) is Annotated:
            type_ = get_args(type_)[0]
        origin = get_origin(type_)
        if origin in (Union, UnionType):
            members = [member for member in get_args(type_) if member is not UnsetType]
            return self._value(self.random.choice(members))
        if origin is Literal:
            return self._string(self.random.choice(get_args(type_)))
        if origin in (list, tuple):
            return self._list([self._value(get_args(type_)[0]) for _ in range(self._few())])
        if origin is dict:
            key, item = get_args(type_)
            return self._object([(self._name(key), self._value(item)) for _ in range(self._few())])
        if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
            return self._object(self._fields(type_))
        if type_ is bool:
            return self.random.choice([b"true", b"false"])
        if type_ is type(None):
            return b"null"
        return self._string(self._fitting(declared))

    def _fitting(self, type_: Any) -> str:
        """Return a text that the type has nothing against: one in two times the plainest."""
        plain, all_ = _fitting(type_)
        text = self.random.choice(all_ if self.random.random() < 0.5 else plain)
        return text.replace("jane@example", f"jane.{self.random.getrandbits(40)}@example")

    def _fields(self, struct: type[msgspec.Struct]) -> list[tuple[bytes, bytes]]:
        hints = get_type_hints(struct, include_extras=True)
        config = struct.__struct_config__
        pairs = [
            (self._string(field.encode_name), self._value(hints[field.name]))
            for field in msgspec.structs.fields(struct)
            if field.required or self.random.random() < 0.5
        ]
        if config.tag_field:
            pairs.append((self._string(config.tag_field), self._string(str(config.tag))))
        if self.random.random() < self._rate:
            pairs.append((self._string(self.text()), self._anything()))
        if pairs and self.random.random() < self._rate:
            pairs.append((self.random.choice(pairs)[0], self._anything()))
        if pairs and self.random.random() < self._rate:
            pairs.remove(self.random.choice(pairs))
        self.random.shuffle(pairs)
        return pairs

    def _name(self, type_: Any) -> bytes:
        known = self.random.random() >= self._rate
        return self._string(self._fitting(type_) if known else self.text())

    def _anything(self) -> bytes:
        if self.random.random() < 0.5:
            return self.random.choice(_RAW)
        return self._string(self.text())

    def _few(self) -> int:
        return self.random.choice([0, 1, 1, 2, 3, 8])

    def _string(self, text: str) -> bytes:
        ascii_only = self.random.random() < 0.3
        written = json.dumps(text, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        if text and self.random.random() < 0.05:
            return b'"' + b"".join(b"\\u%04x" % min(ord(c), 0xFFFF) for c in text) + b'"'
        return written

    def _list(self, items: list[bytes]) -> bytes:
        return b"[" + self._comma().join(items) + b"]"

    def _object(self, pairs: list[tuple[bytes, bytes]]) -> bytes:
        return b"{" + self._comma().join(name + b":" + value for name, value in pairs) + b"}"

    def _comma(self) -> bytes:
        return self.random.choice([b",", b",", b",", b" ,\n\t\r "])

    def _deep(self, limit: int) -> bytes:
        opening, closing = self.random.choice(
            [(b"[", b"]"), (b'{"a":', b"}"), (b'{"preferences":', b"}"), (b'{"items":[', b"]}")]
        )
        depth = self.random.choice([5, 50, 400, 900, 1000, 1100, 10_000, limit])
        depth = min(depth, (limit - 1) // (len(opening) + len(closing)))
        return opening * depth + b"1" + closing * self.random.choice([depth, 0])

    def _much(self, type_: type[Any], limit: int) -> bytes:
        """Return a body as large as it may be: of one thing, many times."""
        item = self.random.choice([b"1", b"[]", b"{}", b'""', b'"\\u0000"', self._anything()])
        field = self.random.choice(msgspec.structs.fields(type_))
        head = b"{" + self._string(field.encode_name) + b":"
        room = (limit - len(head) - 2) // (len(item) + 12)
        named = b",".join(b'"%x":%b' % (i, item) for i in range(room))
        many = b",".join([item] * room)
        text = self._string(self.text())[1:-1] or b" "
        return self.random.choice(
            [
                head + b"[" + many + b"]}",
                head + b"{" + named + b"}}",
                b"{" + named + b"}",
                b"[" + many + b"]",
                head + b'"' + text * ((limit - len(head) - 3) // len(text)) + b'"}',
                b" " * (limit - 2) + b"{}",
            ]
        )[:limit]


@cache
def _fitting(type_: Any) -> tuple[list[str], list[str]]:
    """Return the plain texts, and all texts, that a field of this type may hold."""

    def fits(text: str) -> bool:
        try:
            msgspec.convert(text, type_)
        except msgspec.ValidationError:
            return False
        return True

    plain = [text for text in PLAIN if fits(text)]
    assert plain, f"no text is a {type_}: add one"
    return plain, [text for text in TEXTS if fits(text)] or plain


class Late(Exception):
    """A busy machine had no time for the engines: a 503, which says nothing of what was sent."""


class Findings:
    """What was found, once for each place and text: a search goes on, and tells in the end."""

    def __init__(self) -> None:
        self._found: dict[object, BaseException] = {}

    def note(self, error: BaseException, seed: int) -> None:
        """Keep what a seed has shown, unless it was shown before."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = re.sub(r"[0-9a-f-]{8,}|\d+", "#", str(error))[:60]
        place = (type(error), last.filename, last.lineno, text)
        if place not in self._found and len(self._found) < MAX_FINDINGS:
            error.add_note(f"seed {seed}")
            self._found[place] = error

    def tell(self) -> None:
        """Raises a `BaseExceptionGroup`, if there is something."""
        if self._found:
            raise BaseExceptionGroup("findings", list(self._found.values()))


def search(check: Callable[[int], object], seeds: Seeds) -> None:
    """Check each seed, and tell in the end what was found."""
    findings = Findings()
    for seed in seeds:
        try:
            check(seed)
        except Exception as error:  # noqa: BLE001 - whatever it is, it was found
            findings.note(error, seed)
    findings.tell()


async def search_async(check: Callable[[int], Awaitable[object]], seeds: Seeds) -> None:
    """Check each seed as `search` does."""
    findings, tried, late = Findings(), 0, 0
    for seed in seeds:
        tried += 1
        try:
            await check(seed)
        except Late:
            late += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it was found
            findings.note(error, seed)
    findings.tell()
    assert late <= 1 + tried // 50, f"{late} of {tried} were not answered"
