"""A tiny model of any causal type that transformers knows: its config shrunk by the names of its fields."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .overrides import OVERRIDES, SMALL

LARGEST = 20_000_000
"""Parameters; a model beyond has a size that `SMALL` does not name."""


def tiny(model_type: str) -> PreTrainedModel:
    """The tiny model with random weights large enough that every layer matters; the same ones every time.

    Raises whatever the family raises for the shrunk config, and `ValueError` for a model that did not become small.
    """
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"the shrunk config still has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return filled(AutoModelForCausalLM.from_config(tiny_config(model_type)))


def filled(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with random weights large enough that every layer matters, in float32 and for evaluation."""
    model = model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "A_log" not in name and parameter.is_floating_point():
                parameter.normal_(0, 0.15)
            elif "norm" in name and name.endswith("bias"):
                parameter.normal_(0, 0.05)
        for module in model.modules():  # as in every trained model; Youtu zeroes this row again whenever it is loaded
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
    model.tie_weights()
    return model


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The type's own config class with small sizes and `DEPTH` layers."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**merged(shrunk(kind), OVERRIDES.get(model_type, {})))


def shrunk(kind: type[PreTrainedConfig], tower: bool = False) -> dict[str, Any]:
    """The fields of a config class that `SMALL` names, sub-configs included; `tower`: one that is no language model."""
    default = kind()
    names = {own: canonical for canonical, own in default.attribute_map.items()}
    fields = {own: SMALL[names.get(own, own)] for own in default.to_dict() if names.get(own, own) in SMALL}
    for name in default.sub_configs:
        sub = getattr(default, name, None)
        if isinstance(sub, PreTrainedConfig):
            aside = not name.startswith(("text", "decoder", "llm"))
            fields[name] = {"model_type": sub.model_type} | shrunk(type(sub), aside)
    if tower:
        fields |= {name: 2 for name in fields if names.get(name, name) == "num_hidden_layers"}
    return fields


def merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `fields`, sub-config by sub-config; the value `...` takes a field away."""
    made = dict(fields)
    for name, value in changes.items():
        if value is ...:
            made.pop(name, None)
        elif isinstance(value, dict) and isinstance(made.get(name), dict):
            made[name] = merged(made[name], value)
        else:
            made[name] = value
    return made
