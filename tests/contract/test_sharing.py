"""Keys, values and attention maps that layers share: planted maps are found, null settings are exact, refusals."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from shoal.errors import ShoalError
from shoal.fitting.map_blocks import blocks_with, grown_blocks
from shoal.fitting.match_heads import best_places, put_in_places
from shoal.fitting.result import Transformed
from shoal.fitting.sharing import cheapest_apart, listed_groups, patterned_groups
from shoal.live import running
from shoal.models.head_channels import projections_of
from shoal.models.inspect import inspect
from shoal.models.opened import open_model
from shoal.models.projections import HeadMatrices, Projections
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, parse_plan
from shoal.recording.kv_means import kv_distances, mean_kv

from .planted import data_of, random_data
from .references import CLOSE
from .test_heads import known, model_of
from .transform_jobs import do, job, logits, relative

QUIET = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "fc2")
"""What the mlps of the families below write with."""


def planted_pair(family: str) -> PreTrainedModel:
    """Layer 1 adds nothing, so that 2 is given what 1 is given; 2 makes 1's keys and values under random maps."""
    model = copy.deepcopy(model_of(family))
    layers = open_model(model).stack()
    one, two = layers.layer(1), layers.layer(2)
    queries = {n: p.clone() for n, p in two.named_parameters()}
    two.load_state_dict(one.state_dict())
    found, scores = known(model, 2)
    own, draw = HeadMatrices(two, found), torch.Generator().manual_seed(4)
    fresh = HeadMatrices(two, found, queries)
    for head in range(len(scores.queries.channels)):
        own.put_rows(scores.queries, head, fresh.rows(scores.queries, head))
        own.put_columns(head, fresh.columns(head))
    for head in range(len(scores.keys.channels)):
        keys = own.rows(scores.keys, head)
        for a, b in scores.pairs:
            re, im = torch.randn(2, generator=draw).tolist()
            keys[[a, b]] = torch.stack([re * keys[a] - im * keys[b], im * keys[a] + re * keys[b]])
        plain = list(scores.plain)
        keys[plain] = torch.randn(len(plain), len(plain), generator=draw, dtype=torch.float64) @ keys[plain]
        own.put_rows(scores.keys, head, keys)
        values = own.rows(found.values, head)
        change = torch.randn(len(values), len(values), generator=draw, dtype=torch.float64)
        own.put_rows(found.values, head, change @ values)
    with torch.no_grad():
        for name, tensor in own.rewritten(source=True).items():
            two.get_parameter(name).copy_(tensor)
        for name, tensor in one.named_parameters():
            if name.startswith((found.output.module, *QUIET)):
                tensor.zero_()
    return model


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "phi3", "gpt_neox", "opt"])
def test_a_random_map_between_two_layers_is_found(family: str, weighted: bool) -> None:
    model = planted_pair(family)
    given = job(model, [])
    made = do("share-kv", given, pairs="1-2", weighted=weighted)
    assert str(made.plan) == "0,1:share-kv-1,2@1:share-kv-2,3"
    assert relative(logits(model, made), logits(model)) < 1e-3
    for how in ("average", "first"):
        assert relative(logits(model, do("share-kv", given, pairs="1-2", how=how)), logits(model)) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_sharing_nothing_is_bit_exact(family: str) -> None:
    model = model_of(family)
    given = job(model, [])
    nothing = (
        ("share-kv", {"pattern": "groups", "group": 1}),
        ("share-kv", {"pattern": "last", "readers": 0}),
        ("share-maps", {"span": "none"}),
    )
    for name, options in nothing:
        made = do(name, given, **options)
        assert made == Transformed(given.plan, {})
        assert torch.equal(logits(model, made), logits(model))


def test_patterns_and_lists() -> None:
    def said(family: str, text: str = "0-3", **options: Any) -> Any:
        spec = inspect(model_of(family))
        return patterned_groups(parse_plan(text, Plan.identity(spec)), spec.stack(), what="share-kv", **options)

    assert said("llama", pattern="pairs") == ((0, 1), (2, 3))
    assert said("llama", "0,2-3", pattern="pairs") == ((0, 2),)
    assert said("llama", "0-1,2m,3", pattern="pairs") == ((0, 1),)
    assert said("llama", pattern="groups", group=3) == ((0, 1, 2),)
    assert said("llama", pattern="last", readers=3) == ((0, 1, 2, 3),)
    assert said("qwen2", pattern="pairs") == ((0, 2), (1, 3)), "full and sliding layers are paired among themselves"
    assert said("jamba", pattern="pairs") == ((1, 3),)
    assert listed_groups("4-5 + 9-10-11", "x") == ((4, 5), (9, 10, 11))


def test_pairs_apart_are_the_cheapest() -> None:
    costs = {(0, 1): 5.0, (1, 2): 1.0, (2, 3): 5.0, (4, 6): 2.0, (5, 7): 3.0}
    assert cheapest_apart(costs, 1) == ((1, 2),)
    assert cheapest_apart(costs, 3) == ((1, 2), (4, 6), (5, 7))
    assert cheapest_apart(costs, 4) == ((0, 1), (2, 3), (4, 6), (5, 7)), "the cheapest of all stands in the way"
    assert cheapest_apart(costs, 5) == ()


def test_a_group_of_three_and_gemmas_last_layers_run() -> None:
    model = model_of("llama")
    spec, given = open_model(model).spec, job(model, [])
    three = do("share-kv", given, pattern="groups", group=3)
    assert str(three.plan) == "0:share-kv-0,1@0:share-kv-1,2@0:share-kv-2,3"
    last = do("share-kv", given, pattern="last", readers=2)
    assert str(last.plan) == "0,1:share-kv-1,2@1:share-kv-2,3@1:share-kv-3"
    for made in (three, last):
        assert logits(model, made).isfinite().all()
        assert cost(made.plan, spec).kv_per_token == cost(given.plan, spec).kv_per_token // 2
        assert len(made.notes) == 3
    mixed = model_of("gemma2")
    made = do("share-kv", job(mixed, []), pattern="last", readers=2)
    assert [run.kv.read for run in made.plan.steps()] == [None, None, 0, 1]  # type: ignore[union-attr]


def test_the_average_is_the_mean_of_the_matrices() -> None:
    model = model_of("llama")
    layers = find_stack(model)
    made = do("share-kv", job(model, []), pairs="0-1", how="average")
    assert str(made.plan) == "0:share-kv-0,1@0,2-3"
    for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        both = [layers.layer(i).get_parameter(name) for i in (0, 1)]
        torch.testing.assert_close(made.weights[f"share-kv-0.{name}"], (both[0] + both[1]) / 2)
    assert len(made.weights) == 2
    fused = model_of("gpt2")
    made = do("share-kv", job(fused, []), pairs="0-1", how="average")
    own, other = (find_stack(fused).layer(i).get_parameter("attn.c_attn.weight") for i in (0, 1))
    found = made.weights["share-kv-0.attn.c_attn.weight"]
    torch.testing.assert_close(found[:, 32:], (own + other)[:, 32:] / 2)
    torch.testing.assert_close(found[:, :32], own[:, :32])
    normed = do("share-kv", job(model_of("qwen3"), []), pairs="0-1", how="average")
    assert logits(model_of("qwen3"), normed).isfinite().all()


def test_a_layer_keeps_tensors_that_it_had_and_padding_is_not_read() -> None:
    model, data = model_of("llama"), random_data(8, 20)
    norm = torch.full((32,), 2.0)
    given = replace(
        job(model, [], data=data), plan=parse_plan("0-1,2:mine,3", Plan.identity(inspect(model))),
        weights={"mine.input_layernorm.weight": norm},
    )  # fmt: skip
    made = do("share-kv", given, pairs="1-2")
    assert torch.equal(made.weights["share-kv-2.input_layernorm.weight"], norm)
    mask = torch.zeros_like(data.ids)
    mask[:, :12] = 1
    bare = do("share-kv", job(model, [], data=data_of(data.ids[:, :12])), pairs="1-2")
    padded = do("share-kv", job(model, [], data=data_of(data.ids * mask, mask)), pairs="1-2")
    assert all(relative(padded.weights[name], bare.weights[name]) < 1e-3 for name in bare.weights)


REFUSED = [
    ("share-kv", "qwen3", {"pairs": "0-1"}, "U668", "norm"),
    ("share-kv", "deepseek_v3", {"pairs": "2-3", "how": "average"}, "U668", "modules make keys and values"),
    ("share-kv", "falcon", {"pairs": "0-1"}, "U668", "works its attention out itself"),
    ("share-kv", "smollm3", {"pairs": "1-2"}, "U668|P108", "turn|differ"),
    ("share-kv", "qwen2", {"pairs": "0-1"}, "P108", "differ"),
    ("share-kv", "mamba2", {"pairs": "0-1"}, "U667", "layer 0 must run once"),
    ("share-maps", "falcon", {"span": "2-3"}, "U668", "works its attention out itself"),
]


@pytest.mark.parametrize(("name", "family", "options", "code", "words"), REFUSED)
def test_what_the_closed_form_does_not_know_is_refused(
    name: str, family: str, options: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(ShoalError, match=words) as caught:
        do(name, job(model_of(family), []), **options)
    assert caught.value.code in code.split("|")


def test_places_keep_groups_together_and_are_the_best() -> None:
    draw = np.random.default_rng(1)
    for heads, group in ((4, 2), (6, 2), (6, 3), (4, 1)):
        distances = draw.random((heads, heads))
        found = best_places(distances, group)
        legal = [
            order
            for order in itertools.permutations(range(heads))
            if all(len({order[h] // group for h in range(at, at + group)}) == 1 for at in range(0, heads, group))
        ]
        best = min(legal, key=lambda order: sum(distances[h, p] for h, p in enumerate(order)))
        assert tuple(found) == best


def follower(family: str) -> tuple[PreTrainedModel, Projections]:
    """Layer 1 adds nothing, so that 2 is given what 1 is given, and 2 makes 1's attention maps."""
    model = copy.deepcopy(model_of(family))
    one, two = (find_stack(model).layer(i) for i in (1, 2))
    values = {n: p.clone() for n, p in two.named_parameters()}
    two.load_state_dict(one.state_dict())
    found = projections_of(open_model(model), [2])[2]
    assert isinstance(found, Projections)
    own, fresh = HeadMatrices(two, found), HeadMatrices(two, found, values)
    for head in range(len(found.values.channels)):
        own.put_rows(found.values, head, fresh.rows(found.values, head))
    for head in range(len(found.output.channels)):
        own.put_columns(head, fresh.columns(head))
    put(two, own.written(found.values, found.output))
    put(one, {n: 0 * p for n, p in one.named_parameters() if n.startswith((found.output.module, *QUIET))})
    return model, found


@torch.no_grad()
def put(layer: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        layer.get_parameter(name).copy_(tensor)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi3"])
def test_a_follower_with_the_same_maps_is_exact(family: str) -> None:
    model, _ = follower(family)
    made = do("share-maps", job(model, []), span="2")
    assert str(made.plan) == "0-1,2@a1,3"
    assert relative(logits(model, made), logits(model)) < 1e-5
    assert not made.weights
    assert "0 of 4 heads moved" in made.notes[0]


def test_heads_that_were_exchanged_are_found_again() -> None:
    model, found = follower("llama")
    before, two = logits(model), find_stack(model).layer(2)
    places = [3, 2, 1, 0]
    order = [places.index(place) for place in range(4)]
    put(two, put_in_places(HeadMatrices(two, found), places))
    queries, keys = (two.get_parameter(f"self_attn.{name}_proj.weight").detach().clone() for name in "qk")
    put(two, {"self_attn.q_proj.weight": queries.view(4, 8, 32)[order].reshape(32, 32)})
    put(two, {"self_attn.k_proj.weight": keys.view(2, 8, 32)[[1, 0]].reshape(16, 32)})
    assert relative(logits(model), before) < 1e-5, "all four matrices went with the heads"
    made = do("share-maps", job(model, []), span="2")
    assert "4 of 4 heads moved" in made.notes[0]
    assert relative(logits(model, made), before) < 1e-5
    assert relative(logits(model, do("share-maps", job(model, []), span="2", matched=False)), before) > 1e-2


def test_blocks_of_like_maps() -> None:
    alike = [[1.0, 0.9, 0.2, 0.2], [0.9, 1.0, 0.3, 0.2], [0.2, 0.3, 1.0, 0.8], [0.2, 0.2, 0.8, 1.0]]
    assert grown_blocks(alike, range(4), 0.85) == ((0, 1),)
    assert grown_blocks(alike, range(4), 0.7) == ((0, 1), (2, 3))
    assert grown_blocks(alike, range(4), 0.0) == ((0, 1, 2, 3),)
    assert blocks_with(alike, range(4), 1) == (((0, 1),), 0.9)
    assert blocks_with(alike, range(4), 2)[0] == ((0, 1), (2, 3))
    assert blocks_with(alike, range(4), 4) == ((), -float("inf"))


def test_mean_keys_and_values_are_those_of_the_cache() -> None:
    model, data = model_of("llama"), random_data(4, 12)
    means = mean_kv(model, data.batches(2), what="test", before=lambda _: None)
    with torch.no_grad():
        rows = model(input_ids=data.ids, use_cache=True).past_key_values.layers
    for layer, (keys, values) in means.items():
        torch.testing.assert_close(keys, rows[layer].keys.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values, rows[layer].values.mean(0), atol=1e-5, rtol=1e-4)
    wanted = [(a - b).norm(dim=-1).mean() for a, b in zip(means[3], means[1], strict=True)]
    assert kv_distances(means)[3, 1] == pytest.approx(float(sum(wanted)) / 2)
    padded = data_of(torch.cat([data.ids, data.ids], 1), torch.cat([torch.ones_like(data.ids), 0 * data.ids], 1))
    half = mean_kv(model, padded.batches(4), what="test", before=lambda _: None)
    torch.testing.assert_close(half[2][0][:, :12], means[2][0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [("share-kv", {"pairs": "1-2-3"}), ("share-maps", {"span": "2-3"})])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_cached_and_padded_passes_are_one_pass(family: str, options: tuple[str, dict[str, Any]]) -> None:
    model, ids = copy.deepcopy(model_of(family)), random_data(2, 9, seed=5).ids
    made = do(options[0], job(model, []), **options[1])
    with running(model, made.plan, made.weights), torch.no_grad():
        want, cache = model(input_ids=ids, use_cache=False).logits, DynamicCache(config=model.config)
        pieces = [
            model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True).logits
            for a, b in ((0, 5), (5, 6), (6, 9))
        ]
        padded, mask = torch.cat([torch.zeros(2, 3).long(), ids], 1), torch.ones(2, 12).long()
        mask[:, :3] = 0
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        left = model(input_ids=padded, attention_mask=mask, position_ids=place, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(torch.cat(pieces, 1), want, **CLOSE)
    torch.testing.assert_close(left, want, **CLOSE)
