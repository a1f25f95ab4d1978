"""Models without weights: the structure that a config describes, on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.models.kinds import auto_class, auto_for


def meta_model(
    config: PreTrainedConfig, *, like: PreTrainedModel | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a config on the meta device: structure without weights; of `like`'s class when given, otherwise of
    the Auto class that the config names. Code that comes with the model is run only with `trust_remote_code`; nobody is
    asked on the terminal."""
    # the default grouped experts read values, which a meta tensor does not have; the batched ones do not
    kind: dict[str, Any] = {"attn_implementation": like.config._attn_implementation} if like is not None else {}
    with torch.device("meta"):
        if like is not None:
            return type(like)._from_config(config, **kind).eval()
        made: PreTrainedModel = auto_class(auto_for(config)).from_config(
            config, experts_implementation="batched_mm", trust_remote_code=trust_remote_code, **kind
        )
        return made.eval()
