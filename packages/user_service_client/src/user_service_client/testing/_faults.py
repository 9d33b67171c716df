"""What a test scripts to go wrong, and what of it has not happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from ._routes import OPERATIONS, STREAM

T = TypeVar("T")

Route: TypeAlias = str | Callable[[str, str], bool] | None
"""Which requests a fault is for: the client's method, such as `users.get`; a function of method
and path; or None, all but the change stream, which is opened when nobody looks."""


@dataclass
class Fault(Generic[T]):
    """Something that happens to the next requests that it is for.

    `times` is how often, None: until it is cleared.
    """

    kind: str
    said: str
    how: T
    times: int | None
    route: Route
    used: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.route, str) and self.route not in OPERATIONS:
            raise ValueError(f"route is none of {', '.join(sorted(OPERATIONS))}")
        if self.times is not None and self.times < 1:
            raise ValueError("times must be at least 1")

    @property
    def is_unused(self) -> bool:
        """Whether it did not happen as often as it was to."""
        return self.used < (1 if self.times is None else self.times)

    def describe(self) -> str:
        """Say what it is, and how often it happened."""
        said = [self.said, f"times={self.times}"]
        if self.route is not None:
            said.append(f"route={self.route!r}")
        return f"{self.kind}({', '.join(said)}) happened {self.used} times"

    def is_for(self, operation: str | None, method: str, path: str) -> bool:
        if self.route is None:
            return operation != STREAM
        if isinstance(self.route, str):
            return self.route == operation
        return self.route(method, path)


class Script(Generic[T]):
    """The faults of one kind, in the order in which they were scripted."""

    def __init__(self) -> None:
        self._faults: list[Fault[T]] = []

    def add(self, fault: Fault[T]) -> None:
        """Script one more."""
        self._faults.append(fault)

    def take(self, operation: str | None, method: str, path: str) -> T | None:
        """Return what is to happen to a request, and count it."""
        for fault in self._faults:
            spent = fault.times is not None and fault.used >= fault.times
            if not spent and fault.is_for(operation, method, path):
                fault.used += 1
                return fault.how
        return None

    def unused(self) -> list[str]:
        """Describe those that did not happen as often as they were to."""
        return [fault.describe() for fault in self._faults if fault.is_unused]

    def clear(self) -> None:
        """Forget all."""
        self._faults.clear()
