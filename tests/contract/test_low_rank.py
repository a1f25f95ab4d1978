"""Low-rank factors of a run: beside a matrix or in its place, live, costed, written, kept; and the transform."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import shoal.auto
from shoal.errors import PlanError
from shoal.fitting.low_rank import two_factors
from shoal.fitting.result import Job
from shoal.live import apply, running
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, parse_plan, shapes_of
from shoal.transforms.low_rank import low_rank
from shoal.writing.planned_folder import write_planned
from shoal.writing.surgery import rewrite

from .families import VOCAB, tiny
from .planted import random_data
from .references import CLOSE
from .shares import every

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
FAMILIES = [
    "llama",
    "gpt2",
    "opt",
    "qwen2",
    "gemma3_text",
    "olmo2",
    "phi3",
    "stablelm",
    "cohere2",
    "gpt_neox",
    "granite",
    "phi",
]
assert shoal.auto


def own(family: str = "llama") -> Any:
    return copy.deepcopy(tiny(family))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def factors(model: Any, words: tuple[str, str], rank: int = 3, layer: int = 2) -> tuple[dict[str, torch.Tensor], Any]:
    """Factors of every linear matrix of a layer, and a model in which they are multiplied."""
    generator = torch.Generator().manual_seed(9)
    made, by_hand = {}, copy.deepcopy(model)
    for name, module in find_stack(model).layer(layer).named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2:
            continue
        turned = type(module).__name__ == "Conv1D"
        out, width = reversed(weight.shape) if turned else weight.shape
        one, two = torch.randn(out, rank, generator=generator) * 0.1, torch.randn(rank, width, generator=generator)
        made |= {f"x.{name}.{words[0]}": one, f"x.{name}.{words[1]}": two}
        change = (one @ two).T if turned else one @ two
        target = find_stack(by_hand).layer(layer).get_submodule(name).weight
        target.data.copy_(target.data + change if words[0] == "up" else change)
    return made, by_hand


@pytest.mark.parametrize("words", [("up", "down"), ("left", "right")])
@pytest.mark.parametrize("family", every(3, FAMILIES))
def test_factors_are_the_matrix_that_they_make(family: str, words: tuple[str, str], tmp_path: Path) -> None:
    """Live, cached, as a stock model, and as a planned checkpoint that holds the factors alone."""
    model = own(family)
    weights, by_hand = factors(model, words)
    before, want = logits(model), logits(by_hand)
    plan = parse_plan("0-1,2:x,3", Plan.identity(inspect(model)))
    cache = DynamicCache(config=model.config)
    with running(model, plan, weights), torch.no_grad():
        found = logits(model)
        steps = [model(IDS[:, n : n + 1], past_key_values=cache).logits for n in range(IDS.shape[1])]
    assert torch.equal(logits(model), before)
    torch.testing.assert_close(found, want, **CLOSE)
    torch.testing.assert_close(torch.cat(steps, 1), want, **CLOSE)
    torch.testing.assert_close(logits(rewrite(model, plan, weights=weights)), want, **CLOSE)
    write_planned(Loaded(model, None, "tiny"), plan, tmp_path / "one", weights=weights, prove=False)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(made), found)
    base, priced = inspect(model), cost(plan, inspect(model), weights=shapes_of(weights))
    numbers = sum(t.numel() for t in weights.values())
    matrices = [t for n, t in find_stack(model).layer(2).named_parameters() if t.dim() == 2]
    gone = sum(t.numel() for t in matrices) if words[0] == "left" else 0
    assert priced.params == base.params + numbers - gone
    assert priced.params == sum({(p.data_ptr(), p.numel()): p.numel() for p in made.parameters()}.values())
    whole = cost(Plan.identity(base), base)
    assert priced.decode_flops == whole.decode_flops + 2 * numbers - 2 * gone


def test_factors_beside_a_tied_matrix_change_one_run_alone() -> None:
    """Relaxed recursion: `2=1:x` is W_1 + up down; at full rank the layer's own matrix comes back."""
    model = own()
    before = logits(model)
    weights = {}
    layers = [dict(find_stack(model).layer(n).named_parameters()) for n in (1, 2)]
    for name, matrix in layers[1].items():
        if matrix.dim() == 2:
            left, right, _ = two_factors((matrix - layers[0][name]).detach(), min(matrix.shape))
            module = name.removesuffix(".weight")
            weights |= {f"x.{module}.up": left, f"x.{module}.down": right}
    with running(model, "0-1,2=1:x,3", weights):
        torch.testing.assert_close(logits(model), before, **CLOSE)
    torch.testing.assert_close(logits(rewrite(model, "0-1,2=1:x,3", weights=weights)), before, **CLOSE)


def test_gradients_reach_the_factors() -> None:
    model = own()
    weights, _ = factors(model, ("up", "down"))
    learned = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    with running(model, "0-1,2:x,3", learned):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(t.grad is not None and float(t.grad.abs().max()) > 0 for t in learned.values())


BAD = {
    "one factor": ({"x.mlp.up_proj.up": (64, 2)}, "give one pair, up and down or left and right"),
    "both pairs": (
        {f"x.mlp.up_proj.{w}": s for w, s in {"up": (64, 2), "left": (64, 2), "right": (2, 32)}.items()},
        "give one pair",
    ),
    "another matrix": ({"x.mlp.up_proj.up": (9, 2), "x.mlp.up_proj.down": (2, 32)}, "give \\[out, rank\\]"),
    "two ranks": ({"x.mlp.up_proj.up": (64, 2), "x.mlp.up_proj.down": (3, 32)}, "give \\[out, rank\\]"),
    "a rank above it": ({"x.mlp.up_proj.up": (64, 33), "x.mlp.up_proj.down": (33, 32)}, "give at most 32"),
    "no such module": ({"x.mlp.gone.up": (64, 2), "x.mlp.gone.down": (2, 32)}, "no matrix mlp.gone.weight"),
    "a matrix beside": (
        {"x.mlp.up_proj.left": (64, 2), "x.mlp.up_proj.right": (2, 32), "x.mlp.up_proj.weight": (64, 32)},
        "a matrix of its own and two factors",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_factors_that_do_not_fit_are_refused(case: str) -> None:
    model = own()
    up = find_stack(model).layer(2).mlp.up_proj
    assert up.weight.shape == (64, 32)
    shapes, words = BAD[case]
    with pytest.raises(PlanError, match=words) as caught:
        apply(model, "0-1,2:x,3", {name: torch.zeros(shape) for name, shape in shapes.items()})
    assert caught.value.code == "P129"


def test_modules_have_no_factors() -> None:
    model = own()
    weights, _ = factors(model, ("up", "down"))
    with pytest.raises(PlanError) as caught:
        apply(model, "0-1,2:x,3", weights, modules=True)
    assert caught.value.code == "P157"


def test_the_error_is_the_tail_of_the_singular_values() -> None:
    """Plain; and in the metric of the inputs never above plain truncation there."""
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(12, 20, generator=draw), torch.randn(200, 20, generator=draw) * torch.linspace(0.1, 3, 20)
    s = torch.linalg.svdvals(w.double())
    c = (x.T @ x).double()
    for rank in (1, 4, 11):
        left, right, error = two_factors(w, rank)
        assert error == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-6)
        assert float((w - left @ right).norm() / w.norm()) == pytest.approx(error, rel=1e-4)
        one, other, least = two_factors(w, rank, c)
        there, plain = (float((x @ (w - a @ b).T).norm() / (x @ w.T).norm()) for a, b in ((one, other), (left, right)))
        assert there == pytest.approx(least, rel=1e-3)
        assert there < plain
    left, right, error = two_factors(w, 12, c)
    torch.testing.assert_close(left @ right, w, atol=1e-4, rtol=1e-4)


def test_the_transform_takes_the_matrices_that_become_smaller() -> None:
    """A planted matrix of rank 2 is found exactly; a rank that saves nothing changes nothing, bit for bit."""
    model = own()
    layer = find_stack(model).layer(1)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                out, width = parameter.shape
                parameter.copy_(torch.randn(out, 2, generator=draw) @ torch.randn(2, width, generator=draw) * 0.1)
    plan = Plan.identity(inspect(model))
    want = logits(model)
    for metric in ("inputs", "plain"):
        made = low_rank(Job(model, random_data(4, 16), plan), rank=2, first=1, last=1, metric=metric)  # type: ignore[arg-type]
        assert str(made.plan) == "0,1:low-rank-1,2-3"
        with running(model, made.plan, made.weights):
            torch.testing.assert_close(logits(model), want, **CLOSE)
    same = low_rank(Job(model, random_data(4, 16), plan), rank=40)
    assert same.plan == plan and not same.weights
    half = low_rank(Job(model, random_data(4, 16), plan), rank=4, every=2, part="mlp")
    assert str(half.plan) == "0:low-rank-0,1,2:low-rank-2,3"
    assert all(".mlp." in name for name in half.weights)
