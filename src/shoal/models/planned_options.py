"""What `from_pretrained` is asked of a planned checkpoint: where its folder is, a device, fields of its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

from shoal.errors import ModelError

_HUB = ("cache_dir", "force_download", "local_files_only", "token")
_NO_MATTER = (
    *_HUB, "_commit_hash", "_from_auto", "_from_pipeline", "adapter_kwargs", "code_revision", "low_cpu_mem_usage",
    "proxies", "torch_dtype", "trust_remote_code", "use_safetensors", "weights_only",
)  # fmt: skip
"""Options that change nothing here, or are read elsewhere."""
_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_WAYS = {"_attn_implementation": "attn_implementation", "_experts_implementation": "experts_implementation"}


def local_folder_of(place: str | Path, revision: str | None, options: Mapping[str, Any]) -> Path:
    """The folder itself, or that of a hub id, downloaded by those of the options that say how."""
    if Path(place).is_dir():
        return Path(place)
    how = {name: options[name] for name in _HUB if options.get(name) is not None}
    return Path(snapshot_download(str(place), revision=revision, allow_patterns=["*.json", "*.safetensors"], **how))


def change_base(base: PreTrainedConfig, given: PreTrainedConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """Give the base's config what the caller said, as transformers does with fields of a config that are options; the
    answer is how attention and experts are to be computed, where that was said.

    The Auto classes put what every config has into that of the checkpoint, `given`, and leave the rest in `options`.
    Raises M401 for an option that is none, M402 for another vocabulary.
    """
    plain = PreTrainedConfig()
    for name in _OUTPUTS:
        if (value := getattr(given, name)) != getattr(plain, name):
            setattr(base, name, value)
    text = base.get_text_config(decoder=True)
    vocabulary = getattr(given, "vocab_size", None)
    if vocabulary not in (None, getattr(text, "vocab_size", None)):
        raise ModelError(
            f"the config of the planned checkpoint has the vocab_size {vocabulary!r:.20} and its base "
            f"{getattr(text, 'vocab_size', None)!r:.20}; leave the option out, or write the checkpoint anew",
            code="M402",
        )
    for name in _SPECIAL:
        if (value := getattr(given, name, None)) is not None:
            setattr(text, name, value)
    ways = {name: getattr(given, field, None) for field, name in _WAYS.items()}
    fields = base.to_dict()
    for name, value in options.items():
        if name in _WAYS.values():
            ways[name] = value
        elif name in fields:
            setattr(base, name, value)
        elif name not in _NO_MATTER and value not in (None, False, "", {}):
            raise ModelError(
                f"a planned checkpoint is loaded without the option {name}, which would change nothing; leave it out",
                code="M401",
            )
    return {name: value for name, value in ways.items() if value is not None}


def one_device(device_map: Any) -> Any:
    """The device that a device map names; None where it names none. Raises M384 for several."""
    devices = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if devices == {"auto"}:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if len(devices) != 1 or "disk" in devices or devices & {"balanced", "balanced_low_0", "sequential"}:
        raise ModelError(
            f"a planned checkpoint is loaded onto one device, not by the map {str(device_map)[:60]}; write "
            "device_map='cuda'",
            code="M384",
        )
    return next(iter(devices))
