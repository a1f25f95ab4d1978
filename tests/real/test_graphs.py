"""Graphs and moved bytes on the built-in model."""

from __future__ import annotations

from typing import Any

import torch

from shoal.api.prompts import encoded
from shoal.decoding.arguments import GREEDY
from shoal.graphs import fused
from shoal.plan import Shape
from shoal.plan.moved import moved

LAYER, MLP, HEAD, KV = 3_538_944, 2_654_208, 28_311_552, 11_520
"""Elements of a layer's matrices, of its mlp, of the tied head, of keys and values for one token of all layers."""


def test_the_text_is_the_same_and_the_weights_come_back(smollm2: Any) -> None:
    model, inputs = smollm2.model, encoded(smollm2, "Count from one to five.", None)
    asked = GREEDY | {"max_new_tokens": 8}
    want, norm = model.generate(**inputs, **asked), model.model.layers[3].input_layernorm.weight
    before = norm.detach().clone()
    with fused(model, "norms", "siblings") as handle:
        assert torch.equal(norm, torch.ones_like(norm))
        assert [graph.replaced for graph in handle.graphs] == [60, 150]
        assert set(handle.graphs[0].left) == {"model.norm"}, "the tied head reads it"
        have = model.generate(**inputs, **asked)
    assert model.dtype != torch.float32 or torch.equal(have, want)
    assert torch.equal(norm, before) and torch.equal(model.generate(**inputs, **asked), want)


def test_the_bytes_of_a_decode_step(smollm2: Any) -> None:
    spec, shape = smollm2.opened.spec, Shape(context=512)
    whole = moved("0-29", spec, shape, dtype="bfloat16")
    assert (whole.weights, whole.kv) == (2 * (30 * LAYER + HEAD), 2 * 512 * KV)
    one_mlp = ",".join(f"{i}a,0m" for i in range(30))
    assert moved(one_mlp, spec, shape, dtype="bfloat16").total == whole.total
    room = 2 * (LAYER + 512 * KV // 30)
    kept = moved(one_mlp, spec, shape, dtype="bfloat16", cache_bytes=room)
    assert (kept.near, kept.total) == (29 * 2 * MLP, whole.total - 29 * 2 * MLP)
    pairs = ",".join(str(i) if i % 2 == 0 else f"{i}@{i - 1}" for i in range(30))
    assert moved(pairs, spec, shape, dtype="bfloat16").kv == whole.kv, "every reader reads"
