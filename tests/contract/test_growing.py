"""Plans in which layers run more than once: every span twice with its map, and layers that are added."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from shoal.api.journal import mean_nll
from shoal.api.prune import prune
from shoal.api.publish import page_data
from shoal.api.study import cells
from shoal.cli import app
from shoal.errors import ShoalError, UsageError
from shoal.fitting.result import Job
from shoal.live import running
from shoal.methods.llama_pro import llama_pro
from shoal.methods.rys import rys
from shoal.methods.solar import solar
from shoal.models.inspect import inspect
from shoal.models.load import Loaded, load
from shoal.models.stacks import find_stack
from shoal.plan import Plan, check
from shoal.registry import entries, get
from shoal.report import render
from shoal.search.span_scan import span_scan
from shoal.writing.proof import Proof
from shoal.writing.surgery import rewrite

from .families import DEPTH, FAMILIES, tiny, tiny_of
from .method_tasks import TASK, random_task, task_of
from .planted import PLANTED, planted, random_data
from .shares import every
from .test_api import model_folder
from .test_matrix import NO_SDPA
from .test_tasks import Letters
from .transform_jobs import do, job, logits

DATA = random_data(2, 16)
GROWING = [entry for entry in entries("methods").values() if not entry.removes]


def test_a_scan_tries_every_span_once_and_takes_the_lowest() -> None:
    """By hand: a span is better the nearer its first is to 1 and its last to 3."""
    plan, asked, told = Plan.identity(inspect(tiny("llama"))), [], []

    def objective(one: Plan) -> float:
        layers = list(one.layers())
        asked.append(layers)
        if len(layers) == DEPTH:
            return 10.0
        j = next(at for at in range(len(layers) - 1) if layers[at + 1] != layers[at] + 1)
        return abs(layers[j + 1] - 1) + abs(layers[j] - 3)

    found = span_scan(plan, objective=objective, legal=lambda one: True, progress=lambda *report: told.append(report))
    spans = [(i, j) for i in range(DEPTH) for j in range(i, DEPTH)]
    assert [one.twice for one in found.trace] == [None, *spans]
    assert asked[1:] == [[*range(j + 1), *range(i, DEPTH)] for i, j in spans]
    assert (
        found.plan.layers() == (0, 1, 2, 3, 1, 2, 3)
        and str(found.plan) == found.trace[1 + spans.index((1, 3))].notation
    )
    assert told[-1] == (len(spans) + 1, len(spans) + 1, "spans twice")
    coarse = span_scan(plan, objective=objective, legal=lambda one: True, first=1, every=2, longest=2)
    assert [one.twice for one in coarse.trace[1:]] == [(1, 1), (3, 3)]


def test_what_is_not_legal_or_cannot_be_is_no_span() -> None:
    plan = Plan.identity(inspect(tiny("llama")))
    short = span_scan(plan, objective=lambda one: 0.0, legal=lambda one: len(one.layers()) < DEPTH + 2)
    assert [one.twice for one in short.trace[1:]] == [(i, i) for i in range(DEPTH)]
    with pytest.raises(UsageError, match="U504"):
        span_scan(plan, objective=lambda one: 0.0, legal=lambda one: False)
    for wrong in (
        {"first": DEPTH},
        {"last": DEPTH},
        {"every": 0},
        {"shortest": 3, "longest": 2},
        {"first": 2, "last": 1},
    ):
        with pytest.raises(UsageError, match="U666"):
            span_scan(plan, objective=lambda one: 0.0, legal=lambda one: True, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="U546"):
        span_scan(plan, objective=lambda one: float("nan"), legal=lambda one: True)


def test_rys_repeats_the_layer_that_does_nothing_at_no_cost_and_scores_are_those_of_the_running_plans() -> None:
    model, data = planted("llama"), random_data(3, 16)
    found = rys(task_of(model, data), longest=1)
    dense = found.trace[0].score
    by_layer = {one.twice[0]: one.score for one in found.trace if one.twice is not None}
    assert by_layer[PLANTED["llama"]] == dense == mean_nll(model, data)
    assert sum(score == dense for score in by_layer.values()) == 1
    for one in found.trace[1:3]:
        with running(model, one.notation):
            assert mean_nll(model, data) == pytest.approx(one.score, rel=1e-6)


def test_a_scan_by_a_task_makes_its_share_of_wrong_items_small(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(TASK)
    job = random_task(tokenizer=Letters())
    found = rys(job, file=file, items=2, every=2)
    assert all(0 <= one.score <= 1.2 for one in found.trace) and [one.twice for one in found.trace] == [
        None,
        (0, 0),
        (0, 2),
        (2, 2),
    ]
    with pytest.raises(UsageError, match="U574"):
        rys(random_task(), file=file)


def test_growing_takes_no_amount_and_stands_in_no_comparison() -> None:
    assert {entry.name for entry in GROWING} == {"rys", "llama-pro", "solar"}
    for entry in GROWING:
        for amount in ({"drop": 1}, {"keep": 0.5}, {"budget": "params=0.8"}):
            with pytest.raises(UsageError, match="U665"):
                prune("nowhere", method=entry.name, **amount)
        with pytest.raises(UsageError, match="U665"):
            cells([entry.name], ["params=0.8"], [0])
    assert not {entry.name for entry in GROWING} & {cell.method for cell in cells([], ["params=0.8"], [0])}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(model_folder(tmp_path_factory.mktemp("model")), device="cpu")


def test_a_scan_is_a_deeper_plan_with_a_map_on_its_page(loaded: Loaded, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    small: dict[str, Any] = {"length": 16, "limit": 2, "journal": journal}
    found = prune(loaded, method="rys:longest=2", **small)
    depth = loaded.opened.spec.stack().depth
    assert len(found.plan.layers()) > depth and not found.plan.dropped()
    lines = journal.read_text()
    assert prune(loaded, method="rys:longest=2", **small).plan == found.plan and journal.read_text() == lines
    spans = [one["twice"] for one in found.to_dict()["trace"] if "twice" in one]
    assert len(spans) == 2 * depth - 1
    data = page_data(found, Proof(True, ()), "command", "now")
    assert data["title"].endswith("layers deeper") and len(data["twice"]["spans"]) == len(spans)
    page = render(data)
    assert "Spans that run twice" in page and page.count('class="chosen" x=') == 1
    assert page.count("first of the span ") == len(spans), "a tooltip for each"


REFUSED = {"mamba2": "U664", "nemotron_h": "U664", "gemma3n_text": "M316"}
"""Families whose layers have no parts, or hand on several streams."""
LIVE_ONLY = {"jamba": "W206"}
"""Families whose config cannot say where the copies are."""


@pytest.mark.parametrize("family", every(4, FAMILIES))
def test_a_model_that_was_grown_by_silent_copies_gives_the_same_logits(family: str) -> None:
    model = tiny(family, "eager" if family in NO_SDPA else "sdpa")
    if family in REFUSED:
        with pytest.raises(ShoalError, match=REFUSED[family]):
            do("grow", job(model, []), every=1)
        return
    made = do("grow", job(model, []), every=1)
    assert len(made.plan.layers()) == 2 * DEPTH
    assert not check(made.plan, inspect(model), {name: tuple(t.shape) for name, t in made.weights.items()})
    assert torch.equal(logits(model, made), logits(model))
    if family in LIVE_ONLY:
        with pytest.raises(ShoalError, match=LIVE_ONLY[family]):
            rewrite(model, made.plan, weights=made.weights)
        return
    deeper = rewrite(model, made.plan, weights=made.weights)
    ids = random_data(3, 16, seed=9).ids
    with torch.no_grad():
        assert torch.equal(deeper(input_ids=ids, use_cache=False).logits, logits(model))
        cached = deeper(input_ids=ids[:, :9]).past_key_values
        rest = deeper(input_ids=ids[:, 9:], past_key_values=cached).logits
    assert torch.allclose(rest, logits(model)[:, 9:], atol=1e-4)


def test_only_output_matrices_of_the_copies_are_new() -> None:
    made = do("grow", job(tiny("llama"), []), every=3)
    assert str(made.plan) == "0-2,2:grow-2,3"
    assert sorted(made.weights) == ["grow-2.mlp.down_proj.weight", "grow-2.self_attn.o_proj.weight"]
    assert not any(tensor.any() for tensor in made.weights.values())


def test_the_other_styles_are_their_formulas() -> None:
    model = tiny("llama")
    plans = {
        "solar": "0-2,1-3", "stack": "0-3,0-3",
    }  # fmt: skip
    for style, plan in plans.items():
        assert str(do("grow", job(model, []), style=style).plan) == plan
    assert str(do("grow", job(model, []), style="interleave", every=2).plan) == "0,1x2,2,3x2"
    assert str(do("grow", job(model, [1]), style="solar", cut=1).plan) == "0,2x2,3", "a plan that removes grows, too"
    eight = tiny_of("llama", 8)
    cut = get("transforms", "grow").load()(Job(eight, DATA, Plan.identity(inspect(eight))), style="solar", cut=2)
    assert str(cut.plan) == "0-5,2-7"
    first, second = find_stack(model).layer(0), find_stack(model).layer(1)
    for init in ("mean", "slerp"):
        made = do("grow", job(model, []), style="interleave", every=2, init=init)
        assert str(made.plan) == "0-1,1:grow-1,2-3,3:grow-3"
        for name, parameter in second.named_parameters():
            new, own, other = made.weights[f"grow-1.{name}"], parameter.detach(), first.get_parameter(name).detach()
            wanted = (own + other) / 2
            if init == "slerp":
                between = torch.arccos(torch.cosine_similarity(own.flatten(), other.flatten(), dim=0).clamp(-1, 1))
                wanted = wanted / torch.cos(between / 2)  # sin(w / 2) / sin(w) = 1 / (2 cos(w / 2))
            assert torch.allclose(new, wanted, atol=1e-5), name
        first_too = do("grow", job(model, []), style="interleave", every=1, init=init)
        assert str(first_too.plan).startswith("0x2,1,1:grow-1"), "nothing lies before the first"


def test_methods_of_that_name_are_the_transform() -> None:
    assert str(llama_pro(random_task(), every=2).plan) == "0-1,1:grow-1,2-3,3:grow-3"
    assert str(solar(random_task()).plan) == "0-2,1-3"
    with pytest.raises(UsageError, match="U664"):
        solar(replace(random_task(), legal=lambda one: False))


def test_fuse_needs_no_plan_where_nothing_is_removed(tmp_path: Path, loaded: Loaded) -> None:
    """And the written folder is proved."""
    folder, out = model_folder(tmp_path / "base"), tmp_path / "grown"
    words = ["fuse", str(folder), "--limit", "2", "--length", "16", "--no-assess", "-q"]
    run = CliRunner().invoke(app, [*words, "--with", "grow:every=2", "--output", str(out), "--json"])
    assert run.exit_code == 0, run.output
    said = json.loads(run.stdout)
    depth = loaded.opened.spec.stack().depth
    assert (
        said["proof"]["passed"]
        and json.loads((out / "config.json").read_text())["num_hidden_layers"] == depth + depth // 2
    )
    refused = CliRunner().invoke(app, [*words, "--with", "refit"])
    assert refused.exit_code == 1 and "U523" in refused.output


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sandwich_is_the_papers_order_and_none_is_the_plan_itself(family: str) -> None:
    model = tiny(family)
    assert do("sandwich", job(model, []), coefficient=0).plan == Plan.identity(inspect(model))
    made = do("sandwich", job(model, []), coefficient=2)
    assert str(made.plan) == "0-2a,0m,3a,1-3m"
    assert torch.isfinite(logits(model, made)).all() and not torch.equal(logits(model, made), logits(model))
    assert str(do("sandwich", job(model, [])).plan) == "0-1a,0m,2a,1m,3a,2-3m", "6 of 16 of 4 layers is 1"
    ends = do("sandwich", job(model, []), coefficient=DEPTH)
    assert str(ends.plan) == "0-3a,0-3m"


def test_an_order_is_that_of_the_scores() -> None:
    """By a measure, either way round, within a range, at random; the layers are the same ones."""
    model = tiny("llama")
    scores = get("measures", "spectrum").load()(model).values
    rising = sorted(range(DEPTH), key=lambda n: scores[n])
    assert rising != sorted(rising), "else the test proves nothing"
    assert list(do("order", job(model, []), highest="last").plan.layers()) == rising
    assert list(do("order", job(model, [])).plan.layers()) == rising[::-1]
    inner = do("order", job(model, []), first=1, last=2, highest="last").plan.layers()
    assert list(inner) == [0, *sorted((1, 2), key=lambda n: scores[n]), 3]
    drawn = {do("order", job(model, []), by="random", seed=seed).plan.layers() for seed in range(8)}
    assert len(drawn) > 3 and all(sorted(one) == list(range(DEPTH)) for one in drawn)
    with pytest.raises(UsageError):
        do("order", job(model, []), by="no-such-measure")
