"""The two kinds of struct everything here is made of: what is sent, and what is answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import msgspec

K = TypeVar("K")
V = TypeVar("V")


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a caller sends: a field that nobody knows is a mistake, and is refused by name."""

    def __repr__(self) -> str:
        """Name the fields only: their values are passwords, tokens and addresses."""
        said = (f.name for f in msgspec.structs.fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{name}=…' for name in said)})"


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """What the service answers: fields of a newer server are passed over, not refused."""


class FrozenDict(dict[K, V]):
    """A read-only `dict`, so that a shared document is immutable to the bottom.

    It stays a `dict` because msgspec encodes those natively (a `MappingProxyType` it refuses).

    >>> FrozenDict(a=1)["a"]
    1
    """

    __slots__ = ()

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError("this mapping is read-only")

    __setitem__ = __delitem__ = _refuse
    __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[FrozenDict[K, V]], tuple[dict[K, V]]]:
        return type(self), (dict(self),)


def freeze(mapping: Mapping[K, V] | Iterable[tuple[K, V]]) -> FrozenDict[K, V]:
    """Return a read-only copy of `mapping`, or `mapping` itself if it is one already."""
    return mapping if isinstance(mapping, FrozenDict) else FrozenDict(mapping)
