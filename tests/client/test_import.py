"""What importing the client brings with it; how long that takes is a benchmark's business."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import user_service_client

_LOADED = "import sys, {}; print(*sys.modules)"


def _loaded_by(module: str) -> set[str]:
    script = _LOADED.format(module)
    output = subprocess.check_output([sys.executable, "-I", "-c", script], text=True)
    return {name.partition(".")[0] for name in output.split()}


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    return _loaded_by("user_service_client")


@pytest.mark.parametrize("library", ["aiohttp", "tenacity", "opentelemetry", "pytest"])
def test_the_package_alone_imports_no_library_that_takes_long(
    library: str, loaded: set[str]
) -> None:
    assert library not in loaded


def test_what_is_imported_is_looked_at(loaded: set[str]) -> None:
    assert {"user_service_client", "httpx", "msgspec"} <= loaded


def test_every_public_name_is_in_the_list_for_people() -> None:
    page = Path(__file__, "../../../docs/client.md").resolve().read_text("utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page.partition("## All public names")[2], re.MULTILINE)
    assert sorted(listed) == sorted(user_service_client.__all__)
