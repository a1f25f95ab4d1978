"""The fill project: a layer that is called for its keys and values alone stores what the whole layer stores."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from shoal.deciding.kv_projection import projections_of
from shoal.live import running
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack

from .families import DEPTH, FAMILIES, tiny
from .policy_cells import LENGTH, batch_of
from .shares import every
from .test_policies import NO_STATIC, RECURRENT, attention_of

TO_THE_END = {
    # they work their attention out themselves
    **{family: [0, 1, 2, 3] for family in ("bloom", "falcon", "gpt_neo", "gptj")},
    "gemma3n_text": [2, 3],  # these read the keys and values of others and store none
}
"""Layers that run whole where project is asked for, since nothing less is proved: right, but nothing is saved."""
CALLS = ((0, 7), (7, 9), (9, 10), (10, 12))


def stored(model: Any, rows: int, cache: str, whole: bool) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Any]:
    """Keys and values of every row under an exit behind layer 0, and the counts; `whole`: by the layers as they are."""
    batch, config = batch_of(rows), model.config
    past: Cache = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=16)
    with running(model, "0-3", policy="exit:after=0,prefill=true") as handle:
        assert handle.deciding is not None
        if whole:
            handle.deciding.known.projections = [None] * DEPTH
        for start, end in CALLS:
            ids, mask = batch["input_ids"][:, start:end], batch["attention_mask"][:, :end]
            model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)
        counts = handle.trace.counts
    return [(row.keys, row.values) for row in past.layers if getattr(row, "keys", None) is not None], counts


@torch.no_grad()
@pytest.mark.parametrize("family", every(2, [family for family in FAMILIES if family not in RECURRENT]))
def test_keys_and_values_alone_are_those_of_the_whole_layer(family: str) -> None:
    """Bit for bit, in a prefill, a chunk and single tokens, alone and in a left-padded batch, with both caches."""
    model = tiny(family, attention_of(family))
    found = projections_of(open_model(model))
    assert [layer for layer, one in enumerate(found) if one is None] == TO_THE_END.get(family, [])
    for rows in (1, 2):
        for cache in ("dynamic", "static") if family not in NO_STATIC else ("dynamic",):
            alone, counts = stored(model, rows, cache, whole=False)
            right, full = stored(model, rows, cache, whole=True)
            assert len(alone) == len(right)
            for one, other in zip(alone, right, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), (rows, cache)
            projected = [layer for layer in range(1, DEPTH) if found[layer] is not None]
            assert counts.projected == len(projected) * rows * LENGTH
            assert full.projected == 0
            assert not set(counts.layers) & set(projected), "a layer that is not run to its end is not counted"
            assert full.to_dict()["simulated"] > 0


@torch.no_grad()
def test_what_is_not_computed_is_not_heard_and_all_is_put_back() -> None:
    """Hooks on a projected layer hear of its keys and values, and nothing behind them; a failure leaves no trace."""
    model = copy.deepcopy(tiny("llama"))
    stack, heard = find_stack(model), set[str]()
    for name, module in model.model.layers[3].named_modules():
        module.register_forward_hook(lambda *_, name=name: heard.add(name))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with running(model, "0-3", policy="exit:after=1,prefill=true"):
        heard.clear()  # the layer was called whole while it was looked at
        model(batch_of(1)["input_ids"], use_cache=True)
        assert heard == {"input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
        broken = stack.layer(3).self_attn.k_proj
        handle = broken.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(batch_of(1)["input_ids"], use_cache=True)
        handle.remove()
    for name, module in model.named_modules():
        now = vars(module)
        assert all(now[key] is value for key, value in before[name].items() if key in ("_modules", "config")), name
        assert now.keys() >= before[name].keys() - {"layers"}
    assert type(stack.layer(3).mlp) is type(stack.layer(0).mlp)


@torch.no_grad()
@pytest.mark.parametrize("part", ["", "a"])
def test_a_run_with_tensors_of_its_own_projects_through_them(part: str) -> None:
    """The plan's own matrices make the keys, and those of what is left out, replaced as well, do no harm."""
    model = copy.deepcopy(tiny("llama"))
    named = find_stack(model).layer(3).named_parameters()
    own = {f"mine.{name}": torch.randn_like(p) for name, p in named if name.endswith("_proj.weight")}
    plan = f"0-1,!e?exit,2/project,3{part}:mine/project"
    rows = []
    for weights in (own, own, {name: 2 * tensor for name, tensor in own.items()}):
        past = DynamicCache(config=model.config)
        with running(model, plan, weights, policy="exit:confidence=0,prefill=true") as handle:
            assert handle.deciding is not None
            if rows:
                handle.deciding.known.projections = [None] * DEPTH
            model(batch_of(1)["input_ids"], past_key_values=past, use_cache=True)
        rows.append(past.layers[3])
    assert torch.equal(rows[0].keys, rows[1].keys)
    assert torch.equal(rows[0].values, rows[1].values)
    assert not torch.equal(rows[1].values, rows[2].values)
