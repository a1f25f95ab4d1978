"""The registry: names are file names, signatures are options, and listing costs no heavy import."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

import shoal
from shoal import registry
from shoal.errors import UsageError
from shoal.registry import KINDS, Entry, Kind, entries, get, home_of

PACKAGE = Path(shoal.__file__).parent
ALL = [pytest.param(entry, id=f"{kind}/{entry.name}") for kind in KINDS for entry in entries(kind).values()]


def sample(
    model: Any,
    *,
    number: int = 1,
    share: float = 0.5,
    flag: bool = False,
    word: Literal["last", "all"] = "last",
    size: Literal[1, 2] = 1,
    layers: tuple[int, ...] = (),
    names: list[str] | None = None,
    maybe: int | None = None,
    switch: bool | None = None,
    either: int | str = 0,
    folder: Path = Path(),
    progress: Progress | None = None,  # noqa: F821 - as in a real entry, where it is imported for type checkers only
) -> None:
    """Do nothing. It only has options.

    More words.
    """


ENTRY = Entry("measures", "sample", __name__, "sample", inspect.getdoc(sample) or "")


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_file_names(kind: Kind) -> None:
    files = {
        path.stem.replace("_", "-")
        for path in (PACKAGE / home_of(kind).removeprefix("shoal.").replace(".", "/")).glob("[!_]*.py")
    }
    assert set(entries(kind)) == files
    assert list(entries(kind)) == sorted(files)


@pytest.mark.parametrize("entry", ALL)
def test_an_entry_says_what_it_does_in_one_sentence(entry: Entry) -> None:
    assert entry.summary.endswith(".")
    assert entry.summary[0].isupper() or entry.summary[0].isdigit()
    assert len(entry.summary) <= 120
    assert entry.summary.count(". ") == 0


@pytest.mark.parametrize("entry", [p for p in ALL if p.values[0].kind in ("measures", "methods")])
def test_a_measure_or_method_names_its_source_and_how_it_differs(entry: Entry) -> None:
    assert "How we differ:" in entry.doc
    assert "arXiv" in entry.doc


@pytest.mark.parametrize("entry", ALL)
def test_the_source_is_a_paragraph_of_its_own(entry: Entry) -> None:
    sources = [paragraph for paragraph in entry.doc.split("\n\n") if "Source:" in paragraph]
    assert len(sources) == 1 and sources[0].startswith("Source: ")
    assert not any(word in sources[0] for word in ("How we differ:", "Says:", "Raises "))


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("measures", "block-influense", r"no measure 'block-influense' \(did you mean block-influence\?\)"),
        ("methods", "shortgtp", r"no method 'shortgtp' \(did you mean shortgpt\?\)"),
        ("search", "zzz", r"no search 'zzz'; see shoal ls search"),
        ("methods", "_task", "no method '_task'"),
        ("methods", "", "no method ''"),
    ],
)
def test_a_name_that_does_not_exist_gets_the_nearest(kind: Kind, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        get(kind, name)
    assert raised.value.code == "U501"


def test_underscores_are_taken_for_hyphens() -> None:
    assert get("measures", "block_influence").name == "block-influence"


def test_the_summary_is_the_first_sentence() -> None:
    assert ENTRY.summary == "Do nothing."
    assert Entry("search", "x", "m", "x", "Layers 0.. and ..L-1, all\nof them; e.g. two.\n\nMore.").summary == (
        "Layers 0.. and ..L-1, all of them; e.g. two."
    )


def test_the_harness_fills_no_options() -> None:
    assert set(ENTRY.options()) == set(inspect.signature(sample).parameters) - {"model", "progress"}
    assert ENTRY.options()["maybe"].annotation == int | None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("number=3", {"number": 3}),
        ("number= 3 ", {"number": 3}),
        ("share=1e-3", {"share": 1e-3}),
        ("flag=true", {"flag": True}),
        ("flag=False", {"flag": False}),
        ("word=all", {"word": "all"}),
        ("size=2", {"size": 2}),
        ("layers=3,4, 5", {"layers": (3, 4, 5)}),
        ("layers=7", {"layers": (7,)}),
        ("names=a,b", {"names": ["a", "b"]}),
        ("names=none", {"names": None}),
        ("maybe=3", {"maybe": 3}),
        ("maybe=none", {"maybe": None}),
        ("switch=false", {"switch": False}),
        ("either=4", {"either": 4}),
        ("either=four", {"either": "four"}),
        ("folder=a=b", {"folder": Path("a=b")}),
    ],
)
def test_options_are_read_by_their_type(text: str, value: dict[str, Any]) -> None:
    found = ENTRY.parse([text])
    assert found == value
    assert [type(v) for v in found.values()] == [type(v) for v in value.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("numbr=3", r"sample has no option 'numbr' \(did you mean number\?\); it has number, share, "),
        ("number", "sample: the option number has no value; write number=VALUE"),
        ("numbers", r"no option 'numbers' \(did you mean number\?\)"),
        ("=3", "no option ''"),
        ("number=three", "sample: number=three is not of type int"),
        ("number=", "sample: number= is not of type int"),
        ("number=1.5", "sample: number=1.5 is not of type int"),
        ("share=half", "of type float"),
        ("flag=yes", "sample: flag=yes is not true or false"),
        ("switch=1", "sample: switch=1 is not true or false"),
        ("word=first", "sample: word=first is not one of last, all"),
        ("size=3", "sample: size=3 is not one of 1, 2"),
        ("layers=1,x", "sample: layers=1,x is not of type int"),
        ("layers=", "of type int"),
        ("maybe=x", "of type int"),
        ("progress=1", "no option 'progress'"),
        ("model=1", "no option 'model'"),
    ],
)
def test_an_option_that_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        ENTRY.parse([text])
    assert raised.value.code == "U502"


def test_settings_from_python_are_held_to_the_same_names_and_words() -> None:
    assert ENTRY.accept({"word": "all", "size": 2, "maybe": None}) == {"word": "all", "size": 2, "maybe": None}
    with pytest.raises(UsageError, match=r"no option 'numbr' \(did you mean number\?\)"):
        ENTRY.accept({"numbr": 1})
    with pytest.raises(UsageError, match="sample: word=frist is not one of last, all"):
        ENTRY.accept({"word": "frist"})


def test_other_packages_add_entries_but_replace_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    points = [
        EntryPoint("extra", "json:dumps", "shoal.measures"),
        EntryPoint("block-influence", "json:dumps", "shoal.measures"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "shoal.measures" else [])
    found = entries("measures")
    assert found["extra"].load() is json.dumps
    assert found["extra"].summary == "From json:dumps."
    assert found["block-influence"].module == "shoal.measures.block_influence"
    assert "extra" not in entries("search")


def test_listing_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from shoal.registry import KINDS, entries\n"
        "print([e.summary for k in KINDS for e in entries(k).values()] != [])\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True", "[]"]
