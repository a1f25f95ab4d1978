"""Cached steps of a live model on given tokens, as speed and memory need them."""

from __future__ import annotations

from typing import Any

import torch

from shoal.errors import UsageError
from shoal.evaluation.scoring import accepts, require_context
from shoal.models.calls import device_of

# Attention models return the first; state space models the second.
CACHE_NAMES = ("past_key_values", "cache_params")


def random_tokens(model: Any, batch: int, length: int, seed: int) -> torch.Tensor:
    """Token ids [batch, length] drawn evenly from the vocabulary, on the model's device.

    Raises `UsageError`: U510 more tokens than the context, U514 an empty shape.
    """
    if batch < 1 or length < 1:
        raise UsageError(f"a batch of {batch} sequences of {length} tokens is empty; use 1 or more", code="U514")
    require_context(model, length)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (batch, length), generator=draw).to(device_of(model))


class Stepper:
    """Cached forwards of one model; its signature is read once, so that no timed step does it."""

    def __init__(self, model: Any) -> None:
        """Raises `UsageError` U515 for a model that takes no cache."""
        name = next((name for name in CACHE_NAMES if accepts(model, name)), None)
        if name is None:
            message = "this model keeps no cache between tokens, so decoding cannot be measured; use another model"
            raise UsageError(message, code="U515")
        self._model = model
        self._cache_name = name
        self._positions = accepts(model, "position_ids")
        # As `generate` does it: the output head runs for the last position only.
        self._fixed = {"use_cache": True} | ({"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {})

    def __call__(self, ids: torch.Tensor, start: int = 0, cache: Any = None) -> Any:
        """Run `ids` [batch, length] at positions `start` and up, after what `cache` holds; return the cache."""
        inputs: dict[str, Any] = {"input_ids": ids, **self._fixed}
        if self._positions:
            inputs["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        if cache is not None:
            inputs[self._cache_name] = cache
        return getattr(self._model(**inputs), self._cache_name)
