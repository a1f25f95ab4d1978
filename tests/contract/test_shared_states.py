"""Plans that are compared with one another begin where they part: the same figures from fewer layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from shoal.evaluation import resumable
from shoal.evaluation.final_states import final_state_change
from shoal.measures.kl_removed import kl_removed
from shoal.measures.loss_removed import loss_removed
from shoal.measures.macro_influence import macro_influence
from shoal.measures.swap_curve import swap_curve
from shoal.measures.top1_removed import top1_removed
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Plan, parse_plan

from .families import DEPTH, FAMILIES, tiny
from .planted import random_data
from .shares import every
from .test_around_runs import around

DATA = random_data(2, 8)
MEASURES = [loss_removed, kl_removed, top1_removed, macro_influence, swap_curve]


@contextmanager
def calls(model: Any) -> Iterator[list[int]]:
    """The layers that are called meanwhile, each time."""
    seen: list[int] = []
    layers = find_stack(model).layers
    handles = [
        layer.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
        for number, layer in enumerate(layers)
    ]
    yield seen
    for handle in handles:
        handle.remove()


CELLS = {
    f"{family}-{measure.__name__}": (family, measure)
    for family in FAMILIES
    for measure in MEASURES
    if (family, measure) != ("llama4_text", macro_influence)  # its model class hands on no last state
}


@pytest.mark.parametrize("cell", every(3, list(CELLS)))
def test_figures_are_those_of_whole_forwards(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, measure = CELLS[cell]
    model = tiny(family, "eager")
    shared = measure(model, DATA)
    monkeypatch.setattr(resumable, "_parting", lambda *_: 0)
    whole = measure(model, DATA)
    assert repr(shared.samples) == repr(whole.samples)  # NaN is not equal to itself


def test_what_plans_have_in_common_is_run_once() -> None:
    model = tiny("llama")
    macro_influence(model, DATA)  # probes what its layers do
    with calls(model) as seen:
        macro_influence(model, DATA)
    sequences, trials = len(DATA), DEPTH + sum(DEPTH - cut for cut in range(1, DEPTH))
    behind = sum(DEPTH - 1 - layer for layer in range(DEPTH))
    assert len(seen) == sequences * (DEPTH + behind) + trials


@pytest.mark.parametrize("notation", ["0,1:x,2-3", "0-1,2:x,3", "0,2:x,3"])
def test_plans_with_tensors_of_their_own(notation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    layer = find_stack(model).layer(1)
    weights = {f"x.{name}": tensor.detach() * 0.5 for name, tensor in layer.named_parameters()}
    assert_same(model, parse_plan(notation, Plan.identity(inspect(model))), weights, monkeypatch)


def test_a_run_that_reads_an_earlier_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    plan = parse_plan("0-2,3:x", Plan.identity(inspect(model)))
    assert_same(model, plan, around(inspect(model).stack().hidden), monkeypatch)


def assert_same(model: Any, plan: Plan, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    shared = final_state_change(model, DATA, plan=plan, weights=weights)
    monkeypatch.setattr(resumable, "_parting", lambda *_: 0)
    assert repr(shared.samples) == repr(final_state_change(model, DATA, plan=plan, weights=weights).samples)
