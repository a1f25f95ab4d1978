"""The summary and the page of a comparison, from plain rows."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from shoal.api.study import Cell, cells, full_paths
from shoal.errors import UsageError
from shoal.report import render_comparison
from shoal.report.summary import advice, columns, entries, frontier, markdown


def row(method: str, budget: str, windows: list[float], decode: float = 0.8, seed: int = 0) -> dict[str, Any]:
    mean = sum(windows) / len(windows)
    return {
        "key": f"{method} {budget} seed={seed}",
        "method": method,
        "budget": budget,
        "seed": seed,
        "result": {
            "plan": "0-1,3a",
            "price": 0.7,
            "perplexity": {"text": math.exp(mean)},
            "nll": {"text": {"mean": mean, "error": 0.1, "windows": windows}},
            "tasks": {"words": {"accuracy": 0.5}},
        },
        "measured": {"seconds": 1.0, "peak": 5, "decode": {"median": decode, "low": decode, "high": decode}},
    }


DENSE = {"key": "dense", "result": row("", "", [1.0, 2.0])["result"], "measured": {}}
ROWS = [
    DENSE,
    row("worse", "params=0.8", [3.0, 4.1]),
    row("best", "params=0.8", [2.0, 3.0]),
    row("alike", "params=0.8", [2.5, 2.6], decode=0.7),
    row("best", "params=0.6", [5.0, 6.0], decode=0.6),
    {"key": "x", "method": "fails<b>", "budget": "params=0.6", "seed": 0, "error": "U523: cannot | be met"},
]


def test_methods_are_ordered_by_budget_and_perplexity() -> None:
    dense, found = entries(ROWS)
    assert dense.first == pytest.approx(math.exp(1.5))
    assert [(e.budget, e.method) for e in found] == [
        ("params=0.8", "best"),
        ("params=0.8", "alike"),
        ("params=0.8", "worse"),
        ("params=0.6", "best"),
        ("params=0.6", "fails<b>"),
    ]
    assert found[0].numbers["decode"] == 0.8 and found[0].tasks == {"words": 0.5}


def test_seeds_are_averaged_and_their_range_is_kept() -> None:
    _, found = entries([DENSE, row("m", "params=0.8", [1.0, 1.0]), row("m", "params=0.8", [3.0, 3.0], seed=1)])
    assert found[0].seeds == 2 and found[0].first == pytest.approx(math.exp(2))
    assert found[0].spread == (pytest.approx(math.exp(1)), pytest.approx(math.exp(3)))


def test_the_advice_names_the_best_and_what_is_no_worse_by_paired_windows() -> None:
    said = advice(*entries(ROWS))
    assert said[0].startswith("At params=0.8 use best: perplexity 12.18 (dense 4.48)")
    assert "alike is within 2 standard errors" in said[0] and "worse" not in said[0]
    assert said[1].startswith("At params=0.6 use best")
    assert advice(*entries([DENSE, ROWS[-1]])) == ["At params=0.6 no method gave a usable model."]


def test_of_healed_plans_it_says_whether_the_best_cut_stayed_the_best() -> None:
    rows = [row(name, "params=0.8", [worth, worth]) for name, worth in (("a", 2.0), ("b", 2.1), ("c", 2.2))]
    for one, before in zip(rows, (80.0, 60.0, 90.0), strict=True):
        one["result"]["unhealed"] = before
    (said,) = advice(*entries([DENSE, *rows]))
    assert said.endswith(
        "Before healing b was best with 60.00; healed it is number 2 of 3 (Kendall's tau of the two orders 0.33)."
    )
    (said,) = advice(*entries([DENSE, rows[0], row("d", "params=0.8", [3.0, 3.0])]))
    assert "healing" not in said, "one order alone says nothing"


def test_a_model_that_is_not_finite_comes_last() -> None:
    broken = row("broken", "params=0.8", [2.0, 2.0])
    broken["result"]["nll"]["text"] = {"mean": None, "error": None, "windows": [None, 2.0]}
    _, found = entries([DENSE, broken, ROWS[2]])
    assert [e.method for e in found] == ["best", "broken"] and math.isinf(found[1].first)
    assert "broken" not in " ".join(advice(*entries([DENSE, broken, ROWS[2]])))


def test_the_frontier_holds_what_nothing_beats_in_both() -> None:
    _, found = entries(ROWS)
    assert [(e.method, e.budget) for e in frontier(found, "decode")] == [
        ("best", "params=0.6"),
        ("alike", "params=0.8"),
        ("best", "params=0.8"),
    ]


def test_the_table_has_a_column_for_what_was_measured_and_a_line_for_each_row() -> None:
    dense, found = entries(ROWS)
    head, rows = columns(dense, found)
    assert head == ["budget", "method", "perplexity text", "words", "budget used", "decode time", "search s"]
    assert all(len(line) == len(head) for line in rows)
    text = markdown(dense, found)
    assert text.count("\n") == len(ROWS) + 2 and "cannot \\| be met" in text


def test_the_page_shows_the_plans_and_escapes_what_it_is_told() -> None:
    page = render_comparison(
        {"title": "<script>", "rows": ROWS, "strips": {"0-1,3a": "██·▀"}, "facts": {"data": "<i>"}, "command": "shoal"}
    )
    assert "<script>" not in page.split("<script>const", 1)[0].split("</head>")[1].split("<script>")[0]
    assert "fails&lt;b&gt;" in page and "&lt;i&gt;" in page and "<i>" not in page
    assert len(re.findall(r'class="plan" viewBox="0 0 36 16"', page)) == 4
    assert "Quality against cost" in page and "use best" in page


def test_cells_are_every_method_at_every_budget_with_every_seed() -> None:
    found = cells(["shortgpt", "position:which=first"], ["params=0.9,0.8", "kv=0.5"], [0, 1])
    assert len(found) == 2 * 3 * 2 and len({cell.key for cell in found}) == 12
    assert found[1] == Cell("position:which=first", "params=0.9", 0)
    assert found[1].name == "position" and found[1].settings() == {"which": "first"}


@pytest.mark.parametrize(
    ("methods", "budgets", "seeds", "code"),
    [
        (["shortgtp"], ["params=0.8"], [0], "U501"),
        (["shortgpt:skip=1"], ["params=0.8"], [0], "U502"),
        (["shortgpt"], ["params=1.2"], [0], "U523"),
        (["shortgpt"], ["weight=0.5"], [0], "U523"),
        (["shortgpt"], [], [0], "U570"),
        (["shortgpt"], ["params=0.8"], [], "U570"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    methods: list[str], budgets: list[str], seeds: list[int], code: str
) -> None:
    with pytest.raises(UsageError, match=code):
        cells(methods, budgets, seeds)


def test_names_that_are_no_files_stay_as_they_are(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert full_paths(["builtin", "a.txt", "owner/name"]) == ("builtin", str(tmp_path / "a.txt"), "owner/name")
