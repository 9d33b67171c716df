"""How a request's bytes become a struct: strictly, and with every bad field named at once.

Strings are trimmed and control characters refused, except in passwords, which are nobody's to
change. The server reads its bodies with this, and so can a stand-in for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .envelope import FieldError
from .errors import RuleViolation

T = TypeVar("T")

VERBATIM = frozenset({"password", "current_password"})
BODY = "body"
"""The `field` of an error that concerns the request as a whole."""

MAX_VALUES = 100_000
"""How many values a body may have. A thousand reports, the most that is meant, are 10,000, those
inside of web-push subscriptions counted; to read a million takes the event loop half a second."""

MAX_ERRORS = 100
"""How many bad fields are named: a body can have more than anybody reads."""

_Place = tuple["_Place | None", object]
"""Where a value stands: where what it stands in stands, and its name or number there."""

_UNCLEAN = object()
"""In the place of a string with forbidden characters: it fits no type."""
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SHOWABLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PATH = re.compile(r" - at `.*`$")


class MalformedJSON(ValueError):
    """The bytes are not JSON, or JSON that nests too deeply, or has too many values."""

    def __init__(self) -> None:
        super().__init__("The body is not valid JSON, is too deep, or has too many values.")


def decode_request(body: bytes, type_: type[T]) -> T:
    """Decode a JSON body into `type_`.

    Raises:
        MalformedJSON: it is not JSON (RFC 8259), is not UTF-8, nests too deeply, or has more than
            `MAX_VALUES` values.
        RuleViolation: it does not fit `type_`; `details` names every bad field.
    """
    # Each value stands behind one of these, or alone. Those in strings count, too: it is a bound.
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise MalformedJSON
    try:
        return convert_request(msgspec.json.decode(body), type_)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedJSON from error


def convert_request(raw: object, type_: type[T]) -> T:
    """Convert decoded JSON into `type_`.

    Raises:
        RuleViolation: `details` names every bad field, up to `MAX_ERRORS`; `valid` has the others.
    """
    unclean: list[FieldError] = []
    cleaned = _clean(raw, None, unclean)
    if not unclean:
        try:
            return msgspec.convert(cleaned, type_)
        except msgspec.ValidationError:
            pass
    found = islice(_errors(cleaned, type_, ""), MAX_ERRORS)
    bad = {detail.field: detail for detail in (*found, *unclean)}
    raise RuleViolation(*islice(bad.values(), MAX_ERRORS), valid=_valid(cleaned, type_))


def _clean(value: object, place: _Place | None, unclean: list[FieldError]) -> object:
    """Return `value` with its strings trimmed, noting those with forbidden characters."""
    if isinstance(value, str):
        trimmed = value.strip()
        if _CONTROL.search(trimmed):
            _note_unclean(place, unclean)
            return _UNCLEAN
        return trimmed
    if isinstance(value, list):
        return [_clean(item, (place, i), unclean) for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            # Names are not trimmed. The types alone would not do: `$` matches before a line break.
            if _CONTROL.search(key):
                _note_unclean((place, key), unclean)
        return {
            key: item if key in VERBATIM else _clean(item, (place, key), unclean)
            for key, item in value.items()
        }
    return value


def _note_unclean(place: _Place | None, unclean: list[FieldError]) -> None:
    if len(unclean) < MAX_ERRORS:
        message = "Control characters are refused."
        unclean.append(FieldError(field=_path(place) or BODY, message=message))


def _path(place: _Place | None) -> str:
    """Return the path of a place. It is made of few places only: a body can have many."""
    if place is None:
        return ""
    above, name = place
    return f"{_path(above)}[{name}]" if isinstance(name, int) else _join(_path(above), name)


def _valid(value: object, type_: Any) -> object:
    """Return what fits of a value that as a whole does not: see `RuleViolation.valid`."""
    structs = [option for option in _meant(value, type_) if _is_struct(option)]
    if not structs or not isinstance(value, dict):
        return UNSET
    hints = _hints(structs[0])
    parts: dict[str, object] = {}
    for field in msgspec.structs.fields(structs[0]):
        if field.encode_name not in value:
            parts[field.name] = UNSET if field.required else field.default
            continue
        part = value[field.encode_name]
        try:
            parts[field.name] = msgspec.convert(part, hints[field.name])
        except msgspec.ValidationError:
            parts[field.name] = _valid(part, hints[field.name])
    return SimpleNamespace(**parts)


def _errors(value: object, type_: Any, path: str) -> Iterator[FieldError]:
    """Yield an error for every part of `value` that does not fit `type_`."""
    try:
        msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        # One by one: a body can have more errors than there is time to name.
        inner = _inner_errors(value, type_, path)
        yield next(inner, FieldError(field=path or BODY, message=_message(type_, error)))
        yield from inner


def _inner_errors(value: object, type_: Any, path: str) -> Iterator[FieldError]:
    for option in _meant(value, type_):
        if isinstance(value, dict) and _is_struct(option):
            yield from _struct_errors(value, option, path)
        elif isinstance(value, dict) and get_origin(option) is dict:
            key_type, item_type = get_args(option)
            for key, item in value.items():
                yield from _errors(key, key_type, _join(path, key))
                yield from _errors(item, item_type, _join(path, key))
        elif isinstance(value, list) and get_origin(option) in (list, tuple):
            if any(meta.max_length and len(value) > meta.max_length for meta in _metas(type_)):
                continue  # too many: that is what is wrong, whatever they are
            for i, item in enumerate(value):
                yield from _errors(item, get_args(option)[0], f"{path}[{i}]")


def _struct_errors(
    value: Mapping[str, object], struct: type[msgspec.Struct], path: str
) -> Iterator[FieldError]:
    tag_field = struct.__struct_config__.tag_field
    if tag_field and value.get(tag_field) != struct.__struct_config__.tag:
        yield FieldError(field=_join(path, tag_field), message="This value is not known.")
        return
    hints = _hints(struct)
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    for name, field in fields.items():
        if name in value:
            yield from _errors(value[name], hints[field.name], _join(path, name))
        elif field.required:
            yield FieldError(field=_join(path, name), message="This field is required.")
    for name in value:
        if name not in fields and name != tag_field:
            yield FieldError(field=_join(path, name), message="This field is not known.")


@cache
def _hints(struct: type[msgspec.Struct]) -> Mapping[str, Any]:
    """Return the types of a struct's fields. To find them takes longer than to judge a value."""
    return get_type_hints(struct, include_extras=True)


def _options(type_: Any) -> Iterator[Any]:
    """Yield the members of a union, or the type itself, without their annotations."""
    if get_origin(type_) is Annotated:
        yield from _options(get_args(type_)[0])
    elif get_origin(type_) in (Union, UnionType):
        for member in get_args(type_):
            yield from _options(member)
    else:
        yield type_


def _meant(value: object, type_: Any) -> list[Any]:
    """Return the members of a union that `value` may be meant as: of tagged structs, one."""
    options = list(_options(type_))
    tagged = [option for option in options if _is_struct(option) and option.__struct_config__.tag]
    if isinstance(value, dict) and tagged:
        named = [
            o for o in tagged if value.get(o.__struct_config__.tag_field) == o.__struct_config__.tag
        ]
        return named or tagged[:1]
    return options


def _message(type_: Any, error: msgspec.ValidationError) -> str:
    """Return what is expected in words where the type says it, else msgspec's own message."""
    for meta in _metas(type_):
        if meta.extra and "expected" in meta.extra:
            null = " or null" if type(None) in _options(type_) else ""
            return f"Expected {meta.extra['expected']}{null}."
    for option in _options(type_):
        if get_origin(option) is Literal:
            return f"Expected one of {', '.join(map(str, get_args(option)))}."
    return _PATH.sub("", str(error)).replace("`", "").removesuffix(".") + "."


def _metas(type_: Any) -> Iterator[Meta]:
    if get_origin(type_) is Annotated:
        yield from (item for item in get_args(type_)[1:] if isinstance(item, Meta))
    elif get_origin(type_) in (Union, UnionType):
        for member in get_args(type_):
            if member is not UnsetType:
                yield from _metas(member)


def _is_struct(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def _join(path: str, name: object) -> str:
    """Return the path of a field. A name that could not be one of ours is not shown back."""
    shown = str(name) if _SHOWABLE.fullmatch(str(name)) else "?"
    return f"{path}.{shown}" if path else shown
