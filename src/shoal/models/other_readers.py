"""Config keys that the stock class ignores and other readers obey: renumbered with the layers, or left out.

A config hands on whatever stood in the file of its base: lists of layers that other programs drop (LLM-Drop), take
features from or quantise otherwise, code of the model's own (`auto_map`), the number of layers that predict tokens
further ahead. None of it is seen by the stock model that is written and proved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from shoal.models.beside_layers import announced
from shoal.models.layer_references import GONE, Renumbering, speaks_of_layers
from shoal.models.meta import meta_model
from shoal.models.own_code import runs_own_code
from shoal.models.stacks import Stack
from shoal.models.unread_fields import BOUNDS, CODE, DROPS, known_to, unread

Changes = dict[str, tuple[Any, Any]]


def for_other_readers(
    model: PreTrainedModel, config: PreTrainedConfig, stacks: Sequence[Stack], slots: Mapping[str, tuple[int, ...]]
) -> tuple[PreTrainedConfig, Changes]:
    """`config`, whose stacks are in place, without what would be wrong or void for other readers of it; and what
    changed, {key: (old, new)} with None for what was left out. `model` is the base; `slots`: by stack."""
    made = copy.deepcopy(config)
    changed: Changes = {}
    own_code = runs_own_code(model, model.config)
    for base, new in _pairs(model.config, made):
        here = [stack for stack in stacks if base is stack.config or base is model.config]
        changed |= _renumber(base, new, {stack.name: renumbering(stack, slots[stack.name]) for stack in here})
        for name in (CODE, *DROPS) if not own_code else ():
            if name in vars(new) and name not in known_to(type(new)) - {CODE}:
                changed[name] = (vars(new).pop(name), None)
    return _without_layers_ahead(model, made, changed)


def _pairs(base: PreTrainedConfig, made: PreTrainedConfig) -> Iterable[tuple[PreTrainedConfig, PreTrainedConfig]]:
    """A config and those inside it, each beside the same in `made`."""
    yield base, made
    for name in base.sub_configs:
        inner, other = getattr(base, name, None), getattr(made, name, None)
        if isinstance(inner, PreTrainedConfig) and isinstance(other, PreTrainedConfig):
            yield inner, other


def renumbering(stack: Stack, slots: tuple[int, ...]) -> Renumbering:
    """Which layer of `stack` is in which place."""
    ahead = sum(announced(vars(stack.config)).values())
    return Renumbering(stack.depth, slots, stack.path, ahead)


def _renumber(base: PreTrainedConfig, made: PreTrainedConfig, stacks: Mapping[str, Renumbering]) -> Changes:
    changed: Changes = {}
    values = unread(base) | {n: vars(base)[n] for n in BOUNDS if type(vars(base).get(n)) is int}
    for name, old in values.items():
        new = _for_stacks(name, old, stacks)
        if new is GONE:
            vars(made).pop(name, None)
            changed[name] = (old, None)
        elif new != old:
            vars(made)[name] = new
            changed[name] = (old, new)
    return changed


def _for_stacks(name: str, old: Any, stacks: Mapping[str, Renumbering]) -> Any:
    """A value for the stack that it speaks of; `GONE` where that cannot be told and makes a difference."""
    if name in BOUNDS:
        return next((sum(i < old for i in one.slots) for one in stacks.values() if 0 < old <= one.depth), old)
    concerned = {
        stack: one for stack, one in stacks.items() if speaks_of_layers(name, old, one.depth, one.path, ahead=one.ahead)
    }
    named = [one for stack, one in concerned.items() if stack in name]
    found = [one.named(name, old) for one in named or concerned.values()]
    if not found:
        return old
    return found[0] if all(one == found[0] for one in found) else GONE


def _without_layers_ahead(
    model: PreTrainedModel, config: PreTrainedConfig, changed: Changes
) -> tuple[PreTrainedConfig, Changes]:
    """`config` with the keys at 0 that announce layers which predict tokens further ahead, as long as the model is the
    same without them: they are not written, and a reader would look for them."""
    counts = announced(vars(config)) | announced(vars(config.get_text_config(decoder=True)))
    if not counts:
        return config, changed
    for emptied in (False, True):
        made = copy.deepcopy(config)
        for part in {id(p): p for p in (made, made.get_text_config(decoder=True))}.values():
            for name in counts.keys() & vars(part).keys():
                setattr(part, name, 0)
            lists = [n for n, v in vars(part).items() if "mtp" in n and isinstance(v, list)] if emptied else []
            vars(part).update({name: [] for name in lists})
        if _same_tensors(model, made, config):
            return made, changed | {name: (count, 0) for name, count in counts.items()}
    return config, changed


def _same_tensors(model: PreTrainedModel, made: PreTrainedConfig, config: PreTrainedConfig) -> bool:
    """Are two configs accepted, and do they make models of the same tensors?"""
    try:
        type(made).from_dict(made.to_dict())
        one, other = (meta_model(kind, like=model).state_dict() for kind in (made, config))
    except Exception:  # checks of the class's own raise whatever they like
        return False
    return one.keys() == other.keys()
