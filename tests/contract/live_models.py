"""Models that a test of live plans may change, and one batch for all of them, whole and padded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.errors import PlanError
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan, parse_plan

from .families import VOCAB, tiny

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
PADDED = {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}
PADDED["input_ids"][1, :3], PADDED["attention_mask"][1, :3] = 0, 0


def own(family: str, attention: str = "sdpa") -> PreTrainedModel:
    """A copy that a test may change."""
    return copy.deepcopy(tiny(family, attention))


def plan_of(model: nn.Module, notation: str) -> Plan:
    return parse_plan(notation, Plan.identity(inspect(model)))


@torch.no_grad()
def logits(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    return model(**({"input_ids": IDS, "use_cache": False} | kwargs)).logits


def code_of(model: nn.Module, plan: Plan | str, weights: Any = None, **kwargs: Any) -> str:
    with pytest.raises(PlanError) as caught, running(model, plan, weights):
        logits(model, **kwargs)
    return caught.value.code
