"""A model spread over devices and the disk by a device map: which maps are taken, and where layers are then."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.errors import ModelError, first_line
from shoal.models.stacks import find_stacks

Device = str | int
DeviceMap = str | Mapping[str, Device]
"""auto, balanced, balanced_low_0, sequential, a device, or {module: device or disk}."""
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""The maps that accelerate works out of the memory of the machine."""
_HELD = ("cpu", "disk")
"""Where a part may lie that runs elsewhere: on the accelerator, where the map names one."""


def read_device_map(asked: DeviceMap | Path, source: str) -> DeviceMap:
    """A device map as it was given, or as a JSON file holds it, its devices tried. Raises M386 without accelerate, M387
    for a file that holds no map and for an unknown word, M388 for a device that this machine has not."""
    if find_spec("accelerate") is None:
        raise ModelError(
            f"placing {source} by a device map needs the package accelerate; run: pip install 'shoal[stream]'",
            code="M386",
        )
    found = asked if isinstance(asked, Mapping) else _spelled(str(asked))
    if isinstance(found, str):
        if found not in STRATEGIES:
            _require_device(found, "everything")
        return found
    for name, device in found.items():
        if not isinstance(name, str) or isinstance(device, bool) or not isinstance(device, str | int):
            raise ModelError(
                f"the device map puts {str(name)!r:.60} on {device!r:.40}; write the name of a module and a device, "
                "its number, or disk",
                code="M387",
            )
        if device != "disk":
            _require_device(device, name or "everything")
    return dict(found)


def expanded(given: DeviceMap, structure: PreTrainedModel, source: str) -> str | dict[str, Device]:
    """A map of modules in which none lies inside another, so that no name is a prefix that others match; words of
    accelerate as they are. `structure`: the model on meta.

    Raises M389 for a name that the model has not, and where the map leaves tensors out; M390 for a layer whose parts
    would run on several devices.
    """
    if isinstance(given, str):
        return given
    known = {name for name, _ in structure.named_modules()} | {
        name for name, _ in (*structure.named_parameters(), *structure.named_buffers())
    }
    if (stray := next((name for name in given if name not in known), None)) is not None:
        raise ModelError(f"the device map places {stray!r:.80}, which {source} has not", code="M389")
    found: dict[str, Device] = {}

    def put(name: str) -> None:
        device = _device_of(name, given)
        if device is None:
            raise ModelError(
                f"the device map says nothing of {name}, a part of {source}; place it, or everything else under ''",
                code="M389",
            )
        found[name] = device

    def visit(module: nn.Module, name: str) -> None:
        prefix = f"{name}." if name else ""
        if not any(key.startswith(prefix) and key != name for key in given):
            if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
                put(name)
            return
        for child, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            put(prefix + child)
        for child, inner in module.named_children():
            visit(inner, prefix + child)

    visit(structure, "")
    _require_whole_layers(found, structure)
    return found


@contextmanager
def place_for_converted(use: bool) -> Iterator[dict[str, Any]]:
    """Options for `from_pretrained` with a folder for tensors that lie on the disk in another form than in the files
    (experts put together): it goes when the model that is put under `model` goes, or when there is none."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-")) if use else None
    held: dict[str, Any] = {} if folder is None else {"offload_folder": str(folder)}
    try:
        yield held
    finally:
        model = held.get("model")
        if folder is not None and (model is None or not any(folder.iterdir())):
            shutil.rmtree(folder, ignore_errors=True)
        elif folder is not None:
            weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights lie on the disk, or wait on the CPU for the accelerator."""
    return any(parameter.is_meta for parameter in model.parameters())


def placed_devices(model: nn.Module) -> tuple[str, ...]:
    """Where the parts of a model lie by its device map, in its order; empty without one."""
    return tuple(dict.fromkeys(str(device) for device in getattr(model, "hf_device_map", {}).values()))


def is_placed(model: nn.Module) -> bool:
    """Whether a device map spreads the model over several places."""
    return len(placed_devices(model)) > 1 or is_offloaded(model)


def _spelled(text: str) -> DeviceMap:
    """A word of the command line: the content of a .json file, else the word itself."""
    if not text.endswith(".json"):
        return text
    try:
        found = json.loads(Path(text).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"the device map {text} cannot be read: {first_line(error)}", code="M387") from None
    if not isinstance(found, dict) or not found:
        raise ModelError(f"the device map {text} must hold module: device pairs, as in '': 'cpu'", code="M387")
    return found


def _require_device(device: Device, name: str) -> None:
    what, code = f"the device map puts {name} on {device!r:.40}, which is no device", "M387"
    try:
        if isinstance(device, str):
            torch.device(device)
        what, code = f"the device map puts {name} on {device!r:.40}, which this machine has not", "M388"
        torch.empty(1, device=device).cpu()  # a tensor on meta has nothing to copy
    except Exception as error:  # torch has a class for each way in which a device is not there
        raise ModelError(
            f"{what} ({first_line(error, 80)}); use {', '.join(STRATEGIES)}, a device that is here "
            f"({', '.join(_here())}), or a .json file of module: device pairs",
            code=code,
        ) from None


def _here() -> list[str]:
    """The devices of this machine."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    return ["cpu", *(f"{kind}:{number}" for number in range(torch.accelerator.device_count()))]


def _device_of(name: str, given: Mapping[str, Device]) -> Device | None:
    """The device of the closest module around `name` that the map names."""
    while name not in given:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return given[name]


def _require_whole_layers(found: Mapping[str, Device], structure: PreTrainedModel) -> None:
    main = next((device for device in found.values() if device not in _HELD), "cpu")
    for stack in find_stacks(structure):
        for index in range(stack.depth):
            inside = f"{stack.path}.{index}."
            runs = {name: main if at in _HELD else at for name, at in found.items() if name.startswith(inside)}
            if len({str(device) for device in runs.values()}) > 1:
                places = " and ".join(dict.fromkeys(str(device) for device in runs.values()))
                raise ModelError(
                    f"the device map runs parts of {stack.name} layer {index} on {places}; a layer runs on one device, "
                    "so place it whole",
                    code="M390",
                )
