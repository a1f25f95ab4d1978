"""Every registered function keeps to the house's form; a new file is tested by existing."""

from __future__ import annotations

import importlib
import inspect

import pytest

from shoal.errors import UsageError
from shoal.registry import HARNESS, KINDS, Entry, entries, get

ALL = [pytest.param(entry, id=f"{kind}/{entry.name}") for kind in KINDS for entry in entries(kind).values()]


@pytest.mark.parametrize("entry", ALL)
def test_an_entry_is_one_function_with_the_name_of_its_file(entry: Entry) -> None:
    function = entry.load()
    assert function.__name__ == entry.name.replace("-", "_")
    module = importlib.import_module(entry.module)
    public = [
        name
        for name, found in vars(module).items()
        if inspect.isfunction(found) and found.__module__ == entry.module and not name.startswith("_")
    ]
    assert public == [function.__name__]
    assert entry.doc == inspect.getdoc(function)


@pytest.mark.parametrize("entry", ALL)
def test_options_are_keyword_only_typed_and_defaulted(entry: Entry) -> None:
    parameters = inspect.signature(entry.load()).parameters.values()
    assert all(p.annotation is not p.empty for p in parameters)
    assert all(p.name in HARNESS for p in parameters if p.kind is not p.KEYWORD_ONLY), "options are keyword-only"
    for name, option in entry.options().items():
        assert not isinstance(option.annotation, str)
        if (entry.name, name) != ("listed", "layers"):  # which layers is the question itself
            assert option.default is not option.empty


@pytest.mark.parametrize("entry", ALL)
def test_what_is_accepted_is_what_the_signature_says(entry: Entry) -> None:
    defaults = {n: p.default for n, p in entry.options().items() if p.default is not p.empty}
    needed = {"layers": (1,)} if entry.name == "listed" else {}
    assert entry.accept(defaults | needed) == defaults | needed


def test_an_entry_without_options_says_so() -> None:
    with pytest.raises(UsageError, match="hsd has no option 'x'; it has none"):
        get("methods", "hsd").parse(["x=1"])


def test_settings_from_python_are_held_to_the_same_words() -> None:
    with pytest.raises(UsageError, match=r"no option 'skip_frst' \(did you mean skip_first\?\)"):
        get("methods", "shortgpt").accept({"skip_frst": 1})
    with pytest.raises(UsageError, match="position: which=frist is not one of first, last"):
        get("methods", "position").accept({"which": "frist"})
    with pytest.raises(UsageError, match="listed needs the option layers; write layers=VALUE"):
        get("search", "listed").parse([])
