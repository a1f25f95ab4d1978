"""Models with a known answer: one layer's output projections are zero, so that this layer alone does nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from shoal.data import Data, DataInfo
from shoal.executing.bind import bind
from shoal.executing.recorder import Outputs
from shoal.models.stacks import find_stack

from .families import VOCAB, tiny, tiny_of

PLANTED = {"llama": 2, "gpt2": 1, "gemma3_text": 2, "qwen2": 1}
"""Family -> the layer that does nothing."""


def data_of(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Data:
    count, length = ids.shape
    return Data(
        ids, mask, DataInfo("sampled", "calibrate", length, count, length, "none", ids.numel(), f"{ids.sum():064}")
    )


def random_data(count: int, length: int, seed: int = 0, vocab: int = VOCAB) -> Data:
    return data_of(torch.randint(3, vocab, (count, length), generator=torch.Generator().manual_seed(seed)))


@cache
def planted(family: str) -> PreTrainedModel:
    """A copy of the tiny model whose layer `PLANTED[family]` adds zero to the hidden state."""
    model = copy.deepcopy(tiny(family))
    silence(model, PLANTED[family])
    return model


def silence(model: PreTrainedModel, layer: int) -> None:
    """Zero what the layer's attention and mlp write into the hidden state."""
    for name, module in find_stack(model).layer(layer).named_modules():
        if name.endswith(("o_proj", "c_proj", "down_proj")):
            for parameter in module.parameters():
                parameter.data.zero_()


NULL, TWIN_OF_NULL, LINEAR, TWINS, DEEP = 1, 2, 3, (4, 5), 6


@cache
def answers(family: str) -> PreTrainedModel:
    """Six layers: 1 adds nothing but attends as 2 does, 3 is an affine map of its input, 4 and 5 are one layer
    twice."""
    model = copy.deepcopy(tiny_of(family, DEEP))
    stack = find_stack(model)
    for source, target in ((TWIN_OF_NULL, NULL), TWINS):
        stack.layer(target).load_state_dict(stack.layer(source).state_dict())
    with torch.no_grad():
        for name, parameter in stack.layer(NULL).named_parameters():
            if any(piece in ("o_proj", "c_proj", "down_proj") for piece in name.split(".")):
                parameter.zero_()
    turn, shift = affine_of(model.config.get_text_config().hidden_size)

    def affine(_: torch.nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        mapped = (args[0] if args else kwargs["hidden_states"]) @ turn + shift
        return (mapped, *out[1:]) if isinstance(out, tuple) else mapped

    stack.layer(LINEAR).register_forward_hook(affine, with_kwargs=True)
    return model


def affine_of(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the affine layer of `answers` does: x @ turn [width, width] + shift [width]."""
    draw = torch.Generator().manual_seed(5)
    turn = torch.eye(width) + 0.3 * torch.randn(width, width, generator=draw) / width**0.5
    return turn, 0.1 * torch.randn(width, generator=draw)


@cache
def own_text(family: str) -> Data:
    """Text that the planted model itself wrote: its cross-entropy is its entropy there, and removing a layer that does
    something can only raise it, sampling noise aside."""
    return data_of(written_by(planted(family), count=16, length=32))


@torch.no_grad()
def written_by(model: PreTrainedModel, *, count: int, length: int) -> torch.Tensor:
    """Ids [count, length] drawn from the model, the first token of each evenly."""
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCAB, (count, 1), generator=draw)
    while ids.shape[1] < length:
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=draw)], 1)
    return ids


@contextmanager
def hooks_unchanged(model: PreTrainedModel) -> Iterator[None]:
    """No forward hook is left behind."""
    before = [len(module._forward_hooks) for module in model.modules()]
    yield
    assert [len(module._forward_hooks) for module in model.modules()] == before


@torch.no_grad()
def outputs_of(model: Any, ids: torch.Tensor, **inputs: Any) -> dict[int, torch.Tensor]:
    """What each layer of the whole model makes, by base layer."""
    found, bound = Outputs(), bind(model)
    with bound.running(), bound.executor().recording(found):
        model(input_ids=ids, **inputs)
    return found.states
