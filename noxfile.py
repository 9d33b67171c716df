"""The project's sessions: dev, tests, chaos, bench, lint, types, audit, package and pin."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nox
from nox.command import CommandFailed
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = True
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint", "types", "package"]

CONSTRAINTS = "constraints.txt"
IMAGE_BUILD, IMAGE_RUNTIME = "image/build.txt", "image/runtime.txt"
PYTHONS = ["3.11", "3.12", "3.13"]
SCHEMAS = Path("packages/user_service_schemas")
SERVER = Path("packages/user_service_server")
CLIENT = Path("packages/user_service_client")
PACKAGES = [SCHEMAS, SERVER, CLIENT]
EDITABLE_SERVER = ["-e", f"./{SCHEMAS}", "-e", f"./{SERVER}[embedded]"]
EDITABLE = [*EDITABLE_SERVER, "-e", f"./{CLIENT}"]


def _starts(version: str) -> bool:
    """Tell whether this Python is there: a version manager's shim is on PATH, too, and fails."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return True
    python = shutil.which(f"python{version}")
    if python is None:
        return False
    return subprocess.run([python, "-V"], check=False, capture_output=True).returncode == 0


def _group(name: str) -> list[str]:
    return list(nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), name))


def _install(session: nox.Session, *requirements: str) -> None:
    session.install("-c", CONSTRAINTS, *requirements)


@nox.session
def dev(session: nox.Session) -> None:
    """Serve on port 3001 on embedded engines; `nox -s dev -- --port 3002` passes options on."""
    _install(session, *EDITABLE_SERVER)
    command = [str(Path(session.bin, "user-service")), "dev", *session.posargs]
    # The server replaces this process, so that signals reach it and nothing else: nox kills a child
    # half a second after Ctrl-C, when PostgreSQL may still be writing.
    os.execv(command[0], command)


# If none is there nox gets all three, and fails because they are missing.
FOUND = list(filter(_starts, PYTHONS)) or PYTHONS


@nox.session(python=FOUND)
def tests(session: nox.Session) -> None:
    """Run the suite on real engines; on further Pythons that are there, what others install.

    The server runs in its image, on one Python; the client in whatever its service has.
    """
    _install(session, *EDITABLE, *_group("tests"))
    installed = ["tests/client", "tests/contract", "tests/schemas"]
    paths = [] if session.python == FOUND[0] else installed
    # A module has a database and often a server of its own, which one worker alone is to make.
    session.run("pytest", "-n", "auto", "--dist", "loadfile", *paths, *session.posargs)


@nox.session
def chaos(session: nox.Session) -> None:
    """Run the long forms of the tests: minutes of load while things die. Not part of `tests`."""
    _install(session, *EDITABLE, *_group("tests"))
    seconds = {"CHAOS_SECONDS": os.environ.get("CHAOS_SECONDS", "120")}
    session.run("pytest", "tests/chaos", "-s", *session.posargs, env=seconds)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure the budgets of speed and size; `nox -s bench -- client-many` measures some."""
    # pytest, since a crowd of subscribers is shared with tests/system, whose modules import it.
    _install(session, *EDITABLE, "pytest", "-r", "benchmarks/peers/client.txt")
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and which module imports which."""
    _install(session, *_group("lint"))
    # The import graph is read from the sources: their dependencies need not be there.
    _install(session, "--no-deps", *EDITABLE)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of packages, examples, tests, benchmarks and this file."""
    _install(session, *EDITABLE, *_group("types"))
    session.run("mypy")
    # Said, since it would take the environment that it finds in the tree: .venv, with nox alone.
    session.run("basedpyright", "--pythonpath", str(Path(session.bin, "python")))


@nox.session
def audit(session: nox.Session) -> None:
    """Ask for known flaws of all that constraints.txt names. Needs the network: see security.md."""
    session.install("pip-audit")
    # Strict: a package of which nothing could be learned is not one without flaws.
    command = ("pip-audit", "--strict", "--requirement", CONSTRAINTS, "--no-deps", "--disable-pip")
    try:
        session.run(*command)
    except CommandFailed:
        session.error("flaws, or a package of which PyPI's advisories could not be had: see above")


@nox.session
def package(session: nox.Session) -> None:
    """Build the distributions, and show that they are whole and bring only what they should."""
    session.install("--require-hashes", "-r", IMAGE_BUILD)
    _install(session, *_group("package"))
    dist = Path(session.create_tmp(), "dist").absolute()
    shutil.rmtree(dist, ignore_errors=True)
    for path in PACKAGES:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(dist), str(path))
        _check_wheel_is_whole(session, dist, path)

    python = _empty_environment(session, CLIENT)
    install = (python, "-m", "pip", "install", "--quiet")
    wheel = str(_wheel(dist, CLIENT))
    session.run(*install, "-c", CONSTRAINTS, "--find-links", str(dist), wheel, external=True)
    session.run(python, "-I", "-c", "import user_service_client.testing", external=True)
    _check_nothing_of_the_server(session, python)

    # As the Dockerfile does it.
    python = _empty_environment(session, SERVER)
    install = (python, "-m", "pip", "install", "--quiet")
    session.run(*install, "--require-hashes", "-r", IMAGE_RUNTIME, external=True)
    wheels = [str(_wheel(dist, path)) for path in (SCHEMAS, SERVER)]
    session.run(*install, "--no-index", "--no-deps", *wheels, external=True)
    session.run(python, "-m", "pip", "check", external=True)
    session.run(str(Path(python).with_name("user-service")), "--help", external=True)


@nox.session
def pin(session: nox.Session) -> None:
    """Renew constraints.txt, the newest versions that go together, and the hashes of the image."""
    _install(session, *_group("ci"))
    schemas, server, client = (f"{path.name} @ {path.absolute().as_uri()}" for path in PACKAGES)
    embedded = server.replace(" @", "[embedded] @")
    build = sorted({line for path in PACKAGES for line in _build_requirements(path)})
    tools = [line for group in ("tests", "lint", "types", "package") for line in _group(group)]
    _compile(session, CONSTRAINTS, [schemas, embedded, client, *build, *tools], "--upgrade")
    # Wheels alone: what a source distribution fetches to build itself has no hash in these files.
    hashed = ("-c", CONSTRAINTS, "--generate-hashes", "--only-binary=:all:", "--emit-build-options")
    _compile(session, IMAGE_BUILD, build, *hashed)
    _compile(session, IMAGE_RUNTIME, [schemas, server], *hashed)


def _compile(session: nox.Session, output: str, requirements: list[str], *options: str) -> None:
    """Write what these requirements bring, for every Python and system, without our own."""
    source = Path(session.create_tmp(), "requirements.in").absolute()
    source.write_text("\n".join(requirements))
    session.run(
        *("uv", "pip", "compile", str(source), "--output-file", output, *options),
        *("--universal", "--python-version", PYTHONS[0], "--no-annotate", "--no-emit-index-url"),
        *("--custom-compile-command", "nox -s pin", "--quiet"),
        *(option for path in PACKAGES for option in ("--no-emit-package", path.name)),
    )


def _check_wheel_is_whole(session: nox.Session, dist: Path, path: Path) -> None:
    """Compare a wheel with its sources: migrations and py.typed are easily left out of one."""
    source = path / "src"
    files = {
        file.relative_to(source).as_posix()
        for file in source.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(_wheel(dist, path)) as wheel:
        missing = files - set(wheel.namelist())
    if missing:
        session.error(f"{path.name}: not in the wheel: {', '.join(sorted(missing))}")


def _empty_environment(session: nox.Session, path: Path) -> str:
    """Make an environment for a package where nothing else is, and return its Python."""
    home = Path(session.create_tmp(), path.name).absolute()
    session.run("python", "-m", "venv", "--clear", str(home))
    return str(home / "bin" / "python")


def _check_nothing_of_the_server(session: nox.Session, python: str) -> None:
    """Fail if the client brought the server, or something that only the server asks for."""
    script = "from importlib.metadata import distributions as d; print(*(x.name for x in d()))"
    output = session.run(python, "-I", "-c", script, external=True, silent=True)
    installed = {canonicalize_name(name) for name in str(output).split()}
    only_the_server = (
        ({canonicalize_name(SERVER.name)} | _dependencies(SERVER))
        - _dependencies(CLIENT)
        - _dependencies(SCHEMAS)
    )
    if intruders := installed & only_the_server:
        session.error(f"the client brings {', '.join(sorted(intruders))}")


def _dependencies(path: Path) -> set[str]:
    project = nox.project.load_toml(path / "pyproject.toml")["project"]
    extras = project.get("optional-dependencies", {}).values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def _build_requirements(path: Path) -> list[str]:
    return list(nox.project.load_toml(path / "pyproject.toml")["build-system"]["requires"])


def _wheel(dist: Path, path: Path) -> Path:
    (wheel,) = dist.glob(f"{path.name}-*.whl")
    return wheel
