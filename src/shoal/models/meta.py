"""Models without weights: the structure that a config describes, on the meta device."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.models.kinds import auto_class, auto_for


def meta_model(
    config: PreTrainedConfig, *, like: PreTrainedModel | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a config on the meta device: structure without weights; of `like`'s class when given, otherwise of
    the Auto class that the config names. Code that comes with the model is run only with `trust_remote_code`; nobody is
    asked on the terminal. The config stays as it is."""
    config = copy.deepcopy(config)  # transformers notes in it how attention and experts are computed
    # the default grouped experts read values, which a meta tensor does not have; the batched ones do not
    kind: dict[str, Any] = {"attn_implementation": like.config._attn_implementation} if like is not None else {}
    with torch.device("meta"):
        if like is not None:
            return type(like)._from_config(config, **kind).eval()
        made: PreTrainedModel = auto_class(auto_for(config)).from_config(
            config, experts_implementation="batched_mm", trust_remote_code=trust_remote_code, **kind
        )
        return made.eval()


def blank(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros of the shape and dtype of `tensor` on the CPU, to which the system gives no page of memory before somebody
    writes there."""
    if not tensor.numel():  # an empty array has no stride by which its bytes could be seen as numbers
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    size = math.prod(tensor.shape) * tensor.element_size()
    return torch.from_numpy(np.zeros(size, np.uint8)).view(tensor.dtype).view(tensor.shape)
