"""The report page: facts in, escaped and complete HTML out; what is absent is left out, what is broken is said."""

from __future__ import annotations

import math
import re
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest

from shoal.errors import NotationError, PlanError, UsageError
from shoal.report import render
from shoal.report.facts import PlannedStack, stacks
from shoal.report.formatting import TIMES, amount, esc, number, pair, percent, ranges
from shoal.report.plan_diagram import plan_diagram
from shoal.report.plots import ratios_svg, scores_svg
from shoal.report.tables import verdict

KEPT = [layer for layer in range(30) if layer not in (12, 13, 14, 17, 25, 26)]
NOTATION = "0-11,15-16,18-24,27-29"
INFLUENCE = [
    0.512, 0.118, 0.083, 0.087, 0.081, 0.078, 0.072, 0.066, 0.063, 0.058, 0.049, 0.044, 0.031, 0.029, 0.032,
    0.037, 0.036, 0.030, 0.038, 0.041, 0.040, 0.042, 0.039, 0.037, 0.036, 0.030, 0.031, 0.047, 0.062, 0.263,
]  # fmt: skip
EVIL = '<script>alert(\'x\')</script>" onload="alert(1)" $\\frac$ \0 \ud800'
VOID = {"meta", "link", "br", "hr", "img", "input"}


def small() -> dict[str, Any]:
    """Only the keys that a report needs."""
    return {
        "title": "SmolLM2-135M without six layers",
        "command": "shoal prune smollm2 --method shortgpt --drop 6",
        "model": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        "plan": {"notation": NOTATION, "stacks": {"decoder": {"depth": 30, "notation": NOTATION}}},
    }


def full() -> dict[str, Any]:
    """Every key, with the figures of a real run's shape."""
    spread = {"median": 1.24, "low": 1.21, "high": 1.27}
    data = small()
    data["subtitle"] = "Block influence, one shot, not healed"
    data |= {"created": "2025-11-22T01:20:00Z", "version": "0.1.0"}
    data["command"] += " --data wikitext-2-valid.txt --sequences 16 --length 512 --evaluate --bench --write smollm2-24"
    data["model"] |= {"family": "llama", "params": 134515008, "layers": {"decoder": 30}, "dtype": "float32"}
    data["model"]["device"] = "cpu, 2 threads"
    data["plan"] |= {
        "method": "shortgpt",
        "hash": "sha256:" + "5d0c" * 16,
        "dropped": {"decoder": [12, 13, 14, 17, 25, 26]},
    }
    data["plan"]["stacks"]["decoder"]["steps"] = NOTATION.split(",")
    data["scores"] = {
        "measure": "block influence", "stack": "decoder", "unit": "1 - cosine", "meaning": "low = removable", "span": 1,
        "values": INFLUENCE, "errors": [0.04 * value for value in INFLUENCE], "sequences": 16, "tokens": 8192,
        "data": "wikitext-2-valid.txt, 16 x 512 tokens, no BOS", "notes": ["padding is not counted"],
    }  # fmt: skip
    how = "24 windows x 1024, no overlap, no BOS, 24,552 tokens"
    data["quality"] = [
        {"name": "perplexity", "unit": "", "better": "lower", "dense": 23.49, "pruned": 64.4,
         "error_dense": 0.41, "error_pruned": 1.3, "how": how},
        {"name": "next-token agreement", "unit": "%", "better": "higher", "dense": 100.0, "pruned": 61.2, "how": how},
        {"name": "generation check", "unit": "of 50 right", "better": "higher", "dense": 31, "pruned": 4,
         "how": "greedy, 64 new tokens"},
    ]  # fmt: skip
    data["cost"] = [
        {"name": "parameters", "dense": 134515008, "pruned": 113276160, "unit": ""},
        {"name": "prefill FLOPs", "dense": 116_800_000_000, "pruned": 94_500_000_000, "unit": "FLOPs"},
        {"name": "KV bytes per token", "dense": 46080, "pruned": 36864, "unit": "bytes"},
    ]
    data["speed"] = [
        {"phase": "prefill", "unit": "ms", "dense": {"median": 412.3, "low": 405.1, "high": 431.0},
         "pruned": {"median": 332.5, "low": 329.9, "high": 341.2}, "ratio": spread, "kind": "measured",
         "how": "batch 1, prompt 512, 5 pairs, cpu float32, 2 threads"},
        {"phase": "decode", "unit": "tokens/s", "dense": {"median": 21.4, "low": 20.9, "high": 21.8},
         "pruned": {"median": 26.1, "low": 25.2, "high": 26.9}, "kind": "measured",
         "ratio": {"median": 1.22, "low": 1.17, "high": 1.26}, "how": "batch 1, context 512, 64 tokens, 5 pairs"},
    ]  # fmt: skip
    data["proof"] = {
        "passed": True,
        "checks": [
            {"name": "loads by AutoModelForCausalLM in a fresh process", "passed": True, "value": "yes", "limit": None},
            {"name": "uncached logits against the live plan", "passed": True, "value": 0.0, "limit": 1e-5,
             "how": "largest absolute difference, 4 x 64 tokens, float32"},
            {"name": "cached logits against uncached", "passed": True, "value": 1.9e-6, "limit": 1e-4},
            {"name": "parameters as the plan's cost predicted", "passed": True, "value": 113276160, "limit": 113276160},
        ],
    }  # fmt: skip
    data["samples"] = [
        {"prompt": "The capital of France is", "dense": " Paris. It is known for the Eiffel Tower and the Louvre.",
         "pruned": " the city of Paris, the capital of the country of France and\nthe capital of the country."},
    ]  # fmt: skip
    data["candidates"] = [
        {"notation": NOTATION, "score": 64.4, "note": "lowest influence"},
        {"notation": "0-11,18-29", "score": 71.2, "note": ""},
        {"notation": "0-2,9-29", "score": math.nan, "note": "diverged"},
    ]
    data["notes"] = ["Not healed: a short fine-tuning usually wins back most of the perplexity."]
    return data


def exotic() -> dict[str, Any]:
    """80 layers and every kind of step."""
    notation = (
        "0-5,6a,7m,8,9,(10|11),12,13@12,14@12,~16-21:lin,22:merged,23?skip/copy,24x3,!early?sure,25-27,(28|29|30|31)mean,"
        "32-40,44@40,45-59,60a,60m,~61?g,63-70,74-79,30?again,!last=own"
    )
    data = small() | {"title": "An 80-layer plan with every kind of step"}
    data["plan"] = {"notation": notation, "stacks": {"decoder": {"depth": 80, "notation": notation}}}
    values = [1e-4 * 1.12**layer for layer in range(80)]
    values[33], values[34] = math.nan, math.inf
    data["scores"] = {"measure": "block influence", "stack": "decoder", "values": values}
    return data


class Page(HTMLParser):
    """Checks that elements nest and collects what a browser would load or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


@cache
def full_page() -> str:
    return render(full())


def words(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Page(page).text))


def test_full_report_says_the_golden_facts() -> None:
    said = words(full_page())
    for fact in (
        "HuggingFaceTB/SmolLM2-135M-Instruct", "24 of 30 decoder layers run. Removed: 12-14, 17, 25-26.",
        "30 → 24", "\u221215.8 %", "134.5 M → 113.3 M", f"1.22{TIMES}", f"1.17\u20131.26{TIMES}", "23.49 → 64.40",
        "+174.2 %",
        "✓ proven", "4 of 4 checks passed", "116.8 GFLOPs", "46,080 bytes", "24 windows x 1024", "1.9e-06", NOTATION,
        "wikitext-2-valid.txt, 16 x 512 tokens, no BOS", "shoal prune smollm2 --method shortgpt", "diverged", "NaN",
    ):  # fmt: skip
        assert fact in said, fact
    assert "Not in this report" not in said


def test_sections_without_data_are_left_out() -> None:
    page = render(small())
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["The plan", "How it was made"]
    assert "Not in this report: size, speed, quality, proof." in words(page)
    assert 'class="plot"' not in page


def test_every_text_is_escaped() -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: value[key] if key in ("stacks", "span", "kind") else poison(value[key]) for key in value}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return EVIL if isinstance(value, str) else value

    data = poison(full())
    data["plan"]["stacks"] = {EVIL: full()["plan"]["stacks"]["decoder"]}
    data["model"]["layers"] = {EVIL: 30}
    page = render(data)
    page.encode("utf-8")
    parsed = Page(page)
    assert "\0" not in page
    assert page.count("<script") == 1
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]


def test_page_is_self_contained() -> None:
    page = full_page()
    parsed = Page(page)
    loading = [
        (tag, name, value) for tag, name, value in parsed.attributes if name in ("src", "href", "xlink:href", "data")
    ]
    assert all(tag == "use" and value.startswith("#") for tag, _, value in loading)
    assert "http://" not in page and "https://" not in page and "@import" not in page
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for _, _, value in loading} <= set(ids)
    assert page == render(full())


def test_broken_numbers_are_shown_as_such() -> None:
    data = full()
    data["quality"][0] |= {"pruned": math.nan, "error_pruned": None}
    data["cost"][0]["pruned"] = None
    data["speed"][0]["ratio"] = {"median": math.nan, "low": None, "high": None}
    data["scores"] |= {"values": [math.nan, *INFLUENCE[1:29], math.inf], "errors": None}
    data["proof"] = {"passed": False, "checks": [{"name": "logits", "passed": False, "value": math.inf, "limit": 1e-5}]}
    said = words(render(data))
    for fact in (
        "23.49 → NaN, not a finite number",
        "✗ failed",
        "0 of 1 check passed",
        "infinity",
        "do not use this model",
    ):
        assert fact in said, fact


@pytest.mark.parametrize("key", ["title", "command", "model", "plan"])
def test_needed_keys(key: str) -> None:
    data = small()
    del data[key]
    with pytest.raises(UsageError, match=key):
        render(data)


def test_plans_that_cannot_be_drawn() -> None:
    with pytest.raises(PlanError, match="names layer 30"):
        stacks({"stacks": {"decoder": {"depth": 30, "notation": "0-30"}}})
    with pytest.raises(NotationError):
        stacks({"stacks": {"decoder": {"depth": 30, "notation": "0-a"}}})


def drawn(notation: str, depth: int) -> str:
    """The wide drawing of one stack, executed order and legend included."""
    (stack,) = stacks({"stacks": {"decoder": {"depth": depth, "notation": notation}}})
    return re.sub(
        r'<svg class="plan narrow.*?</svg>|<p class="label narrow.*?</p>', "", plan_diagram(stack), flags=re.DOTALL
    )


@pytest.mark.parametrize("depth", [1, 12, 30, 80])
def test_picture_numbers_every_base_layer_once(depth: int) -> None:
    html = drawn("0" if depth == 1 else f"0-{depth - 2}", depth)
    assert re.findall(r'class="(?:on|gone)">(\d+)<', html) == [str(layer) for layer in range(depth)]
    assert html.count('class="gone"') == (depth > 1)
    assert "Executed order" not in html


def test_picture_of_every_kind_of_step() -> None:
    (stack,) = stacks(exotic()["plan"])
    legend = plan_diagram(stack).split('<ul class="legend">')[1]
    for kind in ("removed", "attention only", "mlp only", "fitted map", "in parallel", "runs several times"):
        assert kind in legend
    for kind in ("reads another layer's KV", "weights of its own", "behind a gate", "exit"):
        assert kind in legend
    assert render(exotic())


@pytest.mark.parametrize(
    ("notation", "order"),
    [("0-5", False), ("0,2x3,3", False), ("0,(1|2),3", False), ("0,1a,1m,2", False), ("~0-2,3-5", False),
     ("0@0", False), ("5-0", True), ("0-3,2-5", True), ("0,(1|4),5", True), ("0,(2|3),1", True)],
)  # fmt: skip
def test_executed_order_is_shown_only_where_it_says_more(notation: str, order: bool) -> None:
    assert ("Executed order" in drawn(notation, 6)) == order


def test_layer_runs_and_dropped() -> None:
    (facts,) = stacks({"stacks": {"decoder": {"depth": 8, "notation": "0,1a,2m,3x2,~4-5,7"}}})
    assert (facts.layer_runs, facts.dropped, facts.mapped) == (5.0, (6,), {4, 5})
    assert PlannedStack("d", 2, facts.steps[:1]).dropped == (1,)


def test_plots_mark_removed_layers_and_keep_to_themselves() -> None:
    linear = scores_svg([0.2, 0.1, math.nan], [0.01, 0.02, 0.0], frozenset({1}), span=1, title="a < b")
    assert "<pattern" in linear and "NaN" in linear and 'aria-label="a &lt; b"' in linear
    assert "<style" not in linear and "#0a0a" not in linear and "DejaVu" not in linear
    assert "<pattern" not in scores_svg([0.001, 10.0], None, frozenset({1}), span=1, title="t")
    assert scores_svg([math.nan, math.inf, None], None, frozenset(), span=2, title="t")
    row = {"label": "$decode", "median": 1.5, "low": 1.4, "high": 1.6, "simulated": True}
    assert f"1.50{TIMES}" in ratios_svg([row], title="t")


def test_verdicts() -> None:
    row = {"dense": 10.0, "pruned": 11.0, "better": "lower"}
    assert verdict(row)[0] == "worse"
    assert verdict(row | {"better": "higher"})[0] == "better"
    assert verdict(row | {"error_dense": 0.5, "error_pruned": 0.5})[0] == "within 2 standard errors"
    assert verdict(row | {"pruned": 10.0})[0] == "unchanged"


def test_numbers() -> None:
    assert [number(x) for x in (0.0123456, 1234567, -2.5, math.nan, -math.inf, None, True)] == [
        "0.01235", "1,234,567", "\u22122.500", "NaN", "\u2212infinity", "—", "yes",
    ]  # fmt: skip
    assert pair(23.49, 64.4) == ("23.49", "64.40") and pair(31, 4) == ("31", "4")
    assert amount(134515008) == "134.5 M" and amount(1.2e9, "B") == "1.2 GB"
    assert percent(100, 50) == "\u221250.0 %" and percent(0, 1) == "—" and percent(1.0, math.nan) == "NaN"
    assert ranges([12, 13, 14, 17, 25, 26]) == "12-14, 17, 25-26"
    assert esc("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"
