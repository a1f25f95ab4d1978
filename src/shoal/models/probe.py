"""The former name of `shoal.models.examine`."""

from __future__ import annotations

from torch import nn

from shoal.models.examine import LayerFacts, StackFacts
from shoal.models.lists import Stack
from shoal.models.opened import open_model

__all__ = ["LayerFacts", "Probe", "probe"]

Probe = StackFacts


def probe(model: nn.Module, stack: Stack) -> StackFacts:
    """What the layers of `stack` do."""
    return open_model(model).facts(stack.name)
