"""A LoRA adapter, or another one that peft puts into the modules of a model, beside its base."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import nn
from transformers import PreTrainedModel

from shoal.errors import ModelError
from shoal.models.checkpoint import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter at work in a model; the model keeps its class and gets other modules."""

    folder: Path
    wrapped: Any
    """peft's own model around the base."""
    before: Mapping[str, nn.Module]
    """The base's own modules, by name."""
    trained: frozenset[str]
    """The base's parameters that took part in training; peft takes all out of it."""

    def detach(self) -> None:
        """Give the base its own modules back. peft's `unload` would leave trained copies of whole modules in it."""
        _restore(self.before, self.trained)


def is_adapted(model: nn.Module) -> bool:
    """Whether an adapter sits in the modules of a model, put there by peft or by `load_adapter` of transformers."""
    return any(".base_layer." in name or ".lora_" in name for name, _ in model.named_parameters())


def adapter_config(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says. Raises M380 for a folder that is no adapter, M381 for pickled weights."""
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} is no adapter: it has no {CONFIG}; give the folder that peft's save_pretrained wrote",
            code="M380",
        )
    found = read_json(folder / CONFIG)
    if not isinstance(found, dict) or not isinstance(found.get("peft_type"), str):
        raise ModelError(f"{folder / CONFIG} names no peft_type; give the folder of an adapter", code="M380")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{folder} has no {WEIGHTS}; save the adapter with safetensors, as Shoal unpickles nothing", code="M381"
        )
    return found


def attach(model: PreTrainedModel, folder: str | Path, source: str) -> Adapter:
    """Put the adapter of a folder into `model`, in evaluation mode, and require that each of its tensors finds its
    place.

    Raises `ModelError` M380 and M381 (see `adapter_config`), M382 where peft is not installed, M383 for an adapter that
    does not sit in modules (prompts, aLoRA), M384 for one of another model.
    """
    place = Path(folder).expanduser()
    named = adapter_config(place)
    peft = require_peft(place)
    if is_adapted(model):
        raise ModelError(
            f"{source} has an adapter already; merge it first (merge_and_unload), or load the base", code="M384"
        )
    try:
        config = peft.PeftConfig.from_pretrained(str(place))
    except Exception as error:  # a config class checks its fields with errors of its own
        raise ModelError(f"peft cannot read {place / CONFIG} ({_first(error)}); save it anew", code="M380") from None
    if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
        kind = named["peft_type"] if config.is_prompt_learning else "aLoRA"
        raise ModelError(
            f"the adapter {place} is of the type {kind}, which does not stay in the layers; use a LoRA adapter, or "
            "merge this one first",
            code="M383",
        )
    own = {f"base_model.model.{name}" for name in model.state_dict()}
    modules = dict(model.named_modules(remove_duplicate=False))
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that are missing: they are looked at below
            wrapped = peft.PeftModel.from_pretrained(model, str(place))
    except Exception as error:  # peft says that nothing fits in several classes
        _restore(modules, trained)
        raise _other(place, source, _first(error)) from None
    found = Adapter(place, wrapped.eval(), modules, trained)
    _require_all(peft, found, source, own)
    return found


def _restore(modules: Mapping[str, nn.Module], trained: frozenset[str]) -> None:
    """Put the modules of a model, by name, back into it, and let these parameters take part in training again."""
    for name, module in modules.items():
        if name:
            owner, _, attr = name.rpartition(".")
            modules[owner]._modules[attr] = module
    modules[""].__dict__.pop("peft_config", None)
    for name, parameter in modules[""].named_parameters():
        parameter.requires_grad_(name in trained)


def require_peft(folder: Path) -> Any:
    """The library. Raises M382."""
    try:
        import peft
    except ImportError:
        raise ModelError(f"the adapter {folder} needs peft: pip install shoal[heal]", code="M382") from None
    return peft


def adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter's tensors. Raises M381 for a damaged file."""
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged ({_first(error)}); copy it again", code="M381") from None


def _require_all(peft: Any, adapter: Adapter, source: str, own: set[str]) -> None:
    """Every tensor of the file is in the model, and no other is one that peft filled by itself. `own`: the model's
    tensors, of which an embedding may be saved whole because its vocabulary was resized."""
    there = adapter_shapes(adapter.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vocabularies that may have been resized
        state = peft.get_peft_model_state_dict(adapter.wrapped, save_embedding_layers=False)
    mine = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in there.keys() | mine.keys() if there.get(name) != mine.get(name))
    wrong = [name for name in wrong if name in mine or name.replace(".base_layer.", ".") not in own]
    if wrong:
        adapter.detach()
        what = "holds no" if wrong[0] in mine else "has"
        raise _other(adapter.folder, source, f"{len(wrong)} tensors differ: it {what} {wrong[0]}")


def _other(folder: Path, source: str, why: str) -> ModelError:
    return ModelError(
        f"the adapter {folder} does not fit {source}: {why}; give the base that it was made for", code="M384"
    )


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
