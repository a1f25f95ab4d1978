"""From a name to a model: hub id, folder, GGUF file or the built-in model. Safetensors only; nothing is unpickled."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from shoal.errors import ModelError, ShoalError, UsageError, first_line, is_out_of_memory, note, out_of_memory
from shoal.models.adapter import Adapter, adapter_config, attach
from shoal.models.checked_source import (
    BUILTIN,
    MAX_DEPTH,
    CheckedSource,
    check_source,
    gguf_file,
    load_config,
    local_folder,
    structure,
    unreadable,
)
from shoal.models.compat import hide_offload_note
from shoal.models.kinds import auto_class, auto_for
from shoal.models.opened import OpenedModel, open_model
from shoal.models.origin import Origin
from shoal.models.placed import DeviceMap, expanded, place_for_converted, read_device_map
from shoal.models.quantised import require_quantiser
from shoal.models.streamed import device_map as streaming_map
from shoal.models.streamed import refuse_packed, require_streamable
from shoal.plan import Spec
from shoal.plan.file import is_planned

__all__ = [
    "BUILTIN", "MAX_DEPTH", "Loaded", "check_source", "default_device", "dtype_of", "gguf_file", "inspect_source",
    "load", "load_config", "load_tokenizer", "local_folder", "structure", "usable_device",
]  # fmt: skip


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
"""Files that show that a folder has a tokenizer."""


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and where both came from."""

    model: PreTrainedModel
    tokenizer: Any
    source: str
    folder: Path | None = None
    """The local folder that was read, for its side files; None for a hub id."""
    adapter: Adapter | None = None
    """What peft put into the model's modules."""
    origin: Origin | None = None
    """How another process reads the same model; None for one that was given as an object."""

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
    adapter: str | Path | None = None,
    device_map: DeviceMap | Path | None = None,
) -> Loaded:
    """Load a model for evaluation, by the Auto class that its config names: a causal language model, an encoder, ...

    `source`: "smollm2", a folder with config.json and safetensors, a .gguf file, a hub id, or a live model (returned as
    it is). `device`: cpu, cuda, mps, ... (default: the accelerator torch finds, else the CPU). `dtype`: auto, float32,
    bfloat16, float16 (default: what the checkpoint says). `stream`: leave the layers in their files and read each one
    when it runs, for a model that does not fit into memory. `adapter`: the folder of a LoRA adapter, which peft puts
    into the model. `device_map`: spread the model over several devices and the disk by accelerate: auto, balanced,
    balanced_low_0, sequential, {module: device or disk}, or a .json file of such pairs. Raises `ModelError` (M3xx) with
    the remedy, U736 for a device map beside `device` or `stream`.
    """
    if isinstance(source, nn.Module):
        return Loaded(source, tokenizer, getattr(source, "name_or_path", "") or type(source).__name__)
    if adapter is not None:
        _require_adapter(adapter, stream)
    if device_map is not None:
        _require_alone(device, stream)
        device_map = read_device_map(device_map, str(source))
    place_for = usable_device(device)
    chosen = "auto" if dtype in (None, "auto") else dtype_of(dtype) if isinstance(dtype, str) else dtype
    if is_planned(Path(source).expanduser()):
        return _planned(
            Path(source).expanduser(), tokenizer, place_for, chosen, attention,
            stream or adapter is not None or device_map is not None,
        )  # fmt: skip
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    checked = check_source(source, **trust)  # before weights are read
    require_quantiser(checked.config, checked.name)
    options: dict[str, Any] = dict(trust)
    if stream:
        require_streamable(checked.name, dtype, checked.config)
        options["device_map"] = streaming_map(checked.structure, place_for)
    elif device_map is not None:
        options["device_map"] = expanded(device_map, checked.structure, checked.name)
        if not isinstance(device_map, str) and "disk" in device_map.values():
            refuse_packed(checked.name, checked.config)
    placed = "device_map" in options
    with hide_offload_note(), place_for_converted(placed) as held:
        model, info = _from_pretrained(
            checked, dtype=chosen, use_safetensors=True, attn_implementation=attention, **options, **held
        )
        held["model"] = model
    _require_all(checked.name, info)
    if tokenizer is None:
        tokenizer = load_tokenizer(checked.place, **trust)
    model = model.eval() if placed else _moved(model.eval(), place_for, checked.name)
    put = None if adapter is None else attach(model, adapter, checked.name)
    origin = Origin.of(
        source, dtype=dtype, attention=attention, adapter=adapter, stream=stream, device_map=device_map, **trust
    )
    return Loaded(model, tokenizer, checked.name, checked.folder, put, origin)


def _planned(folder: Path, tokenizer: Any, device: str, dtype: Any, attention: str | None, changed: bool) -> Loaded:
    """A planned checkpoint with its plan on it. Raises M382 for what is `changed` about one: layers left in their
    files, an adapter."""
    if changed:
        raise ModelError(
            f"{folder} is a planned checkpoint, which is loaded whole, onto one device and without an adapter; leave "
            "--stream, --device-map and --adapter out",
            code="M382",
        )
    import_module(
        "shoal.auto"
    )  # by name: it stands above this room, and tells transformers how such a folder is loaded
    with hide_offload_note():
        try:
            auto = auto_class(auto_for(AutoConfig.from_pretrained(folder)))
            model = auto.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
        except ShoalError:
            raise
        except Exception as error:  # config classes and readers of files raise what they like
            if is_out_of_memory(error):
                raise out_of_memory(error) from None
            raise unreadable(str(folder), error) from None
    return Loaded(_moved(model, device, str(folder)), tokenizer or load_tokenizer(folder), str(folder), folder)


def _require_adapter(adapter: str | Path, stream: bool) -> None:
    """Before weights are read: M380 and M381 for a folder that is no adapter, U672 for layers that stay in files."""
    if stream:
        raise UsageError(
            "layers that stay in their files take no adapter; leave --stream or --adapter out", code="U672"
        )
    adapter_config(Path(adapter).expanduser())


def _require_alone(device: str | None, stream: bool) -> None:
    """U736 for a device map beside what also says where the model goes."""
    if device is not None or stream:
        other = "--stream, which leaves all layers in their files" if stream else f"--device {device}"
        raise UsageError(f"--device-map says where each part goes, and so does {other}; give one of them", code="U736")


def _require_all(source: str, info: dict[str, Any]) -> None:
    """M310 for what the headers did not tell: tensors that transformers puts together from several."""
    names = [str(key) for key in (*info["missing_keys"], *info["mismatched_keys"])]
    if names:
        raise ModelError(
            f"{source} lacks {len(names)} tensors of its model, such as {min(names)}; "
            "transformers would fill them with random numbers, so the folder is not used",
            code="M310",
        )


def _moved(model: PreTrainedModel, device: str, source: str) -> PreTrainedModel:
    """The model on the device; M355 where it does not fit, or is bound to another."""
    try:
        return model.to(device)
    except Exception as error:  # out of memory, or a quantised model that stays where it is
        rest = "; spread it with --device-map auto, or take --stream" if is_out_of_memory(error) else ""
        raise ModelError(f"{source} cannot be put on {device}: {first_line(error)}{rest}", code="M355") from None


def default_device() -> str:
    """The accelerator that torch finds, else cpu."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]


def usable_device(name: str | None) -> str:
    """`name`, or the default device without one. Raises M354 for a device that this torch does not know or that this
    machine has not."""
    if name is None:
        return default_device()
    try:
        torch.empty(1, device=name).cpu()  # a tensor on meta has nothing to copy
    except Exception as error:  # torch has a class for each way in which a device is not there
        why = first_line(error, 120)
        raise ModelError(
            f"the device {name!r:.40} cannot be used here ({why}); use {default_device()}", code="M354"
        ) from None
    return name


def dtype_of(name: str) -> torch.dtype:
    """float32, bfloat16, float16 -> torch's dtype. Raises M311 for other names."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"unknown dtype {name!r}; use auto, float32, bfloat16 or float16", code="M311")
    return found


def inspect_source(source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Spec:
    """The Spec of a folder or hub id from its config and the headers of its safetensors; no weight is loaded.

    Raises `ModelError` (M3xx) also for a folder whose tensors do not belong to the model of its config.
    """
    checked = check_source(source, trust_remote_code=trust_remote_code, revision=revision)
    return open_model(checked.structure).spec


def _from_pretrained(checked: CheckedSource, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    auto = auto_class(auto_for(checked.config))
    try:
        made: tuple[PreTrainedModel, dict[str, Any]] = auto.from_pretrained(
            checked.place, output_loading_info=True, **options
        )
    except Exception as error:  # transformers, a quantiser, accelerate, torch and safetensors raise what they like
        if is_out_of_memory(error):
            raise out_of_memory(error) from None
        raise unreadable(checked.name, error) from None
    return made


def load_tokenizer(place: Path | str, **options: Any) -> Any:
    """The tokenizer beside the model; None when there is none (evaluation on text then says so), or when its files
    cannot be read, which is a `ShoalNote`."""
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except (
        Exception
    ) as error:  # files of other people: tokenizers, config classes and parsers raise classes of their own
        if isinstance(place, Path) and any((place / name).is_file() for name in _TOKENIZERS):
            note(f"the tokenizer in {place} cannot be read: {first_line(error)}")
        return None
