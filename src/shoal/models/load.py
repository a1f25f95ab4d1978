"""From a name to a model: hub id, folder, GGUF file or the built-in model. Safetensors only; nothing is unpickled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from shoal.errors import ModelError
from shoal.models import gguf
from shoal.models.compat import hide_offload_note
from shoal.models.depth import depth_of
from shoal.models.kinds import auto_class, auto_for
from shoal.models.matching_tensors import require_matching_tensors
from shoal.models.meta import meta_model
from shoal.models.opened import OpenedModel, open_model
from shoal.models.shards import check_folder
from shoal.models.streamed import device_map, require_streamable
from shoal.plan import Spec

BUILTIN = "smollm2"
MAX_DEPTH = 1_000
"""A config with more layers is damaged, and building its model, without weights, would take minutes."""


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and where both came from."""

    model: PreTrainedModel
    tokenizer: Any
    source: str
    folder: Path | None = None
    """The local folder that was read, for its side files; None for a hub id."""

    @property
    def opened(self) -> OpenedModel:
        """What is known of the model, found out once."""
        return open_model(self.model)


def load(
    source: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    stream: bool = False,
) -> Loaded:
    """Load a model for evaluation, by the Auto class that its config names: a causal language model, an encoder, ...

    `source`: "smollm2", a folder with config.json and safetensors, a .gguf file, a hub id, or a live model (returned as
    it is). `device`: cpu, cuda, mps, ... (default: the accelerator torch finds, else the CPU). `dtype`: auto, float32,
    bfloat16, float16 (default: what the checkpoint says). `stream`: leave the layers in their files and read each one
    when it runs, for a model that does not fit into memory. Raises `ModelError` (M3xx) with the remedy.
    """
    if isinstance(source, nn.Module):
        return Loaded(source, tokenizer, getattr(source, "name_or_path", "") or type(source).__name__)
    place = _place(str(source))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    config = load_config(source, trust_remote_code=trust_remote_code, revision=revision)  # before weights are read
    if stream:
        require_streamable(str(source), dtype)
        options["device_map"] = device_map(structure(config, source), device or default_device())
    chosen = dtype if dtype is not None else "auto"
    if isinstance(chosen, str) and chosen != "auto":
        chosen = dtype_of(chosen)
    with hide_offload_note():
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
        tokenizer = load_tokenizer(place, trust_remote_code=trust_remote_code, revision=options["revision"])
    model = model.eval() if stream else model.eval().to(device or default_device())
    return Loaded(model, tokenizer, str(source), place if isinstance(place, Path) else None)


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
    """The Spec of a folder or hub id from its config and the headers of its safetensors; no weight is loaded.

    Raises `ModelError` (M3xx) also for a folder whose tensors do not belong to the model of its config.
    """
    place = _place(str(source))
    model = structure(load_config(source, trust_remote_code=trust_remote_code), source)
    if isinstance(place, Path):
        require_matching_tensors(place, model, {name: found.shape for name, found in check_folder(place).items()})
    return open_model(model).spec


def local_folder(source: str | Path) -> Path:
    """The checked folder of a local model, of a .gguf file or of the built-in model (both converted on first use).
    Raises M317 for a hub id."""
    place = _place(str(source))
    if isinstance(place, str):
        raise ModelError(f"{source} is a hub id, not a local folder; download it and give its folder", code="M317")
    return place


def gguf_file(source: str | Path) -> Path | None:
    """The GGUF file that a model's name stands for: a .gguf file itself, or that of the built-in model; else None."""
    if str(source) == BUILTIN:
        return gguf.builtin_file()
    path = Path(source).expanduser()
    return path if path.suffix == ".gguf" else None


def load_config(
    source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedConfig:
    """The config of a folder, hub id or the built-in model. Raises M307, M312, M332."""
    place = _place(str(source))
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, revision=revision or "main")
        text = config.get_text_config(decoder=True)
    except Exception as error:  # config classes check their fields with errors of their own
        raise _unreadable(str(source), error) from None
    if not isinstance(text, PreTrainedConfig):
        raise ModelError(
            f"cannot load {source}: its config has a part for text that {config.model_type} does not know; mend it",
            code="M307",
        )
    _require_depth(config, source)
    return config


def structure(config: PreTrainedConfig, source: str | Path) -> PreTrainedModel:
    """`meta_model(config)`. Raises M307 when no causal language model can be made of it, M332 for a depth
    that no model has."""
    _require_depth(config, source)
    try:
        return meta_model(config)
    except Exception as error:  # odd numbers in a config raise whatever the arithmetic with them raises
        raise ModelError(
            f"no causal language model can be made of the config of {source}: {_first_line(error)}", code="M307"
        ) from None


def _require_depth(config: PreTrainedConfig, source: str | Path) -> None:
    depth = depth_of(config.get_text_config(decoder=True))
    if depth is not None and not 0 < depth <= MAX_DEPTH:
        raise ModelError(
            f"the config of {source} says {str(depth)[:20]} layers; a model has 1 to {MAX_DEPTH}", code="M332"
        )


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
    except Exception:  # files of other people: tokenizers, config classes and parsers raise classes of their own
        return None


def _unreadable(source: str, error: Exception) -> ModelError:
    first = _first_line(error)
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{source} needs code of its own; read it, then pass --trust-remote-code if you trust it", code="M312"
        )
    return ModelError(f"cannot load {source}: {first}", code="M307")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
