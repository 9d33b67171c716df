"""Owns what a result is: a budget of several goals, each with its figure and what is beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One figure that has a bound.

    Attributes:
        name: What was measured.
        figure: How much it was, in `unit`.
        ceiling: The same of what it is compared with, which `beside` names; None: nothing is.
        bound: Which side of `limit` is good.
        of: Whether the figure itself is bounded, or its ratio to the ceiling.
        cpu_ratio: The ratio of the CPU time of this process; steadier than the wall time's.
        peers: Figures of others, which no bound depends on.
    """

    name: str
    figure: float
    unit: str
    bound: Literal["≤", "≥"]
    limit: float
    of: Literal["figure", "ratio"] = "ratio"
    ceiling: float | None = None
    beside: str = ""
    cpu_ratio: float | None = None
    peers: dict[str, float] | None = None

    @property
    def ratio(self) -> float | None:
        """The figure by its ceiling."""
        return None if self.ceiling is None else self.figure / self.ceiling

    @property
    def goal(self) -> str:
        """The bound in words."""
        return f"{self.bound} {self.limit:g} {'times' if self.of == 'ratio' else self.unit}"

    @property
    def used(self) -> float:
        """How much of the budget is spent: above 1, it is not met."""
        value = self.ratio if self.of == "ratio" else self.figure
        if value is None:
            raise ValueError(f"{self.name}: a ratio needs a ceiling")
        return value / self.limit if self.bound == "≤" else self.limit / value

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.used <= 1


@dataclass(frozen=True)
class Budget:
    """A row of budgets.md."""

    number: int
    name: str
    goals: tuple[Goal, ...]

    @property
    def met(self) -> bool:
        """Whether all its goals are reached."""
        return all(goal.met for goal in self.goals)

    @property
    def tightest(self) -> Goal:
        """The goal that is missed by most, or else reached with least to spare."""
        return max(self.goals, key=lambda goal: goal.used)
