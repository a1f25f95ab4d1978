"""A stock model of another depth: the config permuted, every tensor in its new place, nothing a stock class lacks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, assert_never

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import WriteError
from shoal.models.depth import permuted_config
from shoal.models.families import family_of
from shoal.models.first import first_only
from shoal.models.kinds import CAUSAL, auto_of
from shoal.models.meta import meta_model
from shoal.models.opened import open_model
from shoal.models.order import refuse_order
from shoal.models.parts import INDEX_NAMES
from shoal.models.stacks import Stack, find_stacks, unwrap
from shoal.models.stages import renamed_stages
from shoal.plan import Exit, Map, Parallel, Plan, Run, format_steps
from shoal.plan.steps import Step
from shoal.writing.assemble import assembled
from shoal.writing.several import described, refuse_cache, with_depths

Tensors = dict[str, torch.Tensor]


class Filled(NamedTuple):
    """What is in the places of one stack."""

    slots: tuple[int, ...]
    """Base layer of each slot."""
    silent: tuple[tuple[int, str], ...] = ()
    """(slot, part) whose tensors are zeroed."""
    replaced: tuple[tuple[int, str], ...] = ()
    """(slot, id of the weights that it runs with)."""


@dataclass(frozen=True)
class Blueprint:
    """How a plan becomes a stock model: known before a weight is read."""

    plan: Plan
    slots: tuple[int, ...]
    """Base layer of each slot, in the main stack: the decoder, or the first."""
    silent: tuple[tuple[int, str], ...]
    """(slot, part) whose tensors are zeroed so that it adds nothing."""
    config: PreTrainedConfig
    changed: dict[str, tuple[Any, Any]]
    replaced: tuple[tuple[int, str], ...] = ()
    """(slot, id of the weights that it runs with)."""
    weights: Tensors = field(default_factory=dict)
    """The tensors of these ids, ID.PARAMETER, in the dtype of the base's."""
    others: tuple[tuple[str, Filled], ...] = ()
    """(name, its slots, silent and replaced) of every stack beside the main one."""

    def of(self, stack: str) -> Blueprint:
        """The same with the slots of that stack as the main one's, and no other."""
        mine = Filled(self.slots, self.silent, self.replaced)
        found = dict(self.others).get(stack, mine)
        return replace(self, slots=found.slots, silent=found.silent, replaced=found.replaced, others=())

    @property
    def whole(self) -> Plan:
        """The plan of what a stock checkpoint runs: whole layers, also where a part is silent."""
        plan = self.plan
        for name, _ in plan.stacks:
            plan = plan.with_steps(tuple(Run(layer) for layer in self.of(name).slots), name)
        return plan


def blueprint(
    model: PreTrainedModel,
    plan: Plan,
    *,
    zero_parts: bool = False,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Blueprint:
    """Work out the stock model of `plan`, or refuse: W201 part runs, W202 parallel, W203 KV source, W204 map, W205 gate
    or exit, W206 a config field, W207 a number made from the layer's position, W208 a tensor whose size follows the
    depth, W209 replaced weights that are not given or do not fit the layer, W216 a config that its own class does not
    accept, W241 a decoder deeper than its encoder where transformers sizes the cache by the encoder, W242 a numbered
    output of a layer that is gone.
    Raises `PlanError` P126 for an order in which the family's layers cannot run.

    `zero_parts`: let a stock layer keep a dropped attention or mlp with all its tensors zero (exact, saves nothing).
    `model` may be on the meta device.
    """
    stacks = find_stacks(model)
    filled = {stack.name: _slots(plan.steps(stack.name), zero_parts) for stack in stacks}
    config, changed = model.config, dict[str, tuple[Any, Any]]()
    for stack in stacks:
        refuse_order(stack, filled[stack.name].slots)
        config, fields = _permuted(model, config, stack, filled[stack.name].slots)
        changed |= fields if len(stacks) == 1 else {described(model, stack, name): v for name, v in fields.items()}
    try:
        read_back = _read_back(config)
        refuse_cache(model.config, read_back, stacks, {name: len(found.slots) for name, found in filled.items()})
        _same_layers(model, stacks, read_back, {name: found.slots for name, found in filled.items()})
    except (ValueError, AttributeError) as error:  # its own checks of its fields, and mixed per-layer values
        why = str(error).strip().splitlines()[-1].strip()[:300]
        raise WriteError(
            f"no config of {stacks[0].config.model_type} describes these layers: {why}; run the plan live", code="W216"
        ) from error
    own = {
        name: tensor
        for stack in stacks
        for slot, weights_id in filled[stack.name].replaced
        for name, tensor in _fitting(stack, filled[stack.name].slots[slot], weights_id, weights or {}).items()
    }
    main = filled[plan.stack_name()]
    others = tuple((name, found) for name, found in filled.items() if name != plan.stack_name())
    return Blueprint(plan, main.slots, main.silent, config, changed, main.replaced, own, others)


def _fitting(stack: Stack, index: int, weights_id: str, weights: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors of one id, ID.PARAMETER, in the dtypes of the layer that runs with them."""
    there = stack.layer(index).state_dict()
    own = {name: tensor for name, tensor in weights.items() if name.startswith(f"{weights_id}.")}
    if not own:
        raise _refusal("W209", f"{index}:{weights_id}", f"the tensors {weights_id}.* are not given", f"write {index}")
    for name, tensor in own.items():
        old = there.get(name[len(weights_id) + 1 :])
        if old is None or old.shape != tensor.shape:
            why = f"{name} is {list(tensor.shape)} and the layer holds {None if old is None else list(old.shape)} there"
            raise _refusal("W209", f"{index}:{weights_id}", why, f"write {index}")
    return {name: tensor.to(there[name[len(weights_id) + 1 :]].dtype) for name, tensor in own.items()}


def rewrite(
    model: nn.Module,
    plan: Plan,
    *,
    zero_parts: bool = False,
    weights: Mapping[str, torch.Tensor] | None = None,
    plans: Blueprint | None = None,
) -> PreTrainedModel:
    """A new stock model that computes what `plan` computes live; tensors are shared with `model` where nothing changes,
    a layer that runs twice is two layers with equal weights. `weights`: the tensors that the plan names, as `running`
    takes them. `plans`: the blueprint, when it is known already.

    Raises `WriteError` before any work: see `require_writable` and `blueprint`."""
    inner = require_writable(model)
    plans = plans or blueprint(inner, plan, zero_parts=zero_parts, weights=weights)
    base = inner.state_dict()
    tensors = dict(base)
    for stack in find_stacks(inner):
        own = plans.of(stack.name)
        tensors = moved_tensors(tensors, stack, own, open_model(inner).facts(stack.name).layers)
        tensors |= resized_tensors(base, stack, own.slots)
    made = assembled(inner, plans.config, tensors)
    if hasattr(inner, "generation_config"):  # encoders have none
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
    if auto_of(inner) is None:
        raise WriteError(
            f"{CAUSAL} would not load {type(inner).__name__} from a {type(inner.config).__name__}, nor would another "
            "Auto class, so no stock checkpoint of it can be written; run the plan live",
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
    first = first_only(stack)
    if first is not None:  # what only the first layer owns goes to the layer that comes first
        lent = {rest: by_layer[0].pop(rest) for rest in list(by_layer[0]) if rest.startswith(first.prefix)}
        moved |= {f"{prefix}0.{rest}": tensor for rest, tensor in lent.items()}
    used: set[int] = set()
    ids = dict(plans.replaced)
    written: set[str] = set()
    for slot, layer in enumerate(plans.slots):
        silent = {part for s, part in plans.silent if s == slot}
        quiet = tuple(f"{n}." for part in silent for n in getattr(facts[layer].parts, part))
        for rest, tensor in by_layer[layer].items():
            own = f"{ids[slot]}.{rest}" if slot in ids else ""
            value = plans.weights[own].to(tensor.device) if own in plans.weights else tensor
            value = torch.zeros_like(value) if quiet and rest.startswith(quiet) else value
            # two slots must not share storage: a stock checkpoint cannot say so
            moved[f"{prefix}{slot}.{rest}"] = value.clone() if layer in used or own in written else value
            written |= {own} if own else set()
        used.add(layer)
    return moved


def _permuted(
    model: PreTrainedModel, whole: PreTrainedConfig, stack: Stack, slots: tuple[int, ...]
) -> tuple[PreTrainedConfig, dict[str, tuple[Any, Any]]]:
    """`whole`, the config of `model` with the stacks before this one in place, with this one in place too."""
    if stack.fields:
        return with_depths(whole, stack, slots)
    text, changed = permuted_config(stack.config, slots)
    changed |= renamed_stages(stack.config, text, slots)
    if stack.config is model.config:
        return text, changed
    return _whole_config(whole, model.config, stack.config, text), changed


def _slots(steps: tuple[Step, ...], zero_parts: bool) -> Filled:
    slots: list[int] = []
    silent: list[tuple[int, str]] = []
    replaced: list[tuple[int, str]] = []
    for step in steps:
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
            case _:
                assert_never(step)
        if step.layer_sources:
            raise _refusal("W203", text, "a stock layer uses its own keys and values", f"write {step.layer} without @")
        if step.gate is not None:
            raise _refusal("W205", text, "a stock model decides nothing at run time", f"keep or drop {step.layer}")
        if step.weights is not None:
            replaced.append((len(slots), step.weights))
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
    return Filled(tuple(slots), tuple(silent), tuple(replaced))


def _refusal(code: str, step: str, why: str, nearest: str) -> WriteError:
    return WriteError(f"step {step} cannot be written as a stock checkpoint: {why}; {nearest}", code=code)


def _whole_config(
    whole: PreTrainedConfig, base: PreTrainedConfig, old: PreTrainedConfig, new: PreTrainedConfig
) -> PreTrainedConfig:
    """`whole` with one of its configs exchanged; `old` is that config in `base`, of which `whole` was made."""
    made = copy.deepcopy(whole)
    setattr(made, next(n for n in base.sub_configs if getattr(base, n, None) is old), new)
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


def _same_layers(
    model: PreTrainedModel, stacks: tuple[Stack, ...], config: PreTrainedConfig, filled: dict[str, tuple[int, ...]]
) -> None:
    """Build the stock model without weights and compare every slot with the base layer that it stands for: the same
    modules, tensor shapes and settings. What a family makes of a layer's position shows up here, rule or no rule."""
    for stack in stacks:
        _same_numbers(stack, filled[stack.name])
    twin = meta_model(config, like=model)
    targets = {target.name: target for target in find_stacks(twin)}
    outside = _shapes_outside(model, stacks)
    for stack in stacks:
        for name, shape in outside.items():
            dim = _depth_dim(name, stack)
            if dim is not None:
                size = shape[dim] // stack.depth * len(filled[stack.name])
                outside[name] = (*shape[:dim], size, *shape[dim + 1 :])
    for name, shape in _shapes_outside(twin, tuple(targets.values())).items():
        if outside.get(name) != shape:
            raise WriteError(
                f"{name} is {list(outside.get(name, ()))} in the base and would be {list(shape)}: its size follows the "
                "depth, which is not written yet; run the plan live",
                code="W208",
            )
    for stack in stacks:
        for slot, layer in enumerate(filled[stack.name]):
            with _in_place(stack, slot, layer):
                old, new = stack.layer(layer), targets[stack.name].layer(slot)
                difference = _difference(old, new, family_of(stack.config).numbering)
            if difference is not None:
                raise WriteError(
                    f"layer {layer} in place {slot} of a stock {type(model).__name__} would differ: {difference}; "
                    "run the plan live or keep this layer's place",
                    code="W207",
                )


def _in_place(stack: Stack, slot: int, layer: int) -> AbstractContextManager[None]:
    """What only the first layer owns goes to the layer in place 0, and is taken from layer 0 elsewhere."""
    first = first_only(stack)
    if first is None or (slot == 0) == (layer == 0):
        return nullcontext()
    return first.lent_to(stack.layer(layer)) if slot == 0 else first.taken_away()


def _same_numbers(stack: Stack, slots: tuple[int, ...]) -> None:
    family = family_of(stack.config)
    if family.position_numbers and getattr(stack.config, family.position_numbers, False) is True:
        moved = next((i for slot, i in enumerate(slots) if slot != i), None)
        if moved is not None:
            raise WriteError(
                f"layer {moved} changes its place, and {family.position_numbers} makes numbers from it; "
                "run the plan live",
                code="W207",
            )


def _shapes_outside(model: nn.Module, stacks: tuple[Stack, ...]) -> dict[str, tuple[int, ...]]:
    inside = tuple(f"{stack.path}." for stack in stacks)
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith(inside)}


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
