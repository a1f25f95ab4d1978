"""From a name to a model: hub id, folder, GGUF file or the built-in model. Safetensors only; nothing is unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from shoal.errors import ModelError
from shoal.models import gguf
from shoal.models.checkpoint import check_folder
from shoal.models.inspect import inspect
from shoal.models.kinds import auto_class, auto_for
from shoal.plan import Spec

BUILTIN = "smollm2"


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and where both came from."""

    model: PreTrainedModel
    tokenizer: Any
    source: str
    folder: Path | None = None
    """The local folder that was read, for its side files; None for a hub id."""


def load(
    source: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Loaded:
    """Load a model for evaluation, by the Auto class that its config names: a causal language model, an encoder, ...

    `source`: "smollm2", a folder with config.json and safetensors, a .gguf file, a hub id, or a live model (returned as
    it is). `device`: cpu, cuda, mps, ... (default: the accelerator torch finds, else the CPU). `dtype`: auto, float32,
    bfloat16, float16 (default: what the checkpoint says). Raises `ModelError` (M3xx) with the remedy.
    """
    if isinstance(source, nn.Module):
        return Loaded(source, tokenizer, getattr(source, "name_or_path", "") or type(source).__name__)
    place = _place(str(source))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    chosen = dtype if dtype is not None else "auto"
    if isinstance(chosen, str) and chosen != "auto":
        chosen = dtype_of(chosen)
    model, info = _from_pretrained(
        place, str(source), dtype=chosen, use_safetensors=True, attn_implementation=attention, **options
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        names = [str(key) for key in (*info["missing_keys"], *info["mismatched_keys"])]
        raise ModelError(
            f"{source} lacks {len(names)} tensors of its model, such as {min(names)}; "
            "transformers would fill them with random numbers, so the folder is not used",
            code="M310",
        )
    if tokenizer is None:
        tokenizer = load_tokenizer(place, **options)
    return Loaded(
        model.eval().to(device or default_device()), tokenizer, str(source), place if isinstance(place, Path) else None
    )


def default_device() -> str:
    """The accelerator that torch finds, else cpu."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]


def dtype_of(name: str) -> torch.dtype:
    """float32, bfloat16, float16 -> torch's dtype. Raises M311 for other names."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"unknown dtype {name!r}; use auto, float32, bfloat16 or float16", code="M311")
    return found


def inspect_source(source: str | Path, *, trust_remote_code: bool = False) -> Spec:
    """The Spec of a folder or hub id from its config and the headers of its safetensors; no weight is loaded."""
    place = _place(str(source))
    spec = inspect(meta_model(load_config(source, trust_remote_code=trust_remote_code)))
    if isinstance(place, Path):
        for stack in spec.stacks:
            check_folder(place, depth=stack.depth, path=stack.path)
    return spec


def local_folder(source: str | Path) -> Path:
    """The checked folder of a local model, of a .gguf file or of the built-in model (both converted on first use).
    Raises M317 for a hub id."""
    place = _place(str(source))
    if isinstance(place, str):
        raise ModelError(f"{source} is a hub id, not a local folder; download it and give its folder", code="M317")
    return place


def load_config(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a folder, hub id or the built-in model."""
    place = _place(str(source))
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(str(source), error) from None


def meta_model(config: PreTrainedConfig, *, like: PreTrainedModel | None = None) -> PreTrainedModel:
    """The model of a config on the meta device: structure without weights; of `like`'s class when given, otherwise of
    the Auto class that the config names."""
    # the default grouped experts read values, which a meta tensor does not have; the batched ones do not
    kind: dict[str, Any] = {"attn_implementation": like.config._attn_implementation} if like is not None else {}
    with torch.device("meta"):
        if like is not None:
            return type(like)._from_config(config, **kind).eval()
        made: PreTrainedModel = auto_class(auto_for(config)).from_config(
            config, experts_implementation="batched_mm", **kind
        )
        return made.eval()


def _place(source: str) -> Path | str:
    """A checked local folder, or the hub id itself."""
    if source == BUILTIN:
        return gguf.builtin_folder()
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return gguf.converted_folder(path)
    if path.is_dir():
        check_folder(path)
        return path
    if path.exists():
        raise ModelError(f"{source} is a file but no .gguf; give a folder, a .gguf file or a hub id", code="M306")
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return source
    raise ModelError(
        f"there is no model {source!r}; give a folder, a .gguf file, a hub id (owner/name) or the built-in {BUILTIN!r}",
        code="M307",
    )


def _from_pretrained(place: Path | str, source: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        known = ("trust_remote_code", "revision")
        config = AutoConfig.from_pretrained(place, **{name: options[name] for name in known if name in options})
        return auto_class(auto_for(config)).from_pretrained(place, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _unreadable(source, error) from None
    except Exception as error:  # safetensors raises a class of its own
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(f"the weights in {source} are damaged ({error}); copy them again", code="M309") from None


def load_tokenizer(place: Path | str, **options: Any) -> Any:
    """The tokenizer beside the model; None when there is none (evaluation on text then says so)."""
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError):
        return None


def _unreadable(source: str, error: Exception) -> ModelError:
    first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{source} needs code of its own; read it, then pass --trust-remote-code if you trust it", code="M312"
        )
    return ModelError(f"cannot load {source}: {first}", code="M307")
