"""A stock model of another depth: the config permuted, every tensor in its new place, nothing a stock class lacks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import WriteError
from shoal.executing.weights import plan_and_weights
from shoal.models.adapter import is_adapted
from shoal.models.backbone_outputs import renumbered_outputs
from shoal.models.depth import permuted_config
from shoal.models.kinds import CAUSAL, auto_of
from shoal.models.load import Loaded
from shoal.models.opened import open_model
from shoal.models.order import refuse_order
from shoal.models.other_readers import for_other_readers, renumbering
from shoal.models.picture_features import renumbered_features
from shoal.models.stacks import Stack, find_stacks, unwrap
from shoal.plan import Given, Plan
from shoal.writing.assemble import assembled
from shoal.writing.blueprint import Blueprint, StackSlots, Tensors
from shoal.writing.own_tensors import own_tensors
from shoal.writing.papers import generation_for
from shoal.writing.same_layers import require_same_layers
from shoal.writing.shared_kv import with_readers
from shoal.writing.slots import slots_of
from shoal.writing.stack_depths import described, refuse_cache, with_depths
from shoal.writing.tensors import moved_tensors, resized_tensors
from shoal.writing.widths import with_width


def blueprint(
    model: PreTrainedModel,
    plan: Plan,
    *,
    zero_parts: bool = False,
    weights: Mapping[str, torch.Tensor] | None = None,
    joined: bool = True,
) -> Blueprint:
    """Work out the stock model of `plan`, or refuse: W201 part runs, W202 parallel, W203 KV source, W204 map, W205 gate
    or exit, W206 a config field, W207 a number made from the layer's position, W208 a tensor whose size follows the
    depth, W209 replaced weights that are not given or do not fit the layer, W212 a quantised model, W216 a config that
    its own class does not accept, W241 a decoder deeper than its encoder where transformers sizes the cache by the
    encoder, W242 a numbered output of a layer that is gone, W276 unlike numbers of neurons.
    Raises `PlanError` P126 for an order in which the family's layers cannot run, P151 and P152 for layers beside which
    the model adds what it sees in pictures.

    `zero_parts`: let a stock layer keep a dropped attention or mlp with all its tensors zero (exact, saves nothing).
    `joined`: let an attention run and the mlp run behind it be one layer (W283 where they are none). `model` may be on
    the meta device.
    """
    refuse_quantised(model)
    stacks = find_stacks(model)
    by_stack = {
        stack.name: slots_of(model, stack, plan.steps(stack.name), zero_parts=zero_parts, joined=joined)
        for stack in stacks
    }
    config, changed = model.config, dict[str, tuple[Any, Any]]()
    for stack in stacks:
        refuse_order(stack, by_stack[stack.name].slots)
        config, fields = _permuted(model, config, stack, by_stack[stack.name])
        changed |= fields if len(stacks) == 1 else {described(model, stack, name): v for name, v in fields.items()}
    slots = {name: found.slots for name, found in by_stack.items()}
    readers = {name: {slot for slot, _ in found.readers} for name, found in by_stack.items()}
    config, others = for_other_readers(model, config, stacks, slots)
    changed |= others
    try:
        read_back = _read_back(config)
        refuse_cache(model.config, read_back, stacks, {name: len(found.slots) for name, found in by_stack.items()})
        lacks = require_same_layers(model, stacks, read_back, slots, readers)
    except (ValueError, AttributeError, StrictDataclassError) as error:  # its own checks, and mixed per-layer values
        why = str(error).strip().splitlines()[-1].strip()[:300]
        raise WriteError(
            f"no config of {stacks[0].config.model_type} describes these layers: {why}; run the plan live", code="W216"
        ) from error
    config, fields, narrower = with_width(model, config, by_stack, weights or {})
    changed |= fields
    own: Tensors = {}
    for stack in stacks:
        layers = open_model(model).spec.stack(stack.name).layers
        by_stack[stack.name], mine = own_tensors(model, stack, layers, by_stack[stack.name], weights or {})
        by_stack[stack.name] = by_stack[stack.name]._replace(lacks=lacks[stack.name])
        own |= mine
    main = by_stack[plan.stack_name()]
    beside = tuple((name, found) for name, found in by_stack.items() if name != plan.stack_name())
    fewer = narrower + sum(_lacking(stack, by_stack[stack.name]) for stack in stacks)
    return Blueprint(
        plan=plan, config=config, changed=changed, weights=own, others=beside, fewer=fewer, **main._asdict()
    )


def _lacking(stack: Stack, found: StackSlots) -> int:
    """Elements of the tensors that slots lack."""
    held = ((stack.layer(found.slots[slot]).state_dict(), names) for slot, names in found.lacks)
    return sum(tensor.numel() for state, names in held for name, tensor in state.items() if name.startswith(names))


def rewrite(
    model: nn.Module | Loaded,
    plan: Given,
    *,
    zero_parts: bool = False,
    weights: Mapping[str, torch.Tensor] | None = None,
    plans: Blueprint | None = None,
) -> PreTrainedModel:
    """A new stock model that computes what `plan` computes live; tensors are shared with `model` where nothing changes,
    a layer that runs twice is two layers with equal weights. `plan`: a Plan, depth notation, or the place of a
    plan.json. `weights`: the tensors that the plan names, as `running` takes them. `plans`: the blueprint, when it is
    known already.

    Raises `WriteError` before any work: see `require_writable` and `blueprint`."""
    inner = require_writable(model.model if isinstance(model, Loaded) else model)
    if plans is None:
        plan, weights = plan_and_weights(plan, Plan.identity(open_model(inner).spec), weights)
        plans = blueprint(inner, plan, zero_parts=zero_parts, weights=weights)
    base = inner.state_dict()
    tensors = dict(base)
    for stack in find_stacks(inner):
        own = plans.of(stack.name)
        tensors = moved_tensors(tensors, stack, own, open_model(inner), base)
        tensors |= resized_tensors(base, stack, own.slots)
    made = assembled(inner, plans.config, tensors)
    if getattr(inner, "generation_config", None) is not None:  # encoders have none
        stack = open_model(inner).stack()
        made.generation_config = generation_for(inner.generation_config, renumbering(stack, plans.of(stack.name).slots))
    return made


def refuse_quantised(model: PreTrainedModel) -> None:
    """Raise W212 for a model with a quantiser: its modules are none that a stock model of other layers has."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise WriteError("the model is quantised; load it dequantised to write it", code="W212")


def require_writable(model: nn.Module) -> PreTrainedModel:
    """The model itself when its weights can be written as they are: W211 adapters, W212 quantised, W214 not in memory,
    W215 a class that the Auto class would not load."""
    inner = unwrap(model)
    if inner is not model or is_adapted(inner):
        raise WriteError(
            "the model is wrapped by PEFT; merge the adapter first (model.merge_and_unload())", code="W211"
        )
    refuse_quantised(inner)
    if any(p.is_meta for p in inner.parameters()):
        raise WriteError("some weights of the model are not in memory; load it without offloading", code="W214")
    if auto_of(inner) is None:
        raise WriteError(
            f"{CAUSAL} would not load {type(inner).__name__} from a {type(inner.config).__name__}, nor would another "
            "Auto class, so no stock checkpoint of it can be written; run the plan live",
            code="W215",
        )
    return inner


def _permuted(
    model: PreTrainedModel, whole: PreTrainedConfig, stack: Stack, found: StackSlots
) -> tuple[PreTrainedConfig, dict[str, tuple[Any, Any]]]:
    """`whole`, the config of `model` with the stacks before this one in place, with this one in place too."""
    slots = found.slots
    if stack.fields:
        return with_depths(whole, stack, slots)
    text, changed = permuted_config(stack.config, slots)
    changed |= with_readers(text, stack, found.readers)
    changed |= renumbered_outputs(stack.config, text, slots)
    if stack.config is model.config:
        return text, changed
    made = _whole_config(whole, model.config, stack.config, text)
    if stack.name == "decoder":
        changed |= renumbered_features(model.config, made, stack.depth, slots)
    return made, changed


def _whole_config(
    whole: PreTrainedConfig, base: PreTrainedConfig, old: PreTrainedConfig, new: PreTrainedConfig
) -> PreTrainedConfig:
    """`whole` with one of its configs exchanged; `old` is that config in `base`, of which `whole` was made."""
    made = copy.deepcopy(whole)
    *outer, name = _path(base, old)
    owner = made
    for step in outer:
        owner = getattr(owner, step)
    setattr(owner, name, new)
    return made


def _path(base: PreTrainedConfig, wanted: PreTrainedConfig) -> tuple[str, ...]:
    """The names that lead from `base` to a config inside it; empty when it is not there."""
    for name in base.sub_configs:
        inner = getattr(base, name, None)
        if inner is wanted:
            return (name,)
        if isinstance(inner, PreTrainedConfig) and (rest := _path(inner, wanted)):
            return (name, *rest)
    return ()


def _read_back(config: PreTrainedConfig) -> PreTrainedConfig:
    """What a reader of config.json will have: a config class may fill in or force values when it is made."""
    with tempfile.TemporaryDirectory(prefix="shoal-config-") as place:
        config.save_pretrained(place)
        return type(config).from_pretrained(place, local_files_only=True)
