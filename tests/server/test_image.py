"""What the image installs is pinned by hash, and is what these tests ran with.

`nox -s package` installs it so; here the files are compared with what else says what is needed.
"""

from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FILES = ["image/build.txt", "image/runtime.txt"]
OURS = {"user-service-schemas", "user-service-server"}


@pytest.mark.parametrize("file", FILES)
def test_the_image_has_the_versions_of_the_constraints(file: str) -> None:
    """A version that was changed in one file alone is named."""
    constraints = _pins("constraints.txt")
    image = _pins(file)
    assert image
    assert {name: pin.specifier for name, pin in image.items()} == {
        name: pin.specifier for name, pin in constraints.items() if name in image
    }


@pytest.mark.parametrize("file", FILES)
def test_every_requirement_of_the_image_has_its_hash(file: str) -> None:
    """Wheels alone, each known by its hash, from whichever index pip asks."""
    content = _read(file)
    whole_lines = content.replace("\\\n", "").split("\n")
    options, *pins = [line for line in whole_lines if line and not line.startswith("#")]
    assert options == "--only-binary :all:"
    assert [pin for pin in pins if " --hash=sha256:" not in pin] == []
    assert "://" not in content


def test_the_image_gets_what_the_server_needs_and_nothing_else() -> None:
    """The list is the server's dependencies, and theirs, on this Python and system."""
    listed = {
        name
        for name, pin in _pins("image/runtime.txt").items()
        if pin.marker is None or pin.marker.evaluate()
    }
    assert listed == _needed(Requirement("user-service-server"), set()) - OURS


def _read(file: str) -> str:
    return (ROOT / file).read_text()


def _pins(file: str) -> dict[str, Requirement]:
    lines = [line.removesuffix("\\") for line in _read(file).split("\n") if line[:1].isalnum()]
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}


def _needed(requirement: Requirement, seen: set[str]) -> set[str]:
    """Return the names of a requirement and of all that it brings, as they are installed here."""
    if str(requirement) in seen:
        return set()
    seen.add(str(requirement))
    names: set[str] = {canonicalize_name(requirement.name)}
    for further in map(Requirement, requires(requirement.name) or []):
        extras = requirement.extras or {""}
        if further.marker is None or any(further.marker.evaluate({"extra": e}) for e in extras):
            names |= _needed(further, seen)
    return names
