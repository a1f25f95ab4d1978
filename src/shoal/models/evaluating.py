"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """No dropout, and no gradients unless `gradients` leaves them as they are; afterwards every module is in the mode
    it was in, one by one: users train some modules and keep others in evaluation mode.

    `no_grad`, not `inference_mode`: some rotary embeddings keep a tensor of the last forward, which could not be
    trained through if it had been made in inference mode.
    """
    training = [module for module in model.modules() if module.training]
    try:
        if training:  # eval() alone walks through a large model for several milliseconds
            model.eval()
        with nullcontext() if gradients else torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
