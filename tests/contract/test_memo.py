"""A table in the place of an mlp (`memo`): exact on what it knows, planted clusters, cost, saved and read again."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal.errors import ShoalError
from shoal.executing.bind import bind
from shoal.executing.fitted_map import FittedMap, nearest_entry
from shoal.executing.weights import load_weights, save_planned
from shoal.fitting.result import Job, Transformed
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Map, Plan, check, cost, load_plan, parse_plan, shapes_of

from .families import tiny
from .planted import data_of, random_data
from .shares import every
from .transform_jobs import do, logits, relative

WORDS = 12
"""Different tokens in the planted texts."""


def without_mlp(model: PreTrainedModel, layer: int = 0, **options: Any) -> Job:
    """Dropped is the mlp of one layer."""
    plan = Plan.identity(inspect(model))
    steps = [f"{i}a" if i == layer else str(i) for i in range(plan.depth())]
    return replace(Job(model, random_data(3, 16), parse_plan(",".join(steps), plan)), **options)


def deaf(family: str = "llama") -> PreTrainedModel:
    """Its first attention adds nothing, so its first mlp is given the embeddings of tokens."""
    model = copy.deepcopy(tiny(family))
    for name, module in model.named_modules():
        if name.endswith(("layers.0.self_attn.o_proj", "h.0.attn.c_proj")):
            for parameter in module.parameters():
                parameter.data.zero_()
    return model


def words(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Ids of so many different tokens, each of them there."""
    ids = torch.randint(0, WORDS, (count, length), generator=torch.Generator().manual_seed(seed))
    ids.view(-1)[:WORDS] = torch.arange(WORDS)
    return ids + 3


def of_words(model: PreTrainedModel, made: Transformed | None, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        if made is None:
            return model(input_ids=ids, use_cache=False).logits
        with running(model, made.plan, made.weights):
            return model(input_ids=ids, **{"use_cache": False, **options}).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_with_an_entry_for_each_input_it_is_exact_on_other_text_of_these_inputs(family: str) -> None:
    model, seen = deaf(family), words(3, 16)
    made = do("memo", without_mlp(model, data=data_of(seen)), entries=WORDS, skip_first=0, outlier=float("inf"))
    assert made.weights["map-0-mlp.keys"].shape == made.weights["map-0-mlp.values"].shape == (WORDS, 32)
    assert made.fits[0].stand_in < 1e-10 < made.fits[0].drop
    other = words(4, 20, seed=1)
    assert relative(of_words(model, made, other), of_words(model, None, other)) < 1e-5
    unknown = random_data(4, 20).ids
    assert relative(of_words(model, made, unknown), of_words(model, None, unknown)) > 1e-3


def test_the_error_falls_with_the_entries_and_never_rises_above_dropping() -> None:
    model = tiny("llama")
    given = without_mlp(model, 2, data=random_data(3, 40))
    fits = [do("memo", given, entries=entries, skip_first=0).fits[0] for entries in (1, 4, 16, 64, 120, 500)]
    errors = [fit.stand_in for fit in fits]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] <= fits[0].drop
    assert errors[-1] < 1e-12
    assert fits[-1].note == "120 entries for 120 tokens"


def test_planted_clusters_are_found() -> None:
    """Twelve tokens whose embeddings are three directions, of several lengths: the norm in front leaves three."""
    model = deaf()
    table = model.get_input_embeddings().weight.data
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 32, generator=draw)
    for word in range(WORDS):
        noise = torch.randn(32, generator=draw) / 1000
        table[3 + word] = (centres[word % 3] + noise) * (1 + word / 3)
    given = without_mlp(model, data=data_of(words(3, 16)))
    found = {entries: do("memo", given, entries=entries, skip_first=0) for entries in (2, 3)}
    drop = found[3].fits[0].drop
    assert found[3].fits[0].stand_in < 1e-4 * drop and found[2].fits[0].stand_in > 1e-2 * drop
    keys = found[3].weights["map-0-mlp.keys"]
    labels = nearest_entry(table[3 : 3 + WORDS], keys)
    assert [int(labels[i]) for i in range(WORDS)] == [int(labels[i % 3]) for i in range(WORDS)]
    assert len(set(labels[:3].tolist())) == 3


def test_what_a_table_computes() -> None:
    keys = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    table = {"keys": keys, "values": torch.tensor([[10.0, 0.0], [0.0, 20.0]])}
    x = torch.tensor([[[3.0, 1.0], [0.1, -0.2], [0.0, 0.0], [-5.0, -6.0]]])
    moved = torch.tensor([[[10.0, 0.0], [0.0, 20.0], [10.0, 0.0], [0.0, 20.0]]])
    assert torch.equal(FittedMap(table)(x), x + moved)
    near = FittedMap(table | {"limit": torch.tensor([5.0])})(x)
    assert torch.equal(near[:, :3], (x + moved)[:, :3]) and torch.equal(near[:, 3], x[:, 3])
    half = FittedMap(table)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half, x.bfloat16() + moved.bfloat16())


@pytest.mark.parametrize("family", every(3, ["llama", "gpt2", "mixtral", "qwen2", "phi", "olmo2", "gemma3_text"]))
def test_cached_is_uncached_and_padding_changes_nothing(family: str) -> None:
    model = tiny(family)
    made = do("memo", without_mlp(model, 1), entries=8)
    ids = random_data(2, 12, seed=5).ids
    whole = of_words(model, made, ids)
    with torch.no_grad(), running(model, made.plan, made.weights):
        first = model(input_ids=ids[:, :7], use_cache=True)
        then = model(input_ids=ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat([first.logits, then.logits], 1), whole, atol=1e-4)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = of_words(model, made, padded, attention_mask=mask, position_ids=positions)
    assert torch.allclose(found[:, 3:], whole, atol=1e-4)


def test_a_saved_table_is_the_live_one(tmp_path: Path) -> None:
    model = tiny("llama")
    made = do("memo", without_mlp(model, 1), entries=8)
    place = save_planned(made.plan, tmp_path / "kept", made.weights)
    again = Transformed(load_plan(place), load_weights(place))
    assert again.plan == made.plan and isinstance(again.plan.steps()[2], Map)
    assert torch.equal(logits(model, again), logits(model, made))


def test_cost_counts_the_table_and_the_product_with_its_keys() -> None:
    model = tiny("llama")
    spec, given = inspect(model), without_mlp(model, 1)
    made = do("memo", given, entries=8)
    dropped, priced = cost(given.plan, spec), cost(made.plan, spec, weights=shapes_of(made.weights))
    assert priced.params - dropped.params == 2 * 8 * 32 + 1
    assert priced.decode_flops - dropped.decode_flops == 2 * 8 * 32
    assert not priced.assumed


def test_of_a_table_that_learns_the_values_move() -> None:
    import shoal

    model = copy.deepcopy(tiny("llama"))
    made = do("memo", without_mlp(model, 1), entries=8)
    handle = shoal.apply(model, made.plan, made.weights, modules=True)
    ids = random_data(2, 12).ids
    model(input_ids=ids, labels=ids).loss.backward()
    learning = {name: p for name, p in model.named_parameters() if "map-1-mlp" in name}
    assert list(learning) == ["shoal.tensors.map-1-mlp.values"]
    assert float(learning["shoal.tensors.map-1-mlp.values"].grad.abs().sum()) > 0
    handle.restore()


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"bias": (32,)}, "P112"),
        ({"keys": (4, 32)}, "P113"),
        ({"values": (4, 32), "scale": (32,)}, "P113"),
        ({"keys": (4, 32), "values": (4, 32), "bias": (32,)}, "P113"),
        ({"keys": (4, 32), "values": (5, 32)}, "P113"),
        ({"keys": (4, 31), "values": (4, 31)}, "P113"),
        ({"keys": (0, 32), "values": (0, 32)}, "P113"),
        ({"keys": (32,), "values": (32,)}, "P113"),
        ({"keys": (4, 32), "values": (4, 32), "weight": (32, 32)}, "P113"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tensors: dict[str, tuple[int, ...]], code: str) -> None:
    model = tiny("llama")
    plan = parse_plan("0,1a,~1:t,2-3", Plan.identity(inspect(model)))
    given = {f"t.{name}": torch.zeros(shape) for name, shape in tensors.items()}
    assert {one.code for one in check(plan, inspect(model), shapes_of(given))} == {code}
    with pytest.raises(ShoalError, match=code):
        bind(model, plan, given)
