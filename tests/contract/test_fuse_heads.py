"""The transform `fuse-heads`: heads of keys and values of one layer in groups, each fused into one."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import shoal.auto  # noqa: F401 - tells transformers of planned checkpoints
from shoal.errors import UsageError
from shoal.fitting.head_groups import cheapest_groups
from shoal.fitting.result import Job, Transformed
from shoal.live import running
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, parse_plan, shapes_of
from shoal.transforms.fuse_heads import fuse_heads
from shoal.writing.planned_folder import write_planned

from .families import VOCAB, tiny
from .planted import random_data
from .references import CLOSE

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
HEADS, DIM = 4, 8
ENDS = ((0, 5), (5, 6), (6, 9))
FAMILIES = ["llama", "qwen2", "mistral", "gemma2", "starcoder2", "granite", "phi"]
EXACT = {"atol": 1e-4, "rtol": 1e-4}
"""Through a Cholesky root and its inverse in float64, of moments of few tokens."""


def many_heads(family: str) -> PreTrainedModel:
    """Two layers of four heads of queries, keys and values each."""
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=DIM, max_position_embeddings=64, pad_token_id=0,
        sliding_window=32 if family == "gemma2" else None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.15) if parameter.dim() > 1 else parameter.add_(0.0 if "norm" in name else 0.05)
    return model


def rows(model: PreTrainedModel, what: str, layer: int = 1) -> list[torch.Tensor]:
    """The weight, and the bias where there is one, that makes queries, keys or values: [heads, dim, inputs]."""
    module = find_stack(model).layer(layer).self_attn.get_submodule(f"{what}_proj")
    return [p.data.unflatten(0, (HEADS, DIM)) for p in module.parameters()]


def twins(family: str, *, turned: bool) -> PreTrainedModel:
    """Heads 0 and 2, and 1 and 3, of layer 1 make the same keys and values: or, `turned`, the same up to what a head
    may turn without a change."""
    model = many_heads(family)
    draw = torch.Generator().manual_seed(3)
    for source, twin in ((0, 2), (1, 3)):
        change = {"v": torch.eye(DIM), "k": torch.eye(DIM)}
        if turned:
            half, (re, im) = DIM // 2, (0.5 + torch.rand(2, DIM // 2, generator=draw)).unbind()
            change["v"] = torch.linalg.qr(torch.randn(DIM, DIM, generator=draw))[0] * 1.5
            at = torch.arange(half)
            change["k"] = torch.zeros(DIM, DIM)
            change["k"][at, at] = change["k"][at + half, at + half] = re
            change["k"][at, at + half], change["k"][at + half, at] = -im, im
        for what, matrix in change.items():
            for part in rows(model, what):
                part[twin] = torch.einsum("ij,j...->i...", matrix, part[source])
    return model


def job(model: PreTrainedModel, plan: str = "0-1", **weights: torch.Tensor) -> Job:
    return Job(model, random_data(6, 24), parse_plan(plan, Plan.identity(open_model(model).spec)), weights)


def logits(model: Any, **batch: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**({"input_ids": IDS, "use_cache": False} | batch)).logits
    return found


def under(model: PreTrainedModel, made: Transformed) -> torch.Tensor:
    with running(model, made.plan, made.weights):
        return logits(model)


@pytest.mark.parametrize("how", ["aligned", "average"])
@pytest.mark.parametrize("family", FAMILIES)
def test_twins_are_fused_without_a_loss(family: str, how: Any, tmp_path: Path) -> None:
    """Wherever they stand; live, cached, in a planned checkpoint, in half the rows of the cache."""
    model = twins(family, turned=False)
    want = logits(model)
    made = fuse_heads(job(model), heads=2, layers="1", how=how)
    assert str(made.plan) == "0,1:fuse-heads-1"
    assert "1: 0+2, 1+3; 0.0% of what its keys do is lost, 0.0% of its values" in made.notes[0]
    apart = fuse_heads(job(model), heads=2, layers="1", how=how, groups="neighbours")
    assert "1: 0+1, 2+3; " in apart.notes[0]
    assert not torch.allclose(under(model, apart), want, atol=1e-2)
    with running(model, made.plan, made.weights):
        torch.testing.assert_close(logits(model), want, **EXACT)
        cache = DynamicCache(config=model.config)
        pieces = [logits(model, input_ids=IDS[:, a:b], past_key_values=cache, use_cache=True) for a, b in ENDS]
        torch.testing.assert_close(torch.cat(pieces, 1), want, **EXACT)
        assert [row.keys.shape[1] for row in cache.layers] == [HEADS, HEADS // 2]
    spec = open_model(model).spec
    priced = cost(made.plan, spec, weights=shapes_of(made.weights))
    assert priced.kv_per_token == 2 * DIM * (HEADS + HEADS // 2)
    assert priced.params == write_planned(model, made.plan, tmp_path / "m", weights=made.weights, prove=False).params
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    torch.testing.assert_close(logits(loaded), under(model, made), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi"])
def test_twins_that_are_turned_need_the_way_back(family: str) -> None:
    if family == "phi":  # half of a head's channels are turned by positions there, and the others by none
        model = twins(family, turned=False)
        for part in rows(model, "v"):
            part[2] = torch.einsum("ij,j...->i...", 1.5 * torch.eye(DIM).flip(0), part[0])
    else:
        model = twins(family, turned=True)
    want = logits(model)
    found = {how: fuse_heads(job(model), heads=2, layers="1", how=how) for how in ("aligned", "average")}  # type: ignore[arg-type]
    assert "1: 0+2, 1+3; 0.0% of what its keys do is lost, 0.0% of its values" in found["aligned"].notes[0]
    torch.testing.assert_close(under(model, found["aligned"]), want, **EXACT)
    assert not torch.allclose(under(model, found["average"]), want, atol=1e-2)


@pytest.mark.parametrize("how", ["aligned", "average"])
def test_as_many_heads_as_there_are_change_nothing(how: Any) -> None:
    made = fuse_heads(job(many_heads("llama")), heads=HEADS, how=how)
    assert made.plan.is_identity() and not made.weights


@pytest.mark.parametrize("heads", [1, 2])
def test_the_mean_of_neighbours_is_the_conversion_to_grouped_queries(heads: int) -> None:
    model = many_heads("llama")
    made = fuse_heads(job(model), heads=heads, how="average", groups="neighbours", layers="1")
    for what in ("k", "v"):
        mean = rows(model, what)[0].unflatten(0, (heads, -1)).mean(1).flatten(0, 1)
        torch.testing.assert_close(made.weights[f"fuse-heads-1.self_attn.{what}_proj.weight"], mean)
    for name in ("q_proj", "o_proj"):
        held = find_stack(model).layer(1).self_attn.get_submodule(name).weight
        torch.testing.assert_close(made.weights[f"fuse-heads-1.self_attn.{name}.weight"], held.detach())


@pytest.mark.parametrize("seed", range(4))
def test_alike_heads_are_found(seed: int) -> None:
    """The best groups of six heads by brute force, never dearer than neighbours."""
    draw = np.random.default_rng(seed)
    costs = draw.random((6, 6))
    costs = costs + costs.T

    def total(groups: Any) -> float:
        return sum(costs[a, b] for group in groups for a, b in itertools.combinations(group, 2))

    for made in (2, 3):
        size = 6 // made
        orders = itertools.permutations(range(6))
        best = min(total([order[at : at + size] for at in range(0, 6, size)]) for order in orders)
        found = cheapest_groups(costs, made)
        neighbours = [tuple(range(at, at + size)) for at in range(0, 6, size)]
        assert sorted(head for group in found for head in group) == list(range(6))
        assert best <= total(found) + 1e-9 <= total(neighbours) + 2e-9
    hidden = draw.permutation(6).reshape(3, 2)
    for a, b in hidden:
        costs[a, b] = costs[b, a] = 0.0
    assert total(cheapest_groups(costs + 1 - np.eye(6), 3)) == 0, "of three pairs that lose nothing none is missed"


def test_aligned_loses_least_on_any_model() -> None:
    model = copy.deepcopy(tiny("llama", "eager"))
    want = logits(model)
    plans = [fuse_heads(job(model, "0-3"), heads=1, how=how) for how in ("aligned", "average")]  # type: ignore[arg-type]
    errors = [float((under(model, made) - want).norm()) for made in plans]
    assert errors[0] < errors[1]
    assert len(plans[0].notes) == 4


REFUSED = {
    "no divisor": ("llama", "0-3", {"heads": 3}, "U689", "does not divide the 2 heads"),
    "a norm on keys": ("qwen3", "0-3", {"heads": 1, "layers": "1"}, "U668", "layer 1"),
    "one matrix for all": ("gpt2", "0-3", {"heads": 1}, "U668", "layer 0"),
    "read by another": ("llama", "0,1,2@1,3", {"heads": 1, "layers": "1"}, "U667", "fuse first, and share then"),
    "a reader": ("llama", "0,1,2@1,3", {"heads": 1, "layers": "2"}, "U667", "keys and values of its own"),
    "all heads or none": ("stablelm", "0-3", {"heads": 1}, "U668", "layer 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fused_is_refused(case: str) -> None:
    family, plan, options, code, words = REFUSED[case]
    with pytest.raises(UsageError, match=words) as caught:
        fuse_heads(job(tiny(family, "eager"), plan), **options)  # type: ignore[arg-type]
    assert caught.value.code == code
