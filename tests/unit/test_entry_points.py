"""Another package adds entries of every kind: a distribution installed into a folder on sys.path is found."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.errors import UsageError
from shoal.registry import KINDS, Kind, entries, get


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the package `added` and its metadata, as pip writes them."""
    (tmp_path / "added.py").write_text(
        "".join(
            f"def {kind}_of_mine(*given, strength: float = 1.0, **more):\n    '''One of the {kind}.'''\n\n\n"
            for kind in KINDS
        ),
        encoding="utf-8",
    )
    info = tmp_path / "added-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: added\nVersion: 1.0\n", encoding="utf-8")
    groups = [
        f"[shoal.{kind}]\n{kind}-of-mine = added:{kind}_of_mine\nblock-influence = added:{kind}_of_mine\n"
        for kind in KINDS
    ]
    (info / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("added", None)


@pytest.mark.parametrize("kind", KINDS)
def test_an_installed_package_adds_an_entry_of_each_kind(installed: Path, kind: Kind) -> None:
    name = f"{kind}-of-mine"
    assert name in entries(kind)
    entry = get(kind, name)
    assert (entry.module, entry.attribute, entry.file) == ("added", f"{kind}_of_mine", None)
    assert entry.load().__doc__ == f"One of the {kind}."
    assert entry.parse(["strength=2"]) == {"strength": 2.0}
    assert entry.examples is None
    assert all(name not in entries(other) for other in KINDS if other != kind)


def test_it_replaces_no_entry_of_ours(installed: Path) -> None:
    assert get("measures", "block-influence").module == "shoal.measures.block_influence"
    assert get("methods", "block-influence").module == "added", "a name is one of its kind"


def test_a_name_near_an_added_one_is_told(installed: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean drafts-of-mine\?"):
        get("drafts", "drafts-of-mime")


def test_listing_does_not_import_it(installed: Path) -> None:
    code = (
        "import sys; from shoal.registry import KINDS, entries\n"
        "print(sum(f'{kind}-of-mine' in entries(kind) for kind in KINDS), 'added' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(len(KINDS)), "False"]
