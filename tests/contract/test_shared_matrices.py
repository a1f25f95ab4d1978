"""Runs that share new matrices (`0=ID,2=ID`), each with norms and, if it likes, tensors of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import shoal.auto  # noqa: F401 - tells transformers of planned checkpoints
from shoal.errors import PlanError, ShoalError
from shoal.fitting.result import Job
from shoal.live import running
from shoal.models.linear import matrix_of
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan, check, cost, parse_plan, shapes_of
from shoal.plan.moved import moved
from shoal.plan.steps import Run
from shoal.transforms.relax import relax
from shoal.transforms.tie import tie
from shoal.writing.planned_folder import write_planned
from shoal.writing.surgery import rewrite

from .families import VOCAB, tiny_of
from .healing import batch_of, gradients, learner_of
from .planted import random_data
from .references import CLOSE
from .shares import every

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
TEXT = "0=t,1,2=t:own,3"
FAMILIES = ["llama", "gpt2", "opt", "qwen3", "gemma3_text", "olmo2", "stablelm", "phi3", "granite", "starcoder2"]


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, **more).logits
    return found


def matrices(model: Any, layer: int) -> dict[str, torch.Tensor]:
    named = find_stack(model).layer(layer).named_parameters()
    return {name: p.detach().clone() for name, p in named if p.dim() > 1}


def given(model: Any) -> dict[str, torch.Tensor]:
    """The mean of two layers for both, and beside it a change of one matrix for the second alone."""
    one, other = matrices(model, 0), matrices(model, 2)
    new = {f"t.{name}": (tensor + other[name]) / 2 for name, tensor in one.items()}
    opened = open_model(model)
    layer = opened.stack().layer(2)
    roles = opened.facts().layers[2].roles
    assert roles is not None
    path = roles.output[0]
    out, into = matrix_of(layer.get_submodule(path)).shape
    generator = torch.Generator().manual_seed(3)
    new |= {
        f"own.{path}.up": 0.3 * torch.randn(out, 2, generator=generator),
        f"own.{path}.down": 0.3 * torch.randn(2, into, generator=generator),
    }
    return new


def by_hand(model: Any, new: dict[str, torch.Tensor]) -> Any:
    made = copy.deepcopy(model)
    with torch.no_grad():
        for index in (0, 2):
            layer = find_stack(made).layer(index)
            for name, p in layer.named_parameters():
                if f"t.{name}" in new:
                    p.copy_(new[f"t.{name}"])
        path = next(name for name in new if name.endswith(".up")).removeprefix("own.").removesuffix(".up")
        module = find_stack(made).layer(2).get_submodule(path)
        change = new[f"own.{path}.up"] @ new[f"own.{path}.down"]
        module.weight += change if module.weight.shape == change.shape and "Conv1D" not in str(module) else change.T
    return made


@pytest.mark.parametrize("family", every(3, FAMILIES))
def test_live_planned_and_stock_are_what_they_are_by_hand(family: str, tmp_path: Path) -> None:
    model = tiny_of(family, 4)
    new, spec = given(model), open_model(model).spec
    want = logits(by_hand(model, new))
    before = logits(model)
    with running(model, TEXT, new):
        live = logits(model)
    torch.testing.assert_close(live, want, **CLOSE)
    assert torch.equal(logits(model), before)
    torch.testing.assert_close(logits(rewrite(model, TEXT, weights=new)), want, **CLOSE)
    written = write_planned(model, TEXT, tmp_path / "m", weights=new, prove=False)
    shared = sum(tensor.numel() for name, tensor in matrices(model, 0).items())
    factors = sum(tensor.numel() for name, tensor in new.items() if name.startswith("own."))
    priced = cost(TEXT, spec, weights=shapes_of(new))
    assert written.params == priced.params == spec.params - shared + factors
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(loaded), live, **CLOSE)


def test_the_notation_keeps_it() -> None:
    spec = open_model(tiny_of("llama", 6)).spec
    base = Plan.identity(spec)
    for text in ("0=t,1,2=t:own,3-5", "0-5=t", "0-2=t,3-5=u.1", "0a,0m=t,1-5", "0x2=t,1-5", "0,1@0,2=t@0:own,3-5"):
        plan = parse_plan(text, base)
        assert str(plan) == text
        assert parse_plan(str(plan), base) == plan
    assert parse_plan("0=t:own", base).steps() == (Run(0, weights="own", tie="t"),)
    with pytest.raises(PlanError, match="reads as layers") as caught:
        Run(0, tie="3-5")
    assert caught.value.code == "P117"


def test_what_is_missing_or_does_not_fit_is_refused() -> None:
    model = tiny_of("llama", 4)
    opened = open_model(model)
    assert [p.code for p in check("0=t,1-3", opened.spec)] == ["P112"]
    for name, shape in (("mlp.up_proj.weight", (3, 3)), ("mlp.nothing.weight", (32, 32))):
        with pytest.raises(PlanError, match=r"t\.mlp") as caught:
            running(model, "0=t,1-3", {f"t.{name}": torch.zeros(shape)}).__enter__()
        assert caught.value.code == "P129"


def test_changes_that_begin_at_zero_change_no_bit_of_the_tie() -> None:
    """And have the shapes of those that are fitted."""
    model, data = tiny_of("llama", 6), random_data(4, 12)
    tied = tie(Job(model, data, Plan.identity(open_model(model).spec), {}), pattern="cycle", start="average")
    job = Job(model, data, tied.plan, tied.weights)
    made, fitted = relax(job, rank=2, start="zero"), relax(job, rank=2)
    assert {name: one.shape for name, one in made.weights.items()} == {
        name: one.shape for name, one in fitted.weights.items()
    }
    assert any(name.endswith(".down") and one.any() for name, one in made.weights.items())
    logits = []
    for plan, weights in ((tied.plan, tied.weights), (made.plan, made.weights)):
        with torch.no_grad(), running(model, plan, weights):
            logits.append(model(data.ids).logits)
    assert torch.equal(*logits)
    with pytest.raises(ShoalError, match="U559"):
        relax(job, rank=2, bias=True, start="zero")


def test_ties_that_are_averages_are_relaxed_to_their_own_matrices() -> None:
    """At full rank each layer is its own again, and both runs of a set have factors."""
    model = tiny_of("llama", 6)
    data = random_data(2, 32)
    job = Job(model, data, Plan.identity(open_model(model).spec), {})
    tied = tie(job, unique=3, start="average")
    made = relax(Job(model, data, tied.plan, tied.weights), rank=32)
    assert str(made.plan) == ",".join(f"{n}=tie-{n % 3}:relax-{n}" for n in range(6))
    with running(model, made.plan, made.weights):
        relaxed = logits(model)
    torch.testing.assert_close(relaxed, logits(model), atol=1e-3, rtol=1e-3)


def test_a_random_start_is_the_same_for_one_seed_and_no_layers_own() -> None:
    model = tiny_of("llama", 6)
    job = Job(model, random_data(2, 32), Plan.identity(open_model(model).spec), {})
    one, again, other = (tie(job, unique=3, start="random", seed=seed).weights for seed in (1, 1, 2))
    name = "tie-1.mlp.up_proj.weight"
    assert torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name])
    own = find_stack(model).layer(1).mlp.up_proj.weight.detach()
    assert abs(float(one[name].std() / own.std()) - 1) < 0.1


def test_shared_matrices_and_factors_learn_and_stay_shared() -> None:
    """One gradient step by `plan`: the matrix of both runs gets the sum of their gradients; nothing else moves."""
    model = tiny_of("llama", 4)
    new = given(model)
    with learner_of(model, "cross-entropy", learn=["plan"], plan=TEXT, weights=new) as learner:
        batch = batch_of(2)
        found = gradients(learner, batch, 2)
        assert found.keys() == new.keys() and all(bool(gradient.any()) for gradient in found.values())
        with torch.no_grad():
            for name, parameter in learner.moving_tensors.items():
                parameter.sub_(found[name], alpha=0.1)
        plan, tensors = learner.finished()
        assert str(plan) == TEXT and tensors.keys() == new.keys()
    with running(model, plan, tensors):
        found_live = logits(model)
    torch.testing.assert_close(found_live, logits(by_hand(model, tensors)), **CLOSE)


def test_shared_matrices_are_read_twice_and_held_once() -> None:
    model = tiny_of("llama", 4)
    spec, new = open_model(model).spec, shapes_of(given(model))
    plain, shared = moved("0-3", spec), moved(TEXT, spec, weights=new)
    factors = sum(4 * shape[0] * shape[1] for name, shape in new.items() if name.startswith("own."))
    assert shared.weights == plain.weights + factors
