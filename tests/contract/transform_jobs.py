"""A transform done on a tiny model, and how far its logits are from others."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from shoal.data import Data
from shoal.examples import TransformExamples
from shoal.fitting.result import Job, Transformed
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan, drop
from shoal.registry import entries, get

from .planted import random_data

EXAMPLES: dict[str, TransformExamples] = {name: entry.examples for name, entry in entries("transforms").items()}
STAND_INS, CORRECTED, TRAINED, MERGES = (
    tuple(name for name, own in EXAMPLES.items() if own.role == role)
    for role in ("fitted", "corrected", "trained", "merge")
)
SHORT = {name: dict(own.quick) for name, own in EXAMPLES.items()}
HOLE = 2


def job(model: PreTrainedModel, removed: list[int], *, data: Data | None = None, batch: int = 4) -> Job:
    plan = Plan.identity(inspect(model))
    return Job(model, data or random_data(16, 24), drop(plan, removed) if removed else plan, batch=batch)


def do(name: str, given: Job, **options: Any) -> Transformed:
    return get("transforms", name).load()(given, **options)


@torch.no_grad()
def logits(model: PreTrainedModel, made: Transformed | None = None, seed: int = 9) -> torch.Tensor:
    ids = random_data(3, 16, seed=seed).ids
    if made is None:
        return model(input_ids=ids, use_cache=False).logits
    with running(model, made.plan, made.weights):
        return model(input_ids=ids, use_cache=False).logits


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
