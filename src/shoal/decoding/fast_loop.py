"""A decode loop with nothing in it but the model: greedy or sampled, one forward a token.

Everything that decides which token comes next (processors, stopping criteria, padding of finished rows, the draw) is
transformers' own and is asked in the order in which `generate` asks it, so the tokens are `generate`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache, StaticLayer

from shoal.decoding.growing_text import GrowingText, next_tokens

Forward = Callable[..., Any]


def thin_loop(
    model: Any,
    input_ids: torch.Tensor,
    *,
    streamer: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    forward: Forward | None = None,
    stepping: AbstractContextManager[Any] | None = None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Tokens [batch, prompt + new] after `input_ids` [batch, prompt].

    `generate` calls it in place of its own loop (`custom_generate`), with all that it prepared. `forward` runs one step
    in place of the model, and `stepping` is entered between the prompt's pass and the first step.
    """
    first = model._prefill(input_ids, generation_config, model_kwargs)
    inputs = Inputs(model, first, model_kwargs)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = generation_config._pad_token_tensor.to(input_ids.device) if ends else None
    text = GrowingText(input_ids, stopping_criteria, streamer, pad)
    logits, step = first.logits, forward or model
    del first
    with stepping or nullcontext(), model._optimize_model_for_decode():
        while True:
            scores = logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
            scores = logits_processor(text.ids, scores)
            text.add(next_tokens(scores, generation_config.do_sample)[0])
            if text.done:
                break
            logits = step(**inputs.after(text.ids)).logits
    text.end()
    return text.ids


class Inputs:
    """What the forward of each step is given, made by the model itself for the first step and, where it is known how
    they go on, moved on by one token for the next ones instead of being made again."""

    def __init__(self, model: Any, outputs: Any, model_kwargs: dict[str, Any]) -> None:
        """`outputs`: the answer to the prompt; `model_kwargs`: what `generate` prepared for it."""
        self._model = model
        self._kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        self._plain = type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        self._next: dict[str, Any] | None = None
        self._mask: torch.Tensor | None = None
        self._at = 0

    def after(self, input_ids: torch.Tensor) -> dict[str, Any]:
        """Arguments of the step that takes the last of `input_ids` [batch, length]."""
        if self._next is not None:
            return self._moved_on(input_ids)
        made: dict[str, Any] = self._model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1, **self._kwargs
        )
        made["return_dict"] = True
        if self._can_move_on(made):
            self._next, self._at = made, input_ids.shape[1] - 1
            made["position_ids"] = made["position_ids"].clone()
        else:
            self._kwargs = self._model._update_model_kwargs_for_generation(_NOTHING, self._kwargs)
        return made

    def _can_move_on(self, made: dict[str, Any]) -> bool:
        """Whether the next step's inputs are these with the position, and the mask by one place, further on."""
        ids, positions, mask = made.get("input_ids"), made.get("position_ids"), made.get("attention_mask")
        known = {"input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep"}
        others = [value for name, value in made.items() if name not in known]
        if not self._plain or ids is None or positions is None or positions.shape != ids.shape:
            return False
        if any(isinstance(value, torch.Tensor | Cache) for value in others):
            return False
        if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            return not _static(made)
        # a static row without a window keeps every token at its place: a mask only grows by the place just written
        self._mask = mask if isinstance(mask, torch.Tensor) else None
        rows = made["past_key_values"].layers
        return self._mask is not None and self._mask.ndim == 4 and all(type(row) is StaticLayer for row in rows)

    def _moved_on(self, input_ids: torch.Tensor) -> dict[str, Any]:
        made = self._next
        assert made is not None
        self._at += 1
        made["input_ids"] = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
        made["position_ids"] = made["position_ids"] + 1
        if self._mask is not None:
            self._mask[..., self._at] = self._mask[..., self._at - 1]
        elif made.get("attention_mask") is not None:
            mask = made["attention_mask"]
            made["attention_mask"] = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=-1)
        return made


_NOTHING: dict[str, Any] = {}
"""Outputs that hold no cache: only masks and positions are moved on."""


def _static(made: dict[str, Any]) -> bool:
    cache = made.get("past_key_values")
    return isinstance(cache, Cache) and any(isinstance(row, StaticLayer) for row in cache.layers)
