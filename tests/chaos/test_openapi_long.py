"""The search of `tests/server/test_openapi_keys.py` for `CHAOS_SECONDS`, never twice the same."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import Counter

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from schemathesis.generation import GenerationMode

from ..server.garbling import Findings
from ..server.test_openapi_keys import Keyed, keyed, settings
from .test_fuzz import quiet

SECONDS = float(os.environ.get("CHAOS_SECONDS", "60"))
LOTS = hypothesis.settings(
    max_examples=30,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

__all__ = ["keyed", "quiet", "settings"]  # fixtures


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
def test_no_answer_to_a_key_is_outside_of_the_contract(keyed: Keyed) -> None:
    """Operations in turn, each with a key that may do everything, or one thing."""
    until = time.monotonic() + SECONDS
    findings, tried = Findings(), Counter[str]()
    chance = random.Random()  # noqa: S311 - no secret
    for operation in itertools.cycle(chance.sample(keyed.operations, len(keyed.operations))):
        if time.monotonic() >= until:
            break
        mode = chance.choice(list(GenerationMode))
        name = chance.choice(["everything", chance.choice(list(keyed.callers))])
        tried[name] += 1
        try:
            keyed.exercise(name, operation, mode, LOTS)
        except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - whatever it is, it was found
            findings.note(error, 0)
    print(f"\n{30 * tried.total()} at most: {tried}")  # noqa: T201
    findings.tell()
