"""What the model's own `prepare_inputs_for_generation` makes of the text so far, for any cache."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import (
    _prepare_attention_mask,
    _prepare_position_ids,
    _prepare_token_type_ids,
)


class FeedsForward(Protocol):
    """What makes the arguments of one forward."""

    def __call__(self, ids: torch.Tensor, new: int, cache: Cache) -> dict[str, Any]:
        """Arguments for the last `new` tokens of `ids`, [1, tokens], and their logits; `cache` holds those before."""


class ForwardInputs:
    """Arguments of one forward over the last tokens of a growing text."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """`kwargs`: what `generate` prepared for the prompt `ids`, [1, length]; nothing of it is changed."""
        self.model, self.start = model, ids.shape[1]
        self.kwargs = {name: value for name, value in kwargs.items() if name != "past_key_values"}

    @classmethod
    def of_prompt(cls, model: PreTrainedModel, prompt: torch.Tensor, takes: Container[str]) -> ForwardInputs:
        """For a prompt, [1, length], that `generate` has not prepared; `takes`: arguments of the model's forward."""
        kwargs: dict[str, Any] = {"use_cache": True}
        if "position_ids" in takes:
            kwargs["position_ids"] = torch.arange(prompt.shape[1], device=prompt.device)[None]
        return cls(model, prompt, kwargs)

    def __call__(self, ids: torch.Tensor, new: int, cache: Cache) -> dict[str, Any]:
        """As said of `FeedsForward`."""
        kwargs, grown = dict(self.kwargs), ids.shape[1] - self.start
        for name, extend in _EXTENDED.items():
            if (known := kwargs.get(name)) is not None:
                kwargs = extend(kwargs, known.shape[-1] + grown)
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=new, is_first_iteration=False, past_key_values=cache, **kwargs
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = new
        return inputs


_EXTENDED = {
    "attention_mask": lambda kwargs, length: _prepare_attention_mask(kwargs, length, False),
    "position_ids": lambda kwargs, length: _prepare_position_ids(kwargs, length, False),
    "token_type_ids": _prepare_token_type_ids,
}
