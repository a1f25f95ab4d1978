"""A LoRA adapter for a model of another depth: its layers renumbered as those of the base are."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from shoal.errors import WriteError
from shoal.models.adapter import CONFIG, WEIGHTS, adapter_config, adapter_shapes, require_peft
from shoal.models.kinds import is_causal
from shoal.models.opened import open_model
from shoal.models.stacks import Stack, find_stacks
from shoal.writing.blueprint import Blueprint, Origin
from shoal.writing.output import write_text
from shoal.writing.side_files import copy_side_files

PLACE = "adapter"
"""The folder of the adapter in that of its base."""
PREFIX = "base_model.model."
"""What peft puts in front of the base's names."""


@dataclass(frozen=True, slots=True)
class Renumbered:
    """An adapter of a model of another depth."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def refuse_adapter(folder: Path, model: PreTrainedModel, plans: Blueprint) -> None:
    """Raise before any work what `renumbered` would raise for an adapter that cannot follow the plan: W295 for one that
    is not LoRA or counts layers in its own way, W296 for a layer that runs with new tensors, W297 for a tensor that is
    of no module of the model, W298 for a model that is not causal."""
    found = adapter_config(folder)
    kind = found["peft_type"]
    if kind != "LORA":
        raise WriteError(
            f"the adapter {folder} is of the type {kind}, and only those of LoRA are renumbered; merge it first "
            "(merge_and_unload), then write the plan",
            code="W295",
        )
    if found.get("layer_replication"):
        raise WriteError(
            f"the adapter {folder} repeats layers itself (layer_replication), so its numbers are not those of the "
            "base; merge it first (merge_and_unload), then write the plan",
            code="W295",
        )
    if found.get("target_parameters"):
        raise WriteError(
            f"the adapter {folder} adapts bare parameters (target_parameters), which are not told apart; merge it "
            "first (merge_and_unload), then write the plan",
            code="W295",
        )
    if not is_causal(model):
        raise WriteError("an adapter is renumbered beside causal language models only; merge it first", code="W298")
    for stack in find_stacks(model):
        for one in plans.of(stack.name).origins():
            if one.tie is not None:
                raise WriteError(
                    f"layer {one.slot} of the plan runs with the matrices of layer {one.tie}, and the adapter was made "
                    "for its own; merge the adapter first (merge_and_unload), or write a plan without ties",
                    code="W296",
                )
            if one.weights is not None:
                raise WriteError(
                    f"layer {one.slot} of the plan runs with new tensors ({one.weights}) and the adapter was made for "
                    "others; merge the adapter first (merge_and_unload), or write a plan without new tensors",
                    code="W296",
                )
    _require_known(adapter_shapes(folder), folder, model)


def renumbered(folder: Path, model: PreTrainedModel, plans: Blueprint, base: str) -> Renumbered:
    """The adapter of `folder`, made for `model`, as one of the stock model of `plans`, which is to be found at `base`.
    Raises what `refuse_adapter` raises, and W299 where none of its layers runs.

    Tensors of a layer go where the layer goes, to each place of a layer that runs twice; those of a layer or part that
    does not run are left out. `layers_to_transform` is renumbered. Patterns that name layers are tried: where they
    would no longer hit the same modules, or give another rank or alpha, the modules are named one by one.
    """
    refuse_adapter(folder, model, plans)
    peft, stored = require_peft(folder), adapter_config(folder)
    places = list(_places(model, plans))
    old = load_file(folder / WEIGHTS)
    tensors = {
        new: tensor.clone() for name, tensor in old.items() for new in _renamed(name.removeprefix(PREFIX), places)
    }
    tensors = {PREFIX + name: tensor for name, tensor in tensors.items()}
    if not tensors:
        raise WriteError(
            f"no layer that the adapter {folder} adapts runs in the plan {plans.plan}; write it without --adapter",
            code="W299",
        )
    config = peft.PeftConfig.from_pretrained(str(folder))
    every = [replace(place, silent={}) for place in places]  # a zeroed part is there, and must not be hit
    modules = {new: name for name, _ in model.named_modules() for new in _renamed(name, every) if name}
    wanted = {_module(name) for name in tensors if ".lora_" in name}
    changed = _targets(config, wanted, modules, plans) | _patterns(config, wanted, modules)
    return Renumbered({**stored, **changed, "base_model_name_or_path": base, "revision": None}, tensors)


def write_adapter(target: Path, adapter: Renumbered, source: Path) -> None:
    """The folder that peft loads, with the tokenizer and licence that lay beside the old one."""
    target.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in adapter.tensors.items()}, target / WEIGHTS, {"format": "pt"}
    )
    write_text(target / CONFIG, json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
    copy_side_files(source, target)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the layers of a stack go."""

    stack: Stack
    origins: tuple[Origin, ...]
    silent: Mapping[int, tuple[str, ...]]
    """Names of the modules of a zeroed part, by slot."""


def _places(model: PreTrainedModel, plans: Blueprint) -> Iterator[_Place]:
    for stack in find_stacks(model):
        own, facts = plans.of(stack.name), open_model(model).facts(stack.name).layers
        silent = dict[int, tuple[str, ...]]()
        for slot, part in own.zeroed:
            parts = facts[own.slots[slot]].parts
            assert parts is not None
            silent[slot] = parts.attention if part == "attention" else parts.mlp
        yield _Place(stack, tuple(own.origins()), silent)


def _renamed(name: str, places: Sequence[_Place]) -> list[str]:
    """What a module or tensor of the base is called in the model of the plan; several names for a layer that runs
    twice, none for one that does not run."""
    for place in places:
        head = f"{place.stack.path}."
        number, _, rest = name[len(head) :].partition(".") if name.startswith(head) else ("", "", "")
        if number.isdecimal():
            here = [one for one in place.origins if one.layer == int(number)]
            slots = sorted({one.slot for one in here if not rest or one.holds(f"{rest}.")})
            return [
                f"{head}{slot}.{rest}".removesuffix(".")
                for slot in slots
                if not any(f"{rest}.".startswith(f"{part}.") for part in place.silent.get(slot, ()))
            ]
    return [name]


def _module(name: str) -> str:
    """The module that a tensor of the adapter belongs to."""
    return name.removeprefix(PREFIX).partition(".lora_")[0]


def _targets(config: Any, wanted: set[str], modules: Mapping[str, str], plans: Blueprint) -> dict[str, Any]:
    """The fields that say which modules are adapted: as they are where they hit the same ones, with the layers of
    `layers_to_transform` renumbered, or else the names of all modules."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        if _hits(config, modules) == wanted:
            return {}
    else:
        known = [layers] if isinstance(layers, int) else list(layers)
        new = [slot for slot, layer in enumerate(plans.slots) if layer in known]
        made = copy.copy(config)
        made.layers_to_transform = new
        if new and _hits(made, modules) == wanted:
            return {"layers_to_transform": new}
    return {
        "target_modules": sorted(wanted), "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip


def _hits(config: Any, modules: Mapping[str, str]) -> set[str]:
    """The modules that peft would adapt."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if config.target_modules is None or config.target_modules == "all-linear":  # by the class of a module, not its name
        return set()
    found = {name: check_target_module_exists(config, name) for name in modules}
    return {name for name, hit in found.items() if hit and type(hit).__name__ != "_ExcludedModule"}


def _patterns(config: Any, wanted: set[str], modules: Mapping[str, str]) -> dict[str, Any]:
    """Ranks and alphas by module: as they are where each module keeps its own, or else named one by one."""
    from peft.utils.other import get_pattern_key

    changed = {}
    for field, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        pattern = getattr(config, field) or {}
        values = {
            name: [pattern.get(get_pattern_key(list(pattern), of), default) for of in (modules[name], name)]
            for name in wanted
        }
        if any(before != after for before, after in values.values()):
            changed[field] = {name: before for name, (before, _) in sorted(values.items()) if before != default}
    return changed


def _require_known(shapes: Mapping[str, Any], folder: Path, model: PreTrainedModel) -> None:
    """Raise W297 for a tensor that is of no module of the model."""
    modules = {name for name, _ in model.named_modules()}
    tensors = set(model.state_dict())
    for name in shapes:
        own = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        if not name.startswith(PREFIX) or not (_module(name) in modules or own in tensors):
            raise WriteError(
                f"the tensor {name} of the adapter {folder} is of no module of {type(model).__name__}, so it is not "
                "known to which layer it belongs; merge the adapter first (merge_and_unload)",
                code="W297",
            )
