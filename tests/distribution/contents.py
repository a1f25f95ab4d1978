"""What a wheel and an sdist must hold and must not, from the files themselves."""

from __future__ import annotations

import email
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IN_SDIST = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt")
FOLDERS = ("src", "tests", "docs", "examples", "benchmarks", "packages")
"""Of the sdist: with these `make test` runs from it."""
NEVER = ("__pycache__", ".pyc", ".venv", ".git/", ".safetensors.tmp", ".egg-info")


def faults(folder: Path) -> list[str]:
    """What is wrong with the one wheel and the one sdist in `folder`, a line each."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        return [f"{folder} holds {len(wheels)} wheels and {len(sdists)} sdists, not one of each"]
    return [*in_wheel(wheels[0]), *in_sdist(sdists[0])]


def in_wheel(wheel: Path) -> Iterator[str]:
    """The package as it lies in src, its licence and metadata, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        points = archive.read(f"{info}/entry_points.txt").decode()
    wanted = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src" / "shoal").rglob("*") if p.is_file()}
    wanted = {name for name in wanted if not any(word in name for word in NEVER)}
    packed = {name for name in names if not name.startswith(info)}
    yield from (f"{wheel.name} lacks {name}" for name in sorted(wanted - packed))
    yield from (f"{wheel.name} holds {name}, which is no file of src/shoal" for name in sorted(packed - wanted))
    if "shoal/py.typed" not in packed:
        yield f"{wheel.name} lacks shoal/py.typed"
    if f"{info}/licenses/LICENSE" not in names:
        yield f"{wheel.name} lacks the licence"
    if "shoal = shoal.cli:main" not in points:
        yield f"{wheel.name} has no command shoal"
    yield from (f"{wheel.name}: {fault}" for fault in in_metadata(metadata))


def in_metadata(metadata: Message) -> Iterator[str]:
    """What an index asks of METADATA, and what pyproject.toml says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version: dict[str, str] = {}
    exec((ROOT / "src/shoal/_version.py").read_text(encoding="utf-8"), version)  # noqa: S102 - one line of our own
    expected = {
        "Name": project["name"],
        "Version": version["__version__"],
        "Summary": project["description"],
        "License-Expression": project["license"],
        "Requires-Python": project["requires-python"],
        "Description-Content-Type": "text/markdown",
    }
    for key, value in expected.items():
        if metadata[key] != value:
            yield f"its {key} is {metadata[key]!r} and should be {value!r}"
    if metadata.get_payload(decode=True) != (ROOT / "README.md").read_bytes():
        yield "its description is not README.md"
    needs = metadata.get_all("Requires-Dist") or []
    missing = [one for one in project["dependencies"] if not any(_name(need) == _name(one) for need in needs)]
    yield from (f"it does not ask for {one}" for one in missing)


def _name(requirement: str) -> str:
    for sign in "<>=!;[ ":
        requirement = requirement.partition(sign)[0]
    return requirement.lower().replace("_", "-")


def in_sdist(sdist: Path) -> Iterator[str]:
    """All that `make test` needs, and nothing that was made."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    yield from (f"{sdist.name} lacks {name}" for name in IN_SDIST if name not in names)
    for folder in FOLDERS:
        if not any(name.startswith(f"{folder}/") for name in names):
            yield f"{sdist.name} lacks {folder}/"
    yield from (f"{sdist.name} holds {name}" for name in sorted(names) if any(word in name for word in NEVER))
