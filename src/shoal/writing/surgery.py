"""A stock model of another depth: the config permuted, every tensor in its new place, nothing a stock class lacks."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shoal.errors import WriteError
from shoal.models.depth import permuted_config
from shoal.models.families import family_of
from shoal.models.load import meta_model
from shoal.models.order import refuse_order
from shoal.models.parts import INDEX_NAMES
from shoal.models.probe import probe
from shoal.models.stacks import Stack, find_stack, find_stacks, unwrap
from shoal.plan import Exit, Map, Parallel, Plan, Run, format_steps
from shoal.writing.assemble import assembled

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Blueprint:
    """How a plan becomes a stock model: known before a weight is read."""

    plan: Plan
    slots: tuple[int, ...]
    """Base layer of each slot."""
    silent: tuple[tuple[int, str], ...]
    """(slot, part) whose tensors are zeroed so that it adds nothing."""
    config: PreTrainedConfig
    changed: dict[str, tuple[Any, Any]]


def blueprint(model: PreTrainedModel, plan: Plan, *, zero_parts: bool = False) -> Blueprint:
    """Work out the stock model of `plan`, or refuse: W201 part runs, W202 parallel, W203 KV source, W204 map, W205 gate
    or exit, W206 a config field, W207 a number made from the layer's position, W208 a tensor whose size follows the
    depth, W209 replaced weights, W210 several stacks, W216 a config that its own class does not accept.
    Raises `PlanError` P126 for an order in which the family's layers cannot run.

    `zero_parts`: let a stock layer keep a dropped attention or mlp with all its tensors zero (exact, saves nothing).
    `model` may be on the meta device.
    """
    stacks = find_stacks(model)
    if len(stacks) != 1:
        raise WriteError("only models with one stack can be written so far; run the plan live", code="W210")
    stack = stacks[0]
    slots, silent = _slots(plan, zero_parts)
    refuse_order(stack, slots)
    text, changed = permuted_config(stack.config, slots)
    config = _whole_config(model.config, stack.config, text)
    try:
        _same_layers(model, stack, _read_back(config), slots)
    except (ValueError, AttributeError) as error:  # its own checks of its fields, and mixed per-layer values
        why = str(error).strip().splitlines()[-1].strip()[:300]
        raise WriteError(
            f"no config of {stack.config.model_type} describes these layers: {why}; run the plan live", code="W216"
        ) from error
    return Blueprint(plan, slots, silent, config, changed)


def rewrite(
    model: nn.Module, plan: Plan, *, zero_parts: bool = False, plans: Blueprint | None = None
) -> PreTrainedModel:
    """A new stock model that computes what `plan` computes live; tensors are shared with `model` where nothing changes,
    a layer that runs twice is two layers with equal weights. `plans`: the blueprint, when it is known already.

    Raises `WriteError` before any work: see `require_writable` and `blueprint`."""
    inner = require_writable(model)
    plans = plans or blueprint(inner, plan, zero_parts=zero_parts)
    stack = find_stack(inner)
    base = inner.state_dict()
    tensors = moved_tensors(base, stack, plans, probe(inner, stack).layers)
    tensors |= resized_tensors(base, stack, plans.slots)
    made = assembled(inner, plans.config, tensors)
    made.generation_config = inner.generation_config
    return made


def require_writable(model: nn.Module) -> PreTrainedModel:
    """The model itself when its weights can be written as they are: W211 adapters, W212 quantised, W214 not in memory,
    W215 a class that the Auto class would not load."""
    inner = unwrap(model)
    if inner is not model:
        raise WriteError(
            "the model is wrapped by PEFT; merge the adapter first (model.merge_and_unload())", code="W211"
        )
    if getattr(inner, "hf_quantizer", None) is not None:
        raise WriteError("the model is quantised; load it dequantised to write it", code="W212")
    if any(p.is_meta for p in inner.parameters()):
        raise WriteError("some weights of the model are not in memory; load it without offloading", code="W214")
    found = AutoModelForCausalLM._model_mapping.get(type(inner.config), ())
    if type(inner) not in (found if isinstance(found, tuple | list) else (found,)):
        raise WriteError(
            f"AutoModelForCausalLM would not load {type(inner).__name__} from a {type(inner.config).__name__}, so no "
            "stock checkpoint of it can be written; run the plan live",
            code="W215",
        )
    return inner


def moved_tensors(tensors: Tensors, stack: Stack, plans: Blueprint, facts: list[Any]) -> Tensors:
    """The state dict of the stock model: tensors of layer i under the name of each slot that runs it. Those of
    `resized_tensors` are as they were."""
    prefix = f"{stack.path}."
    by_layer: dict[int, Tensors] = {}
    moved: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            number, _, rest = name[len(prefix) :].partition(".")
            by_layer.setdefault(int(number), {})[rest] = tensor
        else:
            moved[name] = tensor
    used: set[int] = set()
    for slot, layer in enumerate(plans.slots):
        silent = {part for s, part in plans.silent if s == slot}
        quiet = tuple(f"{n}." for part in silent for n in getattr(facts[layer].parts, part))
        for rest, tensor in by_layer[layer].items():
            value = torch.zeros_like(tensor) if quiet and rest.startswith(quiet) else tensor
            # two slots must not share storage: a stock checkpoint cannot say so
            moved[f"{prefix}{slot}.{rest}"] = value.clone() if layer in used else value
        used.add(layer)
    return moved


def _slots(plan: Plan, zero_parts: bool) -> tuple[tuple[int, ...], tuple[tuple[int, str], ...]]:
    slots: list[int] = []
    silent: list[tuple[int, str]] = []
    for step in plan.steps():
        text = format_steps((step,))
        match step:
            case Parallel():
                raise _refusal("W202", text, "a stock model runs its layers one after the other", "run the plan live")
            case Map():
                span = f"{step.first}-{step.last}"
                raise _refusal("W204", text, "a stock model has no fitted maps", f"drop {span} instead")
            case Exit():
                raise _refusal("W205", text, "a stock model always runs all its layers", "drop the layers behind it")
            case Run():
                pass
        if step.kv.read is not None:
            raise _refusal("W203", text, "a stock layer uses its own keys and values", f"write {step.layer} without @")
        if step.gate is not None:
            raise _refusal("W205", text, "a stock model decides nothing at run time", f"keep or drop {step.layer}")
        if step.weights is not None:
            raise _refusal("W209", text, "replaced weights are not written yet", f"write {step.layer}")
        if step.part != "layer":
            if not zero_parts:
                raise _refusal(
                    "W201",
                    text,
                    "a stock layer has both attention and mlp",
                    f"keep {step.layer}, drop it, or ask for zeroed projections (--zero-parts: exact, saves nothing)",
                )
            silent.append((len(slots), "mlp" if step.part == "attention" else "attention"))
        slots.append(step.layer)
    return tuple(slots), tuple(silent)


def _refusal(code: str, step: str, why: str, nearest: str) -> WriteError:
    return WriteError(f"step {step} cannot be written as a stock checkpoint: {why}; {nearest}", code=code)


def _whole_config(whole: PreTrainedConfig, old: PreTrainedConfig, new: PreTrainedConfig) -> PreTrainedConfig:
    """`whole` with its text config exchanged; the text config is often the whole."""
    if old is whole:
        return new
    made = copy.deepcopy(whole)
    setattr(made, next(n for n in whole.sub_configs if getattr(whole, n, None) is old), new)
    return made


def _read_back(config: PreTrainedConfig) -> PreTrainedConfig:
    """What a reader of config.json will have: a config class may fill in or force values when it is made."""
    with tempfile.TemporaryDirectory(prefix="shoal-config-") as place:
        config.save_pretrained(place)
        return type(config).from_pretrained(place, local_files_only=True)


def resized_tensors(tensors: Tensors, stack: Stack, slots: tuple[int, ...]) -> Tensors:
    """The tensors outside the layers that hold one block for every layer, with the blocks of `slots` in their order."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        dim = _depth_dim(name, stack)
        if dim is not None:
            blocks = tensor.unflatten(dim, (stack.depth, -1))
            made[name] = blocks.index_select(dim, torch.tensor(slots, device=tensor.device)).flatten(dim, dim + 1)
    return made


def _depth_dim(name: str, stack: Stack) -> int | None:
    """The dimension along which the tensor `name` has a block for every layer; None for most tensors."""
    if name.startswith(f"{stack.path}."):
        return None
    return next(
        (d for end, d in family_of(stack.config).sized_by_depth.items() if f".{name}".endswith(f".{end}")), None
    )


def _same_layers(model: PreTrainedModel, stack: Stack, config: PreTrainedConfig, slots: tuple[int, ...]) -> None:
    """Build the stock model without weights and compare every slot with the base layer that it stands for: the same
    modules, tensor shapes and settings. What a family makes of a layer's position shows up here, rule or no rule."""
    family = family_of(stack.config)
    if family.position_numbers and getattr(stack.config, family.position_numbers, False) is True:
        moved = next((i for slot, i in enumerate(slots) if slot != i), None)
        if moved is not None:
            raise WriteError(
                f"layer {moved} changes its place, and {family.position_numbers} makes numbers from it; "
                "run the plan live",
                code="W207",
            )
    twin = meta_model(config, like=model)
    target = find_stack(twin)
    outside = _shapes_outside(model, stack)
    for name, shape in outside.items():
        dim = _depth_dim(name, stack)
        if dim is not None:
            outside[name] = (*shape[:dim], shape[dim] // stack.depth * len(slots), *shape[dim + 1 :])
    for name, shape in _shapes_outside(twin, target).items():
        if outside.get(name) != shape:
            raise WriteError(
                f"{name} is {list(outside.get(name, ()))} in the base and would be {list(shape)}: its size follows the "
                "depth, which is not written yet; run the plan live",
                code="W208",
            )
    for slot, layer in enumerate(slots):
        difference = _difference(stack.layer(layer), target.layer(slot), family.numbering)
        if difference is not None:
            raise WriteError(
                f"layer {layer} in place {slot} of a stock {type(model).__name__} would differ: {difference}; "
                "run the plan live or keep this layer's place",
                code="W207",
            )


def _shapes_outside(model: nn.Module, stack: Stack) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith(f"{stack.path}.")}


def _difference(old: nn.Module, new: nn.Module, numbering: tuple[str, ...]) -> str | None:
    """The first fact in which two layers differ, their index and what else only numbers them aside."""
    olds, news = dict(old.named_modules()), dict(new.named_modules())
    if olds.keys() != news.keys():
        return f"modules {sorted(olds.keys() ^ news.keys())[:3]}"
    for name, module in olds.items():
        other = news[name]
        if type(module) is not type(other):
            return f"{name or 'the layer'} is a {type(other).__name__}, not a {type(module).__name__}"
        mine, theirs = _facts(module), _facts(other)
        # a config that was read from JSON has lists where one that was made may have tuples
        lists = {*numbering} | {
            key for one in (module, other) for key, value in vars(one).items() if isinstance(value, list)
        }
        for key in sorted((mine.keys() | theirs.keys()) - lists):
            if mine.get(key) != theirs.get(key):
                return f"{f'{name}.' if name else ''}{key} is {theirs.get(key)!r}, not {mine.get(key)!r}"
    return None


def _facts(module: nn.Module) -> dict[str, Any]:
    skip = {"training", "gradient_checkpointing", *INDEX_NAMES}
    plain = (bool, int, float, str, tuple, type(None))
    found: dict[str, Any] = {
        name: value
        for name, value in vars(module).items()
        if name not in skip and not name.startswith("_") and isinstance(value, plain)
    }
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return found | {f"shape of {name}": tuple(t.shape) for name, t in tensors}
