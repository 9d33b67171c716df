"""The catalogue: which categories of messages there are, and what holds where nothing was said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

import msgspec

from ._base import freeze
from .envelope import FieldError
from .errors import RuleViolation
from .fields import CATEGORY_PATTERN, CHANNELS
from .preferences import MAX_CATEGORIES

Mode: TypeAlias = Literal["on", "off", "required"]

_MODES = ("on", "off", "required")
_NAME = re.compile(CATEGORY_PATTERN)
_ROOT = "catalogue"


class Catalogue(msgspec.Struct, frozen=True):
    """Per category and channel: `on`, `off` (it needs an opt-in) or `required`.

    Categories stand in the order in which they were written, and are shown in it.

    >>> catalogue = Catalogue.parse('{"security": {"email": "required", "push": "on"}}')
    >>> catalogue.requires("security", "email"), catalogue.requires("security", "push")
    (True, False)
    """

    categories: Mapping[str, Mapping[str, Mode]]

    def __post_init__(self) -> None:
        frozen = freeze({name: freeze(modes) for name, modes in self.categories.items()})
        msgspec.structs.force_setattr(self, "categories", frozen)

    @classmethod
    def parse(cls, text: str | bytes) -> Catalogue:
        """Return the catalogue of a JSON text: `{"marketing": {"email": "off", "push": "on"}}`.

        Each category says both channels: a forgotten one must not decide for anybody.

        Raises:
            RuleViolation: `details` names everything that is wrong with it.
        """
        repeated: list[str] = []

        def pairs(found: list[tuple[str, object]]) -> dict[str, object]:
            names = [name for name, _ in found]
            repeated.extend(name for name in dict.fromkeys(names) if names.count(name) > 1)
            return dict(found)

        try:
            raw = json.loads(text, object_pairs_hook=pairs)
        except (ValueError, RecursionError) as error:
            raise RuleViolation(FieldError(field=_ROOT, message="This is not JSON.")) from error
        found = (
            *(FieldError(field=name, message="This is said twice.") for name in repeated),
            *_mistakes(raw),
        )
        if found:
            raise RuleViolation(*found)
        return cls(categories=raw)

    def requires(self, category: str, channel: str) -> bool:
        """Whether a category of the catalogue cannot be switched off on a channel."""
        return self.categories[category][channel] == "required"

    def is_on(self, category: str, channel: str, said: bool | None) -> bool:
        """Return the effective switch of a category, by what the user has said, if anything."""
        mode = self.categories[category][channel]
        return mode == "required" or (mode == "on" if said is None else said)


def _mistakes(raw: object) -> Iterator[FieldError]:
    if not isinstance(raw, dict):
        yield FieldError(field=_ROOT, message="Expected an object of categories.")
        return
    if not 1 <= len(raw) <= MAX_CATEGORIES:
        message = f"Expected 1 to {MAX_CATEGORIES} categories."
        yield FieldError(field=_ROOT, message=message)
    for name, modes in raw.items():
        if not _NAME.fullmatch(name):
            message = "Expected a category name of 1 to 64 characters out of a-z, 0-9, _ . -"
            yield FieldError(field=name, message=message)
        elif not isinstance(modes, dict):
            yield FieldError(field=name, message="Expected an object with email and push.")
        else:
            for channel in CHANNELS:
                if modes.get(channel) not in _MODES:
                    message = f"Expected one of {', '.join(_MODES)}."
                    yield FieldError(field=f"{name}.{channel}", message=message)
            for other in modes.keys() - set(CHANNELS):
                yield FieldError(field=f"{name}.{other}", message="This channel is not known.")
