"""Anchors: which tokens of the prompt are held, at which positions later ones attend to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.compressing.cache import make_cache
from shoal.errors import ShoalError
from shoal.evaluation.memory import values_held

from .families import tiny
from .policy_cells import LENGTH, batch_of

PROMPT = 8


@torch.no_grad()
def by_mask(model: Any, ids: torch.Tensor, held: list[int]) -> torch.Tensor:
    """Logits of one pass in which tokens behind the prompt see of it what is held, and the prompt sees itself."""
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    left = [column for column in range(PROMPT) if column not in held]
    seen[PROMPT:, left] = False
    mask = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("anchors:every=4", [3, 7]),
        ("anchors:every=3", [2, 5, 6, 7]),
        ("anchors:every=3,first=1", [0, 2, 5, 6, 7]),
        ("anchors:every=100,first=2", list(range(8))),
        ("anchors:tokens=21,23", [1, 3, 4, 5, 6, 7]),
    ],
)
@torch.no_grad()
def test_later_tokens_see_the_anchors_and_themselves(family: str, text: str, held: list[int]) -> None:
    model = tiny(family, "eager")
    ids = torch.arange(20, 20 + LENGTH)[None]
    cache = make_cache(model, text, ids=ids[:, :PROMPT])
    out, start = [], 0
    for end in (PROMPT, PROMPT + 2, *range(PROMPT + 3, LENGTH + 1)):  # a chunk of two, then single tokens
        out.append(model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True).logits)
        start = end
    torch.testing.assert_close(torch.cat(out, 1), by_mask(model, ids, held), atol=2e-5, rtol=2e-5)
    heads = cache.layers[0].keys.shape[1]
    assert values_held(cache) == 4 * 2 * heads * 8 * (len(held) + LENGTH - PROMPT)
    assert cache.layers[0].whole == 2 * heads * 8 * LENGTH


@torch.no_grad()
def test_a_padded_batch_that_holds_as_many_tokens_is_right() -> None:
    model, batch = tiny("llama"), batch_of(2)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    # the second sequence has three columns of padding: of 9 and of 6 real tokens, the last is an anchor
    cache = make_cache(
        model, "anchors:tokens=63,first=2", mask[:, :9], torch.where(torch.arange(9) == 8, 63, ids[:, :9].clamp(max=62))
    )
    out = [model(input_ids=ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache, use_cache=True).logits]
    out.append(model(input_ids=ids[:, 9:], attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    alone = make_cache(model, "anchors:every=6,first=2")
    model(input_ids=ids[1:, 3:9], past_key_values=alone, use_cache=True)
    after = model(input_ids=ids[1:, 9:], past_key_values=alone, use_cache=True).logits
    torch.testing.assert_close(out[1][1:], after, atol=1e-4, rtol=1e-4)


def test_ids_are_asked_for_and_ragged_batches_refused() -> None:
    model, batch = tiny("llama"), batch_of(2)
    cache = make_cache(model, "anchors:tokens=5")
    with pytest.raises(ShoalError, match=r"P161: .*ids of the prompt"):
        model(**batch, past_key_values=cache)
    with pytest.raises(ShoalError, match=r"P161: .*one at a time"):
        make_cache(model, "anchors:every=4", batch["attention_mask"][:, :7])
