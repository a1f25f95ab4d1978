"""Keys of a config that its class does not read: which they are, and what a user should know of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from shoal.models.depth import DECODER_DEPTHS, INDEX_LISTS, PER_LAYER, RULES, SYNONYMS, depth_of
from shoal.models.layer_references import speaks_of_layers

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


def unread(config: PreTrainedConfig) -> dict[str, Any]:
    """{key: value} of what the class of `config` does not know, those aside that have rules of their own here."""
    known = known_to(type(config)) | _RULED | _OWN
    return {name: value for name, value in vars(config).items() if not name.startswith("_") and name not in known}


def known_to(kind: type[PreTrainedConfig]) -> set[str]:
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
        if isinstance(value, list) and name not in known_to(type(config)):
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
