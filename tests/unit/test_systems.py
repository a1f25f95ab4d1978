"""Every work of the two surveys has its row, and what the row names is there."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from typing import Any

import pytest
import typer

from shoal.api.budget import parse_budget
from shoal.cli import app
from shoal.docs import ROOT
from shoal.errors import ShoalError
from shoal.plan import Plan
from shoal.plan.plan import parse_plan
from shoal.registry import Entry, Kind
from shoal.spelling import chosen
from shoal.systems import VERDICTS, Work, everything, named_by, names, read, source

from .specs import two_stacks

SECTIONS = read(ROOT / "docs" / "systems.toml")
WORKS = [work for section in SECTIONS for work in section.works]
EVERYTHING = everything()
TESTS = [(file.stem, file.read_text(encoding="utf-8")) for file in (ROOT / "tests").rglob("test_*.py")]
VERBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
ENTRIES: dict[str, Kind] = {
    "--method": "methods",
    "--measure": "measures",
    "--with": "transforms",
    "--then": "transforms",
    "--heal": "recipes",
    "--recipe": "recipes",
    "--term": "terms",
    "--learn": "learners",
    "--policy": "policies",
    "--speculate": "drafts",
    "--kv-cache": "caches",
    "--graph": "graphs",
    "--to": "exchange",
}
"""Options of the command line that take an entry of the registry."""


def entries_of(text: str) -> list[Entry]:
    """What a command names of the registry; nothing for a plan. Raises ShoalError or KeyError for what is not there."""
    base = Plan.identity(two_stacks())
    if text.startswith("from shoal."):
        require_function(text)
        return []
    verb, *words = shlex.split(text)
    if verb not in VERBS:
        parse_plan(text, base)
        return []
    known = {name for option in VERBS[verb].params for name in option.opts}
    found = []
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option not in known:
            raise KeyError(f"{verb} has no option {option}")
        if option in ENTRIES:
            found.append(chosen(ENTRIES[option], value, lone=option == "--speculate")[0])
        elif option == "--plan":
            parse_plan(value, base)
        elif option == "--budget":
            parse_budget(value)
    return found


def require_function(text: str) -> None:
    """Raise KeyError unless what is to be imported is defined there; torch is not imported for that."""
    _, module, _, name = text.split()
    file = ROOT / "src" / (module.replace(".", "/") + ".py")
    if not file.is_file() or not re.search(rf"^(def|class) {name}\b", file.read_text(encoding="utf-8"), re.MULTILINE):
        raise KeyError(f"there is no {name} in {module}")


def tries(text: str, entry: Entry) -> bool:
    """Whether a file of tests names an entry, or goes over all of its kind."""
    name = entry.name.replace("-", "[-_]")
    return f'entries("{entry.kind}")' in text or bool(re.search(rf"(?<![\w-]){name}(?!\w)", text))


def problems(work: Work) -> list[str]:
    """What is missing or wrong in a row."""
    built = work.shoal in ("yes", "in part")
    found = [] if work.shoal in VERDICTS else [f"{work.shoal!r} is none of {', '.join(VERDICTS)}"]
    found += [f"there is no test {name}" for name in work.tests if name not in dict(TESTS)]
    found += [
        f"{'a' if built else 'no'} {column} is due"
        for column in ("by", "tests")
        if built != bool(getattr(work, column))
    ]
    needed = ("what", "differs") if work.shoal == "in part" else () if work.shoal == "yes" else ("differs",)
    found += [f"{column} is empty" for column in (*needed, "id") if not getattr(work, column)]
    for command in work.by:
        try:
            named = entries_of(command)
            held = [text for name, text in TESTS if name in work.tests]
            found += [f"{one.name} is in no test of it" for one in named if not any(tries(text, one) for text in held)]
        except (ShoalError, KeyError, ValueError) as error:
            found.append(f"{command}: {error}")
    if work.shoal in ("not yet", "no"):
        found += [f"{one.kind}/{one.name} names it as its source" for one in EVERYTHING if names(source(one), work)]
    return found


def test_the_two_surveys_are_whole() -> None:
    """By class and by survey: a row that is taken away, or is there twice, is missed here."""
    classes = {section.title: sum(bool(work.survey) for work in section.works) for section in SECTIONS}
    assert classes == {
        "Static removal": 12,
        "Skipping layers": 22,
        "Exits, halting and cascades": 8,
        "Self-speculation": 4,
        "Measurements": 7,
        "Fine-tuning by layers": 2,
        "KV and attention": 12,
        "Weights": 10,
        "Programs": 9,
        "Merging and elastic widths": 9,
        "Graph fusion": 5,
        "No depth system": 22,
    }
    assert sum(classes.values()) == 122
    assert Counter(work.survey for work in WORKS if work.survey) == {"pruning": 70, "fusion": 41, "both": 11}
    for once in ([work.name for work in WORKS], [number for work in WORKS for number in work.sought]):
        assert [one for one, times in Counter(once).items() if times > 1] == []


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_what_a_row_names_is_there(work: Work) -> None:
    assert problems(work) == []


READ = "from shoal.systems import read"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ({"shoal": "maybe", "differs": "all"}, "'maybe' is none of"),
        ({"by": ("prune --method shortgtp",)}, "there is no method"),
        ({"by": ("prune --method tyukin:spare=1",)}, "has no option 'spare'"),
        ({"by": ("prune --methods tyukin",)}, "prune has no option --methods"),
        ({"by": ("0-3,5-",)}, "cannot read"),
        ({"by": ("runs",)}, "cannot read"),
        ({"by": ("from shoal.systems import works",)}, "there is no works in shoal.systems"),
        ({"by": ("from shoal.nowhere import read",)}, "there is no read in shoal.nowhere"),
        ({"by": ()}, "a by is due"),
        ({"tests": ("test_of_nothing",)}, "there is no test test_of_nothing"),
        ({"tests": ()}, "a tests is due"),
        ({"tests": ("test_risk",)}, "shortgpt is in no test of it"),
        ({"shoal": "in part"}, "what is empty"),
        ({"shoal": "no", "by": (), "tests": ()}, "differs is empty"),
        ({"shoal": "not yet", "id": "2403.03853", "by": (), "tests": ()}, "methods/shortgpt names it as its source"),
    ],
)  # fmt: skip
def test_a_row_that_is_wrong_is_found(line: dict[str, Any], found: str) -> None:
    right = {"id": "none", "shoal": "yes", "by": ("prune --method shortgpt", "0-3", READ), "tests": ("test_systems",)}
    assert problems(Work("nobody's", **right)) == []
    assert any(found in one for one in problems(Work("nobody's", **{**right, **line})))


def test_a_work_is_found_by_its_number_or_else_by_its_name() -> None:
    assert "shortgpt" in {entry.name for entry in named_by(Work("any", "2403.03853", "yes"), EVERYTHING)}
    assert {entry.name for entry in named_by(Work("Merge Decoding", "NLPCC 2024", "yes"), EVERYTHING)} == {"depth-head"}
    assert not names("arXiv 12403.03853, 2403.038531", Work("any", "2403.03853", "yes"))


def test_links_lead_to_headings_of_the_catalogue() -> None:
    seen, headings, fenced = Counter[str](), set(), False
    for line in (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("#") and not fenced:
            slug = line.lstrip("# ").lower().replace(" ", "-")
            headings.add((slug if not seen[slug] else f"{slug}-{seen[slug]}", line.lstrip("# ")))
            seen[slug] += 1
    text = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    linked = {
        (place, name) for name, place in re.findall(r"\[[a-z]+/([a-z0-9-]+)\]\(catalogue\.md#([a-z0-9-]+)\)", text)
    }
    assert linked
    assert linked <= headings
