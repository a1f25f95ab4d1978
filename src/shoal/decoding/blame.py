"""Which settings of a model's generation config `generate` cannot work by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from shoal.errors import ModelError, ShoalError, first_line
from shoal.models.calls import device_of

_NEUTRAL = frozenset({"transformers_version", "_from_model_config"})
_BEGINS = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
"""Without these a decoder behind an encoder does not begin."""


@contextmanager
def naming_the_config(model: Any) -> Iterator[None]:
    """Around every text that `model` writes: an error that its generation config alone brings becomes M379.

    transformers looks at most of a generation config when it generates, and raises whatever it comes upon (`new():
    invalid data type 'str'` for `"eos_token_id": "x"`). So after an error one token is asked for without the config and
    with each of its settings alone; only where the first works the settings that do not are named.
    """
    try:
        yield
    except (ShoalError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):
        refused = _refused(model)
        if not refused:
            raise
        why = next(iter(refused.values()))
        raise ModelError(
            f"transformers cannot generate by {', '.join(refused)} of this model's generation config ({why}); "
            "correct its generation_config.json",
            code="M379",
        ) from None


def _refused(model: Any) -> dict[str, str]:
    """`KEY=value` of what transformers cannot write a token by, with what it says."""
    own = getattr(model, "generation_config", None)
    begins = {name: one for name in _BEGINS if isinstance(one := getattr(own, name, None), int)}
    if own is None or _said(model, begins) is not None:
        return {}
    told = {name: value for name, value in vars(own).items() if name not in _NEUTRAL and value is not None}
    if isinstance(strings := told.get("stop_strings"), str | list) and all(isinstance(one, str) for one in strings):
        del told["stop_strings"]  # right, but wants the tokenizer
    said = {f"{name}={value!r:.80}": _said(model, begins | {name: value}) for name, value in told.items()}
    return {name: why for name, why in said.items() if why is not None}


def _said(model: Any, settings: dict[str, Any]) -> str | None:
    """What transformers says when it is to write one token by these settings alone; None when it writes one."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=device_of(model))
    own, model.generation_config = model.generation_config, GenerationConfig()
    vars(model.generation_config).update(settings)  # as they are: the class corrects or refuses some
    try:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    except Exception as error:  # whatever it is, it is what transformers says
        return first_line(error)
    finally:
        model.generation_config = own
    return None
