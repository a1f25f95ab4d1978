"""Modules that multiply what they are given by one matrix, whichever way round they hold it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies what it is given by one matrix: factors can stand beside it."""
    inner = getattr(module, "base_layer", module)  # as peft wraps it
    return isinstance(inner, nn.Linear | Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear module holds its matrix as [in, out], as GPT-2's do."""
    return isinstance(getattr(module, "base_layer", module), Conv1D)


def matrix_of(module: nn.Module) -> torch.Tensor:
    """The matrix of a linear module, [out, in]."""
    weight: Any = module.weight
    return turned(module, weight)


def turned(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight as the module would hold it, [out, in]."""
    found = weight.detach()
    return found.T if is_transposed(module) else found


def said_width(module: nn.Module, leaf: str, tensor: torch.Tensor) -> dict[str, int]:
    """What a linear module says of its width where it has a weight of another size than its own: forwards, and those
    who put adapters in, read it. Nothing for a bias, the other `leaf` that it may have."""
    if leaf != "weight":
        return {}
    words = ("nx", "nf") if isinstance(module, Conv1D) else ("out_features", "in_features")
    return {word: size for word, size in zip(words, tensor.shape, strict=False) if word in module.__dict__}
