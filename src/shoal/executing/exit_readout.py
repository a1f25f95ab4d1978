"""What the model would say if it stopped at a hidden state: its own final norm and head, found by probing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.models.opened import OpenedModel
from shoal.models.stacks import Stack


class Readout:
    """logits [batch, tokens, vocabulary] of hidden states [batch, tokens, hidden] as the last layer would hand them on.

    Where the modules behind the last layer, one after the other, give the model's logits bit for bit, they are called.
    Where the forward does more (a scale, a soft cap), the stock forward itself runs with layers that hand on the state.
    """

    def __init__(self, opened: OpenedModel, ending: Callable[[torch.Tensor], Any]) -> None:
        """`ending(state)` is a context in which the layers hand on `state`. Runs the model on one token, once."""
        self.model: Any = opened.model
        self.ending = ending
        self.chain = opened.remember("readout", lambda: _chain(opened.model, opened.stack()))

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if self.chain is not None:
            for module in self.chain:
                states = module(states)
            return states
        shape = states.shape[-3:-1]
        ids = torch.zeros(shape, dtype=torch.long, device=states.device)
        with self.ending(states):
            logits: torch.Tensor = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
        return logits


def chain_of(opened: OpenedModel) -> list[nn.Module] | None:
    """The modules behind the last layer that make logits of its state, in order; None where the forward does more. Runs
    the model, which must be whole, on one token, once.

    Columns may be cut out between two of them, as for `logits_to_keep`: who calls these modules does it in a forward,
    where the head has been called and its columns are known.
    """
    return opened.remember("norm and head", lambda: _chain(opened.model, opened.stack(), cut=True))


def _chain(model: Any, stack: Stack, *, cut: bool = False) -> list[nn.Module] | None:
    called: list[tuple[nn.Module, Any, Any]] = []
    last: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if last:
            called.append((module, args[0] if args else None, out))

    def begin(_: nn.Module, __: Any, out: Any) -> None:
        last[:] = [out[0] if isinstance(out, tuple) else out]

    inside = {id(module) for layer in (stack.layer(i) for i in range(stack.depth)) for module in layer.modules()}
    around = [
        module for module in model.modules() if id(module) not in inside and not isinstance(module, nn.ModuleList)
    ]
    handles = [module.register_forward_hook(note) for module in around]
    handles.append(stack.layer(stack.depth - 1).register_forward_hook(begin))
    try:
        ids = torch.zeros((1, 1), dtype=torch.long, device=device_of(model))
        with evaluating(model):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    state, chain = last[0], []
    for module, given, out in called:
        if (given is state or (cut and _is_view(given, state))) and isinstance(out, torch.Tensor):
            chain.append(module)
            state = out
    if state.shape != logits.shape or not torch.equal(state, logits):
        return None
    state = last[0]
    with evaluating(model):
        for module in chain:
            state = module(state)
    return chain if torch.equal(state, logits) else None


def _is_view(given: Any, state: torch.Tensor) -> bool:
    """Whether it is all of the state, cut out of it."""
    return isinstance(given, torch.Tensor) and given.shape == state.shape and given.data_ptr() == state.data_ptr()
