"""Tiny models whose later layers are weak, so that drafts are sometimes right, and one draft of each kind."""

from __future__ import annotations

import copy
from functools import cache

import torch
from transformers import PreTrainedModel

from shoal.models.stacks import find_stack
from shoal.registry import entries

from .families import tiny

EAGER = {"gemma2", "gemma3_text", "bloom", "gpt_oss", "gemma3n_text", "gptj"}
FAMILIES = ("llama", "gpt2", "opt", "gemma3_text", "mixtral", "bloom")
NO_TREES = {"gemma3_text", "bloom"}
"""Of these families those that cannot verify a tree of tokens (test_tree_drafts has the reasons)."""
DRAFTS = {name: entry.examples.texts[0] for name, entry in entries("drafts").items()}


@cache
def weak(family: str) -> PreTrainedModel:
    """The family's tiny model with layers 2 and 3 at a third of their weights; nobody may change it."""
    model = copy.deepcopy(tiny(family, "eager" if family in EAGER else "sdpa"))
    stack = find_stack(model)
    with torch.no_grad():
        for index in (2, 3):
            for parameter in stack.layer(index).parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(0.35)
    return model


def prompt(length: int = 10, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(seed))
