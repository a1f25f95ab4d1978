"""Who is told what runs see and make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from shoal.models.parts import find_parts
from shoal.plan import Exit, Run


@dataclass(frozen=True)
class RunRecord:
    """One run of a layer."""

    run: Run
    input: torch.Tensor
    """The hidden state that the layer was called with, as the family has it: [batch, tokens, hidden] in most."""
    output: torch.Tensor
    """The hidden state that it made."""
    behind_attention: Callable[[], torch.Tensor]
    """Computes the state between attention and mlp: what the layer makes of the same input without its mlp."""


class Recorder:
    """Override what is wanted, and only that: what nobody wants is not computed. Whatever is handed over belongs to the
    forward and may be changed by it later."""

    def enters(self, layer: int, hidden: torch.Tensor) -> None:
        """The stock forward comes to base layer `layer` with this state, before the steps that run there."""

    def ran(self, record: RunRecord) -> None:
        """A layer was run, whole or in part."""

    def reaches(self, step: Exit, hidden: torch.Tensor) -> None:
        """The forward comes to an exit with this state, whoever leaves there."""

    def noted(self, behind: Mapping[int, torch.Tensor]) -> None:
        """The states that heads of the plan read, by base layer; called before `leaves`."""

    def leaves(self, hidden: torch.Tensor) -> None:
        """The stock forward gets this state back from its last layer."""

    def stores(self, run: Run, keys: torch.Tensor, values: torch.Tensor) -> None:
        """A run attends to these keys and values, [batch, heads, tokens, dim] each, those of earlier tokens among
        them."""

    def attends(self, layer: int, attention_map: torch.Tensor) -> None:
        """The attention of base layer `layer` made this map, [batch, heads, queries, keys]; eager attention alone
        hands one out."""

    @cached_property
    def wants_kv(self) -> bool:
        """Whether `stores` is overridden."""
        return type(self).stores is not Recorder.stores

    @cached_property
    def wants_maps(self) -> bool:
        """Whether `attends` is overridden."""
        return type(self).attends is not Recorder.attends


class Outputs(Recorder):
    """Keeps what each layer makes, by base layer."""

    def __init__(self) -> None:
        self.states: dict[int, torch.Tensor] = {}

    def ran(self, record: RunRecord) -> None:
        self.states[record.run.layer] = record.output


def attention_hooks(
    layers: Sequence[tuple[int, nn.Module]], recorder: Recorder, paused: Callable[[], bool]
) -> list[Any]:
    """Hooks on the attention of every layer, given with its base index, that tell `recorder` of its map while nothing
    is `paused`; their `remove` takes them away."""

    def hook(index: int) -> Callable[..., None]:
        def made(_: Any, __: Any, out: Any) -> None:
            attended = out[1] if isinstance(out, tuple) and len(out) > 1 else None
            if paused() or not isinstance(attended, torch.Tensor):
                return
            if attended.dim() == 4 and attended.is_floating_point():
                recorder.attends(index, attended)

        return made

    return [
        layer.get_submodule(own.attention[0]).register_forward_hook(hook(index))
        for index, layer in layers
        if (own := find_parts(layer)) is not None
    ]
