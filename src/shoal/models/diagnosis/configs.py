"""Configs made from the plain data of a config.json that may be wrong."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shoal.errors import ModelError
from shoal.models.compat import decoded
from shoal.models.depth import DECODER_DEPTHS, INDEX_LISTS, PER_LAYER, RULES, Rule
from shoal.models.folder_kinds import planned_refusal
from shoal.models.load import structure
from shoal.plan.file import PLANNED

Fields = dict[str, Any]
_TEXT = ("text_config", "decoder", "generator")


def made(raw: Fields, source: str) -> PreTrainedConfig:
    """The config object of `raw`. Raises `ModelError` M312 for code of its own, M330 for what its class refuses, M382
    for a planned checkpoint."""
    kind = raw.get("model_type")
    if kind == PLANNED:
        raise planned_refusal(source)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if isinstance(raw.get("auto_map"), dict):
            raise ModelError(
                f"{source} needs code of its own (auto_map); read it, then pass --trust-remote-code if you trust it",
                code="M312",
            )
        raise ModelError(
            f"the config of {source} has the model_type {str(kind)[:40]!r}, which the installed transformers does not "
            "know; install the one that its card names, or mend it",
            code="M330",
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(decoded(copy.deepcopy(raw)))
        text = config.get_text_config(decoder=True)
        assert isinstance(text, PreTrainedConfig)
    except Exception as error:  # config classes raise whatever their arithmetic with odd values raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{kind} does not accept the config of {source}: {lines[-1].strip()[:200]}; mend config.json", code="M330"
        ) from None
    return config


def empty(config: PreTrainedConfig, source: str) -> PreTrainedModel:
    """The model of a config without weights. Raises M307."""
    return structure(config, source)


def text_of(raw: Fields) -> Fields:
    """The part of `raw` that describes the text decoder: the very object, not a copy."""
    kind = raw.get("model_type")
    known = getattr(CONFIG_MAPPING[kind], "sub_configs", {}) if isinstance(kind, str) and kind in CONFIG_MAPPING else {}
    for name in _TEXT:
        if name in known and isinstance(raw.get(name), dict):
            part: Fields = raw[name]
            return part
    return raw


def depth_name(raw: Fields) -> str:
    """The family's own name for the number of layers, in the text part."""
    text = text_of(raw)
    for decoder, _ in DECODER_DEPTHS:
        if isinstance(text.get(decoder), int):
            return decoder
    kind = text.get("model_type", raw.get("model_type"))
    names = (
        getattr(CONFIG_MAPPING[kind], "attribute_map", {}) if isinstance(kind, str) and kind in CONFIG_MAPPING else {}
    )
    own = str(names.get("num_hidden_layers", "num_hidden_layers"))
    return own if own in text or "num_hidden_layers" not in text else "num_hidden_layers"


def depth_said(raw: Fields) -> int | None:
    """The number of layers that the config says; None when it says none."""
    found = text_of(raw).get(depth_name(raw))
    if found is None and derived(raw):
        found = next(iter(lengths_of(raw).values()), None)
    return found if type(found) is int else None


def with_depth(raw: Fields, depth: int) -> Fields:
    """`raw` for `depth` layers. Lists with one entry per layer stay when they have `depth` entries; the others are left
    to the class to fill in, or repeat themselves where the class would not."""
    new = copy.deepcopy(raw)
    text = text_of(new)
    lengths = lengths_of(raw)
    counted = derived(raw)
    if counted:
        text.pop(depth_name(raw), None)
    else:
        text[depth_name(raw)] = depth
    for name, entries in lists_of(raw).items():
        if len(entries) == depth:
            continue
        if counted and entries:
            text[name] = [entries[i % len(entries)] for i in range(depth)]
        else:
            del text[name]
    for rule in RULES:
        if lengths.get(rule.fields[0], depth) != depth and rule.fields[0] not in PER_LAYER:
            had = rule.property({n: text[n] for n in rule.fields}, lengths[rule.fields[0]])
            text.update(rule.candidates({}, [had[i % len(had)] for i in range(depth)])[0])
    for name in INDEX_LISTS:
        value = text.get(name)
        if isinstance(value, list):
            text[name] = [i for i in value if type(i) is int and i < depth]
    return new


def lists_of(raw: Fields) -> dict[str, list[Any]]:
    """The fields of the text part that hold one entry per layer."""
    text = text_of(raw)
    return {name: text[name] for name in PER_LAYER if isinstance(text.get(name), list)}


def lengths_of(raw: Fields) -> dict[str, int]:
    """{field: the number of layers that it describes}, of those that describe a number of their own."""
    text = text_of(raw)
    found = {name: len(value) for name, value in lists_of(raw).items()}
    for rule in RULES:
        if len(rule.fields) == 1 and isinstance(text.get(rule.fields[0]), list):
            one, many = _length(rule, text, 1), _length(rule, text, 999)
            if one == many and one:
                found[rule.fields[0]] = one
    return found


def _length(rule: Rule, text: Fields, depth: int) -> int | None:
    try:
        return len(rule.property({n: text[n] for n in rule.fields}, depth))
    except (TypeError, ValueError, LookupError, ArithmeticError):
        return None


def derived(raw: Fields) -> bool:
    """Does the class count the layers itself, from a list?"""
    kind = text_of(raw).get("model_type", raw.get("model_type"))
    known = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else object
    return isinstance(getattr(known, depth_name(raw), None), property)
