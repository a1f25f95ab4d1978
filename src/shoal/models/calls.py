"""What a module was called with, by the names of its forward's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_NAMES: dict[Callable[..., Any], tuple[str, ...]] = {}
"""By forward function: its parameters that can be given by position, without `self`."""


def device_of(model: Any) -> torch.device:
    """Where a model reads its inputs; an offloaded one, whose weights are on `meta`, moves them itself."""
    device = torch.device(model.device)
    return torch.device("cpu") if device.type == "meta" else device


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call of `module` by name, whether they were given by position or by keyword.

    What lands in `*args` has no name and is left out. A forward that accelerate or PEFT has wrapped is read through.
    """
    if not args:
        return kwargs
    return dict(zip(_positional(module.forward), args, strict=False)) | kwargs


def class_function(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function of a class behind a module's `forward`, also behind what accelerate wraps around it; None where
    there is none. It may be remembered for good, while a function of the instance's own would hold the module, and so
    the model, for as long."""
    found = getattr(forward, "__func__", None) or getattr(inspect.unwrap(forward), "__func__", None)
    return found if callable(found) else None


def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    key = class_function(forward)
    if key is None:
        return _named(forward)
    if key not in _NAMES:
        _NAMES[key] = _named(forward)
    return _NAMES[key]


def _named(forward: Callable[..., Any]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # `inspect.signature` follows `__wrapped__`; a bound method has no `self` left
    return tuple(p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds)


def logits_in(out: Any) -> torch.Tensor:
    """The logits in what a language model returned: an output object or, with `return_dict=False`, a tuple."""
    if not isinstance(out, tuple):
        found: torch.Tensor = out.logits
        return found
    # a loss may stand before them
    return next(one for one in out if isinstance(one, torch.Tensor) and one.dim() == 3)
