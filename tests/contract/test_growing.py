"""Plans in which layers run more than once: every span twice with its map, and layers that are added."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.api.journal import mean_nll
from shoal.api.prune import prune
from shoal.api.study import cells
from shoal.errors import UsageError
from shoal.live import running
from shoal.methods.rys import rys
from shoal.models.inspect import inspect
from shoal.plan import Plan
from shoal.registry import entries
from shoal.search.span_scan import span_scan

from .families import DEPTH, tiny
from .method_tasks import TASK, random_task, task_of
from .planted import PLANTED, planted, random_data
from .test_tasks import Letters

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


def test_a_scan_by_a_task_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(TASK)
    job = random_task(tokenizer=Letters())
    found = rys(job, file=file, items=2, every=2)
    assert all(0 <= one.score <= 1.2 for one in found.trace) and len(found.trace) == 7
    with pytest.raises(UsageError, match="U574"):
        rys(random_task(), file=file)


def test_growing_is_pruned_to_a_page_with_its_map_and_takes_no_amount() -> None:
    from shoal.models.load import Loaded  # noqa: F401

    assert [entry.name for entry in GROWING]
    with pytest.raises(UsageError, match="U665"):
        prune("nowhere", method="rys", drop=1)
    with pytest.raises(UsageError, match="U665"):
        cells(["rys"], ["params=0.8"], [0])
    assert not {entry.name for entry in GROWING} & {cell.method for cell in cells([], ["params=0.8"], [0])}
