"""Arguments of transformers' `generate` for the ways in which Shoal asks for the next token."""

from __future__ import annotations

from typing import Any

_ONE_TEXT: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1}
"""One text, written token by token: a generation config may ask for beams (BART's does), which cannot be streamed."""

GREEDY: dict[str, Any] = _ONE_TEXT | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""The likeliest token. Whatever else the model's own generation config says (a repetition penalty) stays."""

GREEDY_ALONE: dict[str, Any] = GREEDY | {
    "min_p": None,
    "typical_p": None,
    "epsilon_cutoff": None,
    "eta_cutoff": None,
    "penalty_alpha": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "max_length": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "stop_strings": None,
    "return_dict_in_generate": False,
    "use_cache": True,
}
"""The likeliest token and nothing else: a checkpoint's own settings would fill whatever is left out, so all that touch
greedy decoding are named."""

_GREEDY_BELOW = 1e-4
"""Logits divided by less than this overflow; the likeliest token is all that is left of the distribution anyway."""


def sampling(temperature: float, **limits: Any) -> dict[str, Any]:
    """A token drawn at `temperature`, or the likeliest one at 0. `limits` (`top_p`, `top_k`) go with a draw; those that
    are not given are the model's own."""
    if temperature < _GREEDY_BELOW:
        return dict(GREEDY)
    return _ONE_TEXT | {"do_sample": True, "temperature": float(temperature)} | limits


def timed(new: int) -> dict[str, Any]:
    """The likeliest tokens, `new` of them whatever they are, for times that are compared."""
    return GREEDY | {"max_new_tokens": new, "min_new_tokens": new, "stop_strings": None}


def stopping(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The tokenizer, where the model's own generation config names strings that end a text and `generate` needs it."""
    strings = getattr(getattr(model, "generation_config", None), "stop_strings", None)
    return {"tokenizer": tokenizer} if strings else {}
