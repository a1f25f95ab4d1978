"""Config keys that the stock class ignores and other readers obey: renumbered with the layers, or left out.

A config hands on whatever stood in the file of its base: lists of layers that other programs drop (LLM-Drop), take
features from or quantise otherwise, code of the model's own (`auto_map`), the number of layers that predict tokens
further ahead. None of it is seen by the stock model that is written and proved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from shoal.models.beside_layers import announced
from shoal.models.depth import DECODER_DEPTHS, INDEX_LISTS, PER_LAYER, RULES, SYNONYMS, depth_of
from shoal.models.layer_references import GONE, Renumbering, speaks_of_layers
from shoal.models.meta import meta_model
from shoal.models.own_code import runs_own_code
from shoal.models.stacks import Stack

CODE = "auto_map"
DROPS = {"drop_attn_list": "attention", "drop_mlp_list": "mlp"}
"""Keys of LLM-Drop, whose code does not run these parts of the layers that they list; a stock model runs them."""
BOUNDS = ("max_window_layers",)
"""Fields of stock classes that count the first layers of one kind, and that the class reads only where no list says
the kinds layer by layer; other readers read them all the same."""
_OWN = {CODE, *DROPS, "shoal", "quantization_config", "quantization", "name_or_path", "task_specific_params"}
_RULED = {*PER_LAYER, *INDEX_LISTS, *SYNONYMS, *(name for rule in RULES for name in rule.fields), "per_layer_config"}
_RULED |= {name for pair in DECODER_DEPTHS for name in pair}
_KNOWN: dict[type[PreTrainedConfig], set[str]] = {}
Changes = dict[str, tuple[Any, Any]]


def unread(config: PreTrainedConfig) -> dict[str, Any]:
    """{key: value} of what the class of `config` does not know, those aside that have rules of their own here."""
    known = _known(type(config)) | _RULED | _OWN
    return {name: value for name, value in vars(config).items() if not name.startswith("_") and name not in known}


def _known(kind: type[PreTrainedConfig]) -> set[str]:
    """The fields of a config class, their other names, and what the class sets by itself."""
    found = _KNOWN.get(kind)
    return _KNOWN.setdefault(kind, _found_known(kind)) if found is None else found


def _found_known(kind: type[PreTrainedConfig]) -> set[str]:
    names = {field.name for field in fields(kind)} | set(kind.attribute_map) | set(kind.attribute_map.values())
    with suppress(Exception):  # a class that cannot be made of nothing raises whatever it likes
        names |= set(vars(kind()))
    return names


def dropped_parts(config: PreTrainedConfig) -> dict[str, list[int]]:
    """{key: layers} of the parts that the code of LLM-Drop beside a model does not run, where the stock class is used,
    which knows nothing of it."""
    found: dict[str, list[int]] = {}
    for name in DROPS:
        value = vars(config).get(name)
        if isinstance(value, list) and name not in _known(type(config)):
            bools = all(type(entry) is bool for entry in value)
            found[name] = [i for i, gone in enumerate(value) if gone] if bools else value
    return {name: layers for name, layers in found.items() if layers}


def drop_notes(config: PreTrainedConfig, source: str) -> Iterator[str]:
    """A sentence for each key of `config` by which the code of LLM-Drop leaves parts out, which all run here."""
    for name, layers in dropped_parts(config).items():
        numbers = ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
        how = f"shoal convert {source}/config.json --from llm-drop --to notation --model {source}"
        yield (
            f"{source}: {name} drops the {DROPS[name]} of layers {numbers}, which only LLM-Drop's code obeys; here "
            f"every part runs. `{how}` gives the plan of what LLM-Drop runs"
        )


def notes_for(config: PreTrainedConfig, source: str) -> Iterator[str]:
    """What a reader of `config` should know of keys that its class ignores: `drop_notes`, and a sentence for other keys
    that count or name layers."""
    yield from drop_notes(config, source)
    depth = depth_of(config)
    names = [n for n, v in unread(config).items() if depth and speaks_of_layers(n, v, depth, "layers")]
    if names:
        yield (
            f"{source}: {', '.join(names[:5])} of config.json {'seem' if len(names) > 1 else 'seems'} to count or name "
            f"layers, though {type(config).__name__} does not read them; a write renumbers them"
        )


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
            if name in vars(new) and name not in _known(type(new)) - {CODE}:
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
