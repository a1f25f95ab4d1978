"""Transformers models as llama.cpp knows them: which architecture, which keys, and what is done to which tensor.

The rules are those of llama.cpp's own converter (`conversion/*.py` beside llama-cpp-python 0.3.36). What llama.cpp has
no key for is refused; a family that is not in `FAMILIES` is too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from transformers import PreTrainedConfig

from shoal.errors import WriteError
from shoal.models import gguf_rules as rules

Facts = Any
"""A transformers config: its fields are the family's own."""


@dataclass(frozen=True)
class Family:
    """How a transformers family is written."""

    arch: str
    permuted: bool = False
    """Rows of q and k interleaved, since llama.cpp's `llama` rotates neighbours and transformers rotates halves."""
    shifted: bool = False
    """1 is added to every norm, since transformers' norm multiplies by 1 + weight."""
    windows: bool = False
    """llama.cpp knows which layers have a sliding window; otherwise the context is cut to the window."""
    scaled: bool = False
    """Attention is scaled by `query_pre_attn_scalar`, which llama.cpp takes from the depth."""
    act: tuple[str, ...] = ("silu", "swish")
    plain: tuple[str, ...] = ()
    """Config fields that must be off."""


FAMILIES = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", plain=("attention_bias",)),
    "gemma2": Family(
        "gemma2", shifted=True, windows=True, scaled=True, act=("gelu_pytorch_tanh",), plain=("attention_bias",)
    ),
    "gemma3_text": Family(
        "gemma3",
        shifted=True,
        windows=True,
        scaled=True,
        act=("gelu_pytorch_tanh",),
        plain=("attention_bias", "attn_logit_softcapping", "use_bidirectional_attention"),
    ),
}
"""By transformers' `model_type`."""
_SCALINGS = ("default", "linear", "llama3")


def family_of(config: PreTrainedConfig) -> Family:
    """The rules for a config. Raises `WriteError` W265 for a family or a setting without rules, W263 for a depth at
    which llama.cpp would scale attention otherwise."""
    found = FAMILIES.get(config.model_type)
    if found is None:
        raise WriteError(
            f"{config.model_type} models are not converted to GGUF here (only {', '.join(FAMILIES)}); write a folder "
            "and convert it with llama.cpp's convert_hf_to_gguf.py",
            code="W265",
        )
    reason = next(_unsaid(config, found), None)
    if reason is not None:
        raise WriteError(
            f"a GGUF file of {config.model_type} cannot say {reason}; serve the written folder with transformers",
            code="W265",
        )
    _require_scale(config, found)
    return found


def _unsaid(config: Facts, family: Family) -> Iterator[str]:
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    act = getattr(config, "hidden_activation", None) or act
    if act not in family.act:
        yield f"the activation {act}"
    for name in family.plain:
        if getattr(config, name, None):
            yield f"{name} = {getattr(config, name)}"
    for kind, rope in ropes(config).items():
        allowed = _SCALINGS if kind == "full_attention" else ("default",)
        if rope.get("rope_type", "default") not in allowed or rope.get("partial_rotary_factor", 1.0) != 1.0:
            yield f"the rotary embedding {rope.get('rope_type')} of {kind}"
    if family.arch == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        yield "logits without soft caps"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        yield f"layers of the kinds {', '.join(sorted(kinds))}"


def _require_scale(config: Facts, family: Family) -> None:
    if not family.scaled:
        return
    depth = config.num_hidden_layers
    special = depth == rules.SCALED.get(family.arch)
    taken = config.hidden_size // config.num_attention_heads if special else config.head_dim
    if config.query_pre_attn_scalar != taken:
        raise WriteError(
            f"llama.cpp would scale the attention of a {family.arch} of {depth} layers by {taken} and not by "
            f"{config.query_pre_attn_scalar}; serve this plan with transformers",
            code="W263",
        )


def ropes(config: Facts) -> dict[str, dict[str, Any]]:
    """{kind of layer: its rotary settings}."""
    found = getattr(config, "rope_parameters", None) or {}
    nested = {kind: rope for kind, rope in found.items() if isinstance(rope, dict)}
    return nested or {"full_attention": found}


def add_keys(writer: GGUFWriter, config: Facts, family: Family) -> None:
    """The keys of the architecture for a model of `config`."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    sliding = bool(window) and ("sliding_attention" in kinds or not kinds)
    context = config.max_position_embeddings
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(min(context, window) if sliding and not family.windows else context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    _add_ropes(writer, config)
    if family.windows:
        _add_windows(writer, family.arch, window, [kind == "sliding_attention" for kind in kinds])
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_ropes(writer: GGUFWriter, config: Facts) -> None:
    found = ropes(config)
    full = found.get("full_attention") or next(iter(found.values()))
    writer.add_rope_freq_base(full.get("rope_theta", 10000.0))
    if full.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if "sliding_attention" in found:
        writer.add_rope_freq_base_swa(found["sliding_attention"].get("rope_theta", 10000.0))


def _add_windows(writer: GGUFWriter, arch: str, window: int | None, sliding: list[bool]) -> None:
    every = rules.WINDOWS[arch]
    if window:
        writer.add_sliding_window(window)
    if sliding != [i % every < every - 1 for i in range(len(sliding))]:
        writer.add_array(f"{arch}.attention.sliding_window_pattern", sliding)


def changed(name: str, values: torch.Tensor, config: Facts, family: Family) -> torch.Tensor:
    """A tensor of transformers as llama.cpp wants it, in float32. `name`: transformers' name."""
    values = values.detach().to("cpu", torch.float32)
    if family.shifted and name.endswith("norm.weight"):
        return values + 1
    if family.permuted and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    return values


def rope_factors(config: Facts) -> torch.Tensor | None:
    """`rope_freqs`, [head_dim / 2]: by what each frequency is divided under Llama 3's scaling; None without it."""
    rope = ropes(config).get("full_attention") or {}
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    return plain / scaled
