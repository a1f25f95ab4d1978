"""What the tests of healing share: a tiny model under a plan, with a learner on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from shoal.healing.learner import Learner, learning
from shoal.healing.stage import selection_of, term_of
from shoal.healing.windows import Windows, collated
from shoal.models.opened import open_model
from shoal.plan import Plan, parse_plan

from .families import tiny_of
from .planted import random_data

CUT = "0,1,4,5"


def deep(family: str = "llama", layers: int = 6) -> Any:
    """A tiny model of six layers, in evaluation mode; nobody may change it for good."""
    return tiny_of(family, layers)


@contextmanager
def learner_of(
    model: Any, *terms: str, learn: Sequence[str] = ("lora:rank=4",), plan: str = CUT, weights: Any = None, **more: Any
) -> Iterator[Learner]:
    """A learner on `model` under the plan."""
    opened = open_model(model)
    asked = parse_plan(plan, Plan.identity(opened.spec))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with learning(
            opened, asked, weights or {}, [selection_of(one) for one in learn], [term_of(one) for one in terms],
            stack=asked.stack_name(), data=random_data(8, 12), **more,
        ) as learner:  # fmt: skip
            yield learner


def batch_of(count: int = 4, length: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    """Windows of random tokens as the learner is given them."""
    windows = Windows(random_data(count, length, seed=seed))
    return collated([windows[n] for n in range(count)])


def gradients(learner: Learner, batch: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """Of what moves, for the batch in pieces of `size` windows."""
    learner.zero_grad()
    items = batch["labels"].ne(-100).sum()
    for at in range(0, len(batch["ids"]), size):
        piece = {name: tensor[at : at + size] for name, tensor in batch.items()}
        learner(**piece, num_items_in_batch=items)["loss"].backward()
    return {n: p.grad.clone() for n, p in learner.moving_tensors.items() if p.grad is not None}
