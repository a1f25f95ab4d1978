"""The house itself: what the test environment promises, and that the files that name versions agree."""

from __future__ import annotations

import os
import pkgutil
import re
import socket
import tomllib
from pathlib import Path

import pytest

from shoal._version import __version__

ROOT = Path(__file__).parents[2]
MOST_LINES = 400
MOST_LINES_OF_SOURCE = 300
PACKAGE = ROOT / "src" / "shoal"


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {_name(line): line.split("==")[1] for line in lines if line and not line.startswith("#")}


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80), ("example.org", 80)])
def test_a_remote_address_is_refused(address: tuple[str, int]) -> None:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as sock, pytest.raises(RuntimeError, match="tests use no network"):
        sock.connect(address)
    with socket.socket(family, socket.SOCK_DGRAM) as sock, pytest.raises(RuntimeError, match="tests use no network"):
        sock.sendto(b"hello", address)
    with pytest.raises(RuntimeError, match="tests use no network"):
        socket.create_connection(address)


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("localhost", port)) as sock:
            assert sock.getpeername() == ("127.0.0.1", port)


def test_the_hub_is_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_every_requirement_of_the_development_set_up_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {_name(r) for r in project["dependencies"]}
    wanted |= {_name(r) for extra in ("demo", "dev", "heal") for r in project["optional-dependencies"][extra]}
    assert wanted - set(_pins()) == set()
    assert _pins()["torch"] == _pins()["torch"].partition("+")[0], "a local version exists on one machine only"


def test_the_changelog_knows_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES_OF_SOURCE


def test_files_of_tests_stay_small() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > MOST_LINES} == {}


def test_the_public_surface_is_small_sorted_and_real() -> None:
    import shoal

    public = [name for name in shoal.__all__ if name != "__version__"]
    assert len(public) <= 26
    assert public == sorted(public)
    # importing a room sets an attribute of its name on the package: a verb of that name would be gone
    assert not {room.name for room in pkgutil.iter_modules(shoal.__path__)} & set(public)
    for name in public:
        assert callable(getattr(shoal, name)), name
    for verb in (
        "inspect",
        "measure",
        "prune",
        "evaluate",
        "bench",
        "generate",
        "write",
        "verify",
        "show",
        "diff",
        "ls",
    ):
        assert verb in public


def test_only_the_step_spells_where_its_sources_lie() -> None:
    spelled = re.compile(r"\bkv\.read\b")
    found = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if spelled.search(file.read_text())}
    assert found == {"plan/steps.py"}, "ask Run.sources, key_source, value_source or layers_read"
