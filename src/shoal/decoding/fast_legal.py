"""What the fast decoder takes on, and what it refuses by name."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.generation import GenerationMode

from shoal.errors import UsageError
from shoal.executing.asked import StandIn
from shoal.executing.layer_list import LayerProxyList
from shoal.models.stacks import unwrap
from shoal.plan import Run
from shoal.plan.capabilities import refusal, refused

REFUSED_ARGUMENTS = (
    "assistant_model", "cache_implementation", "custom_generate", "inputs_embeds", "negative_prompt_ids",
    "past_key_values", "stop_strings", "synced_gpus", "tokenizer",
)  # fmt: skip
"""Arguments of `generate` that change what a step does, or that it does not hand on to another loop."""

REFUSED_SETTINGS = (
    "cache_implementation", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "return_dict_in_generate",
)  # fmt: skip
"""Settings of a generation config that this loop has no place for."""


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise `UsageError` U562 for an argument of `generate` that the fast path does not take."""
    _refuse(_unlike_arguments(arguments))


def refuse_settings(settings: Any) -> None:
    """Raise `UsageError` U562 for a generation config that asks for more than greedy or sampled tokens."""
    _refuse(_unlike_settings(settings))


def _refuse(why: str | None) -> None:
    if why is not None:
        raise UsageError(f"the fast path {why}; call model.generate for it", code="U562")


def _unlike_arguments(arguments: Mapping[str, Any]) -> str | None:
    name = next((name for name in REFUSED_ARGUMENTS if arguments.get(name) is not None), None)
    return None if name is None else f"takes no {name}"


def _unlike_settings(settings: Any) -> str | None:
    mode = settings.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"decodes greedily or samples, not by {str(mode.value).replace('_', ' ')}"
    for name in REFUSED_SETTINGS:
        if getattr(settings, name, None):
            return f"gives tokens alone, not {name}"
    if settings.use_cache is False:
        return "cannot work with use_cache=False"
    if settings.guidance_scale not in (None, 1):
        return f"cannot work with guidance_scale={settings.guidance_scale}"
    return None


def why_not_thin(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """Why the thin loop would not give what `model.generate(**arguments)` gives, or not sooner; None when it does.

    The thin loop asks the device after each token whether the text has ended, as transformers' own loop does on a CPU;
    elsewhere that one asks while the next step runs, or compiles.
    """
    if unwrap(model) is not model or not isinstance(model.__dict__.get("generate"), StandIn | None):
        return "it has a generate of its own"
    if model.device.type != "cpu":
        return f"transformers' own loop does not wait for each token on {model.device.type}"
    if model.config.is_encoder_decoder or not model.can_generate() or model.training:
        return "it is no causal language model in evaluation mode"
    if type(model)._sample is not GenerationMixin._sample:
        return "it has a decoding loop of its own"
    why = _unlike_arguments(arguments)
    if why is None:
        settings = copy.deepcopy(arguments.get("generation_config") or model.generation_config)
        settings.update(**arguments)
        why = "takes no stop_strings" if settings.stop_strings else _unlike_settings(settings)
    return None if why is None else f"the thin loop {why}"


def refuse_model(model: Any) -> None:
    """Raise `UsageError` U563 for a model that does not continue text, or that is being trained."""
    if model.config.is_encoder_decoder or not model.can_generate():
        kind = type(model).__name__
        raise UsageError(f"{kind} is no causal language model, which the fast path needs; use generate", code="U563")
    if model.training:
        raise UsageError(
            "the model is in training mode, where dropout changes every token; call model.eval() first", code="U563"
        )


def refuse_deciding(lists: Iterable[Any]) -> None:
    """Raise `UsageError` U567 when a list of layers is run by something that decides at every token, a policy or a
    draft: a fixed step would decide once and for all; and for steps of a plan what the table says of them."""
    for layers in lists:
        if isinstance(layers, LayerProxyList) and layers.executor.decides:
            no = refused("gate", "fast", Run(0))
            assert no is not None
            raise UsageError(no.message, code=no.code)
        if isinstance(layers, LayerProxyList) and (no := refusal(layers.executor.steps, "fast")):
            raise UsageError(no.message, code=no.code)


def why_not_compiled(model: Any) -> str | None:
    """Why this model's decode step cannot be compiled with a cache of fixed length; None when it may be."""
    if getattr(model, "_is_stateful", False):
        return "it keeps a running state, which no cache of fixed length holds"
    if any(device in ("cpu", "disk") for device in getattr(model, "hf_device_map", {}).values()) and (
        len(set(model.hf_device_map.values())) > 1
    ):
        return "accelerate offloads a part of it"
    try:
        rows = StaticCache(config=model.config, max_cache_len=8).layers
    except (KeyError, ValueError, AttributeError, TypeError):
        return "transformers has no cache of fixed length for its layers"
    other = next((row for row in rows if type(row) not in (StaticLayer, StaticSlidingWindowLayer)), None)
    if other is not None:
        return f"its cache has a row of the kind {type(other).__name__}"
    if not getattr(model, "_can_compile_fullgraph", False):
        return "transformers does not list it among those that can be compiled"
    return None


def refuse_difference(want: torch.Tensor, have: torch.Tensor) -> float:
    """Largest difference between the logits of one step, [batch, vocabulary] each, relative to the largest logit.

    Raises `UsageError` U564 when it is more than rounding: the compiled step is not this model's own.
    """
    limit = 1e-3 if want.dtype == torch.float32 else 5e-2
    want, have = want.float(), have.float()
    far = float((want - have).abs().max() / want.abs().max().clamp(min=1e-6))
    if not far <= limit:  # NaN is never at most the limit
        raise UsageError(
            f"the compiled step's logits differ by {far:.2g} of the largest from the model's own; decode with "
            'mode="off", and report the family',
            code="U564",
        )
    return far
