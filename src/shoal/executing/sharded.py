"""Layers whose parameters are spread over processes, by FSDP2 (`fully_shard`) or tensor parallelism."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from shoal.errors import PlanError
from shoal.models.spread import is_spread
from shoal.plan import Run
from shoal.plan.capabilities import refused


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of `module` are spread over processes, or are gathered for the length of its call."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(one, fsdp.FSDPModule) for one in module.modules()):
        return True
    return any(is_spread(parameter) for parameter in module.parameters())


def refuse_sharded(layer: nn.Module, run: Run) -> None:
    """Raise P153 for a layer whose tensors cannot be replaced for the length of a call: what shards it would put its
    own back, without a word."""
    if is_sharded(layer):
        no = refused("new tensors" if run.ids else "tie", "sharded", run)
        assert no is not None
        raise PlanError(no.message, code=no.code)
