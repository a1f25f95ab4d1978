"""Gates of layers that a plan repeats: one for each run, by one rule for all policies that learn."""

from __future__ import annotations

import pytest
import torch

from shoal.deciding.policy_text import make_policy
from shoal.live import running
from shoal.models.opened import open_model
from shoal.plan import Plan, parse_plan
from shoal.plan.steps import runs

from .families import tiny
from .policy_cells import batch_of, whole


@pytest.mark.parametrize(
    ("policy", "gate", "without"),
    [("routed", "route", "0,1,2,2,3"), ("fractional", "bits", "0,1,2,2,3"), ("widths", "width", "0,1,2,1a,2,3")],
)
def test_each_run_of_a_repeated_layer_has_a_gate_of_its_own(policy: str, gate: str, without: str) -> None:
    """Its second one shut, whichever policy decides; a plan that was saved with one gate for both goes on with it."""
    model, batch = tiny("llama"), batch_of(2)
    spec = open_model(model).spec
    identity, asked = Plan.identity(spec), f"{policy}:layers=1-2,grain=none"
    made = make_policy(asked, parse_plan("0,1,2,1,2,3", identity), spec)
    gates = [run.gate for run in runs(made.plan.steps()) if run.gate is not None]
    assert gates == [f"{gate}-1", f"{gate}-2", f"{gate}-1-2", f"{gate}-2-2"]
    begun = made.start(spec)
    assert set(begun) == {f"{one}.bias" for one in gates}
    shut = {name: one.flip(0) if len(one) > 1 else -one for name, one in begun.items()}
    one_gate = str(made.plan).replace(f"{gate}-1-2", f"{gate}-1").replace(f"{gate}-2-2", f"{gate}-2")
    first, second = f"{gate}-1.bias", f"{gate}-1-2.bias"
    for plan, tensors, static in (
        ("0,1,2,1,2,3", begun, "0,1,2,1,2,3"),
        ("0,1,2,1,2,3", {**begun, second: shut[second]}, without),
        (one_gate, {**begun, first: shut[first]}, "0,1a,2,1a,2,3" if policy == "widths" else "0,2,2,3"),
    ):
        with running(model, plan, tensors, policy=asked):
            found = whole(model, batch)
        with running(model, static):
            assert torch.equal(whole(model, batch), found), (plan, static)


def test_an_attention_alone_has_no_gate_of_widths() -> None:
    """Only mlps have widths."""
    spec = open_model(tiny("llama")).spec
    halves = parse_plan("0,1a,1m,2-3", Plan.identity(spec))
    made = make_policy("widths:layers=1-2", halves, spec).plan
    assert [run.gate for run in runs(made.steps())] == [None, None, "width-1m", "width-2", None]
