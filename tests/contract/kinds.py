"""Tiny encoders, encoder-decoders and vision models for the contract tests: those of the survey, made once."""

from __future__ import annotations

from functools import cache

import torch
from transformers import PreTrainedModel

from shoal.models.inputs import Inputs, sample_inputs
from shoal.models.inspect import inspect
from shoal.plan import Plan, parse_plan
from shoal.writing.proof_child import outputs

from ..survey.kinds import tiny_kind

STACKS: dict[str, tuple[str, ...]] = {
    "bert": ("encoder",),
    "roberta": ("encoder",),
    "distilbert": ("encoder",),
    "electra": ("encoder",),
    "modernbert": ("encoder",),
    "mpnet": ("encoder",),
    "t5": ("encoder", "decoder"),
    "umt5": ("encoder", "decoder"),
    "bart": ("encoder", "decoder"),
    "marian": ("encoder", "decoder"),
    "whisper": ("encoder", "decoder"),
    "vit": ("vision",),
    "dinov2": ("vision",),
    "clip": ("vision", "text"),
    "siglip": ("vision", "text"),
}
"""By model type, the stacks that must be found."""
PAIRED = tuple(name for name, stacks in STACKS.items() if "decoder" in stacks)


@cache
def kind(model_type: str) -> PreTrainedModel:
    """The type's tiny model of 6 layers a stack, the same for every test; nobody may change it for good."""
    model = tiny_kind(model_type)
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.forced_eos_token_id = None
    return model


def plan_of(model: PreTrainedModel, text: str) -> Plan:
    """Depth notation as a plan of `model`."""
    return parse_plan(text, Plan.identity(inspect(model)))


def inputs_of(model: PreTrainedModel) -> Inputs:
    """Two rows of nine tokens, or two images."""
    return sample_inputs(model, "cpu", batch=2, length=9)


@torch.no_grad()
def returned(model: PreTrainedModel, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Every floating tensor of one pass, as it is now."""
    return {name: value.clone() for name, value in outputs(model, inputs).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """The same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference of any two."""
    return max((value - other[name]).abs().max().item() for name, value in one.items())
