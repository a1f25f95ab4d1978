"""What `make dist` looks for is found where it is planted."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

from ..distribution.contents import FOLDERS, IN_SDIST, ROOT, faults, in_sdist, in_wheel

INFO = "shoal-0.1.0.dist-info"


def wheel(place: Path, *, without: str = "", more: tuple[str, ...] = (), summary: str | None = None) -> Path:
    """A wheel of this source tree as it should be, but for what is said."""
    import tomllib

    from shoal import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    head = [
        f"Name: {project['name']}", f"Version: {__version__}", f"Summary: {summary or project['description']}",
        f"License-Expression: {project['license']}", f"Requires-Python: {project['requires-python']}",
        "Description-Content-Type: text/markdown", *(f"Requires-Dist: {one}" for one in project["dependencies"]),
    ]  # fmt: skip
    made = place / "shoal-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for file in (ROOT / "src" / "shoal").rglob("*"):
            name = file.relative_to(ROOT / "src").as_posix()
            if file.is_file() and "__pycache__" not in name and name != without:
                archive.writestr(name, "")
        for name in more:
            archive.writestr(name, "")
        archive.writestr(f"{INFO}/METADATA", "\n".join(head) + "\n\n" + (ROOT / "README.md").read_text())
        archive.writestr(f"{INFO}/entry_points.txt", "[console_scripts]\nshoal = shoal.cli:main\n")
        archive.writestr(f"{INFO}/licenses/LICENSE", "")
    return made


def test_a_sound_wheel_has_no_fault_and_each_planted_one_is_told(tmp_path: Path) -> None:
    assert list(in_wheel(wheel(tmp_path))) == []
    assert any("lacks shoal/py.typed" in fault for fault in in_wheel(wheel(tmp_path, without="shoal/py.typed")))
    assert any("lacks shoal/cli/push.py" in fault for fault in in_wheel(wheel(tmp_path, without="shoal/cli/push.py")))
    assert any("tests/x.py, which is no file" in fault for fault in in_wheel(wheel(tmp_path, more=("tests/x.py",))))
    assert any("Summary is 'other'" in fault for fault in in_wheel(wheel(tmp_path, summary="other")))


def test_an_sdist_holds_what_its_tests_need(tmp_path: Path) -> None:
    made = tmp_path / "shoal-0.1.0.tar.gz"
    with tarfile.open(made, "w:gz") as archive:
        for name in (*IN_SDIST, *(f"{folder}/x.py" for folder in FOLDERS if folder != "examples"), "src/x.pyc"):
            archive.addfile(tarfile.TarInfo(f"shoal-0.1.0/{name}"), io.BytesIO())
    assert list(in_sdist(made)) == [f"{made.name} lacks examples/", f"{made.name} holds src/x.pyc"]
    assert faults(tmp_path / "none") == [f"{tmp_path / 'none'} holds 0 wheels and 0 sdists, not one of each"]
