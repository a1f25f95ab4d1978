"""LCKV's plan of the built-in model: of its thirty layers two store keys and values, and the last one's are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import shoal
from shoal.models.checkpoint import tensor_headers
from shoal.models.load import Loaded
from shoal.models.opened import open_model
from shoal.plan import Plan, cost, parse_plan
from shoal.planned import save_checkpoint

LCKV = "0,1-28@29,29"
PARAMS, KV_PER_TOKEN = 128_321_856, 768


def test_its_counts_are_those_of_the_cost_the_cache_and_the_file(smollm2: Loaded, tmp_path: Path) -> None:
    opened = open_model(smollm2.model)
    model: Any = opened.model
    price = cost(LCKV, opened.spec)
    assert (price.params, price.kv_per_token) == (PARAMS, KV_PER_TOKEN)
    ids = smollm2.tokenizer("The capital of France is Paris", return_tensors="pt")["input_ids"]
    with shoal.running(model, LCKV) as handle, torch.no_grad():
        cache = DynamicCache(config=model.config)
        prompt = model(ids, past_key_values=cache, use_cache=True).logits
        assert handle.passes is not None and handle.passes.exact and handle.passes.ran <= ids.shape[1]
        held = sum(row.keys.numel() + row.values.numel() for row in cache.layers if row.keys is not None)
        assert held == KV_PER_TOKEN * ids.numel()
        cache = DynamicCache(config=model.config)
        single = [model(one[:, None], past_key_values=cache, use_cache=True).logits for one in ids.unbind(1)]
    torch.testing.assert_close(torch.cat(single, 1), prompt, atol=1e-2, rtol=1e-3)
    save_checkpoint(tmp_path, opened, parse_plan(LCKV, Plan.identity(opened.spec)), {})
    sizes = [torch.Size(shape).numel() for _, shape in tensor_headers(tmp_path).values()]
    assert sum(sizes) == PARAMS
