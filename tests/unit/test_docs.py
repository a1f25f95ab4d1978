"""The generated pages are what the sources say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal.docs import PAGES, ROOT
from shoal.registry import Kind, entries


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == PAGES[name](), "run: make docs"


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith(("http", "mailto")):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_readme_names_no_method_that_does_not_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"--method ([a-z-]+)|method=\"([a-z-]+)\"", text))
    assert {one or other for one, other in named} <= set(entries("methods"))


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        ("dynamic.md", "policies"),
        ("exchange.md", "exchange"),
        ("graphs.md", "graphs"),
        ("searching.md", "search"),
        ("speculation.md", "drafts"),
        ("standins.md", "transforms"),
    ],
)
def test_the_table_of_a_page_names_every_entry(page: str, kind: Kind) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = {name for row in re.findall(r"^\|([^|]*)\|", text, re.MULTILINE) for name in re.findall(r"[a-z0-9-]+", row)}
    assert entries(kind).keys() <= rows


def test_pages_name_no_place_of_a_machine() -> None:
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *Path(ROOT / "benchmarks").glob("*")]:
        if file.is_file() and file.suffix in (".md", ".py"):
            assert not re.search(r"/(work|tmp|root|home)/", file.read_text(encoding="utf-8")), file


def test_every_code_that_is_raised_has_its_sentence_on_the_page() -> None:
    page = (ROOT / "docs" / "error-codes.md").read_text(encoding="utf-8")
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    raised = set(re.findall(r"code=\"([A-Z]\d{3})\"", sources))
    assert len(raised) > 200
    assert not raised - set(re.findall(r"^\| ([A-Z]\d{3}) \| .{9}", page, re.MULTILINE))
