"""Attention over fewer heads of keys and values than a layer has: each serves as many of the layer's.

The attention module expects the number that its config says. While a layer is called that may meet fewer, it asks for
an attention function of ours, which repeats them and hands on to the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shoal.models.examine import LayerFacts
from shoal.plan.sources import STORED
from shoal.plan.steps import Step, runs
from shoal.plan.tensors import tensors_of_run


def makes_fewer(steps: tuple[Step, ...], facts: list[LayerFacts], weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a run's own tensors make fewer heads of keys or values than its layer does."""
    for run in runs(steps):
        roles = facts[run.layer].roles
        if not run.ids or roles is None:
            continue
        own = tensors_of_run(run, weights)
        for module in roles.unused(STORED):
            weight = own.get(f"{module}.weight")
            if weight is not None and weight.shape[0] < roles.widths[module]:
                return True
    return False


def repeated(module: Any, query: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Keys or values [batch, heads, tokens, size] for as many heads as the module expects."""
    expected = query.shape[1] // getattr(module, "num_key_value_groups", 1)
    return states if states.shape[1] == expected else states.repeat_interleave(expected // states.shape[1], 1)
