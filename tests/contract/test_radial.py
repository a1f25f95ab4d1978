"""The recipe `radial`: tokens that need one layer, another, or none, are led there and end."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

from shoal.api.heal import heal
from shoal.live import running
from shoal.models.load import Loaded
from shoal.models.stacks import find_stack
from shoal.plan import Plan

from .families import VOCAB, tiny
from .planted import data_of

KINDS = 3
"""Tokens that need the first layer of the pool, those that need the second, and those that need none."""


@cache
def three_kinds() -> Any:
    """A model whose layer 1 changes the first third of the vocabulary, layer 2 the second, and nobody the last. Two
    numbers of a state say which third its token is of; nobody changes these."""
    model: Any = copy.deepcopy(tiny("llama"))
    kinds = torch.arange(VOCAB) * KINDS // VOCAB
    with torch.no_grad():
        embedded = model.get_input_embeddings().weight
        for number, layer in enumerate(find_stack(model).layers):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                layer.get_submodule(name).weight.mul_(0.1)
                layer.get_submodule(name).weight[:2] = 0.0
            if number in (1, 2):
                embedded[:, number - 1] = torch.where(kinds == number - 1, 4.0, -4.0)
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.gate_proj.weight.zero_()
                layer.mlp.gate_proj.weight[:, number - 1] = 20.0
                down = layer.mlp.down_proj.weight
                down.copy_(0.3 * torch.randn(down.shape, generator=torch.Generator().manual_seed(number)))
                down[:2] = 0.0
    return model


@pytest.mark.parametrize("steps", [1, 2])
def test_planted_each_token_goes_to_the_layer_that_it_needs_and_ends(steps: int) -> None:
    """Of a pool of two layers by the recipe `radial`: to the first, to the second, or to its end at once."""
    loaded = Loaded(three_kinds(), None, "planted")
    draw = torch.Generator().manual_seed(7)
    data, held = (torch.randint(3, VOCAB, (count, 16), generator=draw) for count in (400, 64))
    found = heal(
        loaded, Plan.identity(loaded.opened.spec), "radial", tokens=12_000, batch=4, held=32, data=data_of(data),
        watch=data_of(data[:4]), settings={"layers": "1-2", "steps": steps, "rate": 0.05, "cost": 1.0},
    )  # fmt: skip
    with torch.no_grad(), running(loaded.model, found.plan, found.weights, policy=found.policy) as handle:
        loaded.model(held)
        assert handle.deciding is not None and handle.deciding.executor is not None
        notes = handle.deciding.executor.last.notes  # type: ignore[union-attr]
        depth = handle.trace.counts.asked / handle.trace.counts.tokens
    taken = torch.stack([notes[f"pick-{step}l"].number for step in range(steps)])
    times = torch.stack([(taken == module).sum(0) for module in (0, 1)])
    kinds = held * KINDS // VOCAB
    wanted = torch.stack([kinds == 0, kinds == 1])
    assert (times == wanted).all(0).float().mean() > 0.95
    assert abs(depth - 2 - float((kinds < 2).float().mean())) < 0.05
