"""Evaluation mode for a while, and the modes that a model was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

_MOVED = "rope_deltas"
"""Where transformers' models with positions in three dimensions keep that."""


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """No dropout, and no gradients unless `gradients` leaves them as they are; afterwards every module is in the mode
    it was in, one by one: users train some modules and keep others in evaluation mode.

    Nothing is known of what the user ran before, either: a model that reads pictures keeps how far the last of them
    moved the positions (`rope_deltas`), and would add it to those of a text. That too is afterwards as it was.

    `no_grad`, not `inference_mode`: some rotary embeddings keep a tensor of the last forward, which could not be
    trained through if it had been made in inference mode.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    moved = [(module, module.__dict__[_MOVED]) for module in modules if _MOVED in module.__dict__]
    for module, _ in moved:
        setattr(module, _MOVED, None)
    try:
        if training:  # eval() alone walks through a large model for several milliseconds
            model.eval()
        with nullcontext() if gradients else torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for module, positions in moved:
            setattr(module, _MOVED, positions)


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module that was there is in the mode it was in, whatever trained meanwhile."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
