"""mergekit's `slices`: layer ranges of one model put one after the other by the merge method `passthrough`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

from shoal.errors import NotationError
from shoal.examples import FormatExamples
from shoal.exchange._format import Format, refuse_unless_said, shown
from shoal.exchange._yaml import from_yaml, to_yaml
from shoal.plan import Plan, Run, Spec, Step
from shoal.plan.notation import MAX_STEPS
from shoal.plan.steps import PartName, runs

NAME = "mergekit"
METHOD = "passthrough"
ATTENTION_END, MLP_END = "o_proj", "down_proj"
"""The last matrices of a Llama-like layer's attention and mlp: at 0 the part adds nothing."""
_NO_LAYERS = frozenset(
    {"dtype", "out_dtype", "name", "tokenizer", "tokenizer_source", "chat_template", "base_model", "merge_method"}
)
"""Keys that say nothing about layers; `base_model` must be the model itself."""
EXAMPLES = FormatExamples(says="layers in any order")


def mergekit() -> Format:
    """Slices of one model in YAML, counted from 0 with the end left out: [0, 12] is layers 0 to 11.

    Ranges may repeat and overlap, which copies layers; the model's name becomes the plan's source.

    Source: github.com/arcee-ai/mergekit, merge method passthrough; files written here were read by the configuration
    parser of mergekit 0.1.5. Block expansion: LLaMA Pro (arXiv 2401.02415).

    Says: whole layers removed, repeated, reordered. A slice with `scale` 0 for o_proj alone, or for down_proj alone, is
    read as its mlps, or its attentions. Refused when read: several models, several sources in a slice, other
    parameters, both at 0 (block expansion: the layers add nothing until they are trained), other merge methods (all
    N103).
    """
    return Format(_read, _write)


def _read(text: str | bytes, identity: Plan) -> Plan:
    data = _mapping(from_yaml(text, NAME), "the file", {"slices", "parameters"} | _NO_LAYERS)
    if data.get("merge_method") != METHOD:
        _refuse(
            f"merge_method {shown(data.get('merge_method'))}, which mixes weights",
            f"merge_method: {METHOD}, or run mergekit and give the model that it makes",
        )
    steps: list[Step] = []
    models = list[str]()
    for place, piece in enumerate(_list(data.get("slices"), "slices")):
        where = f"slice {place}"
        sources = _list(
            _mapping(_unscaled(piece), where, {"sources", "parameters"}).get("sources"), f"{where}: sources"
        )
        if len(sources) != 1:
            _refuse(
                f"{len(sources)} sources in {where}, whose weights are mixed",
                "one source in each slice, or run mergekit and give the model that it makes",
            )
        part = _part(piece, where) or _part(sources[0], where)
        source = _mapping(_unscaled(sources[0]), where, {"model", "layer_range", "parameters"})
        models.append(_model(source.get("model"), where))
        steps += [Run(layer, part or "layer") for layer in _range(source.get("layer_range"), where, identity.depth())]
        if len(steps) > MAX_STEPS:
            raise NotationError(f"the {NAME} file has more than {MAX_STEPS} layers; use fewer slices", code="N101")
    if not models:
        raise NotationError(f"the {NAME} file has no slice; write at least one", code="N101")
    _require_one_model(models, data.get("base_model"))
    plan = identity.with_steps(tuple(steps))
    return replace(plan, base=replace(plan.base, source=models[0]))


def _part(found: object, where: str) -> PartName | None:
    """The part that runs of a slice whose `scale` is 0 for what the other part ends in; None without such a scale.

    mergekit multiplies each tensor by the first value whose filter is in its name, and by 1 where none is.
    """
    zero = _zeroed(found)
    if zero == {ATTENTION_END, MLP_END}:
        _refuse(
            f"scale 0 for {ATTENTION_END} and {MLP_END} in {where} (block expansion: its layers add nothing until they "
            "are trained)",
            "the file without that slice for a plan that computes the same, or run mergekit for layers to train",
        )
    return None if not zero else "mlp" if zero == {ATTENTION_END} else "attention"


def _zeroed(found: object) -> set[str]:
    """The names whose scale is 0, where `scale` is the only parameter and says no more than that; else none."""
    given = found.get("parameters") if isinstance(found, dict) else None
    scale = given.get("scale") if isinstance(given, dict) and set(given) == {"scale"} else None
    zero = set[str]()
    for rule in scale if isinstance(scale, list) else []:
        name, value = (rule.get("filter"), rule.get("value")) if isinstance(rule, dict) else (None, None)
        if type(value) not in (int, float) or value not in (0, 1) or not set(rule) <= {"filter", "value"}:
            return set()
        if value == 1 and name in (None, "*"):
            return zero  # what follows is never reached
        if value != 0 or name not in (ATTENTION_END, MLP_END):
            return set()
        zero.add(name)
    return zero


def _unscaled(found: Any) -> Any:
    """The same mapping without a scale that was understood."""
    return {key: value for key, value in found.items() if key != "parameters"} if _zeroed(found) else found


def _require_one_model(models: list[str], base: object) -> None:
    named = [*dict.fromkeys([*models, *([] if base is None else [_model(base, "base_model")])])]
    if len(named) > 1:
        _refuse(f"the models {shown(named[0])} and {shown(named[1])}", "slices of one model")


def _model(found: object, where: str) -> str:
    if not isinstance(found, str) or not found:
        raise NotationError(f"{where} has the model {shown(found)}; write its name as text", code="N101")
    return found


def _range(found: object, where: str, depth: int) -> range:
    """[a, b] as the layers a to b - 1."""
    numbers = _list(found, f"{where}: layer_range")
    if len(numbers) != 2 or not all(type(number) is int for number in numbers):
        raise NotationError(f"{where}: layer_range must be two layer numbers, as in [0, 12]", code="N101")
    first, end = numbers
    if not 0 <= first < depth or not 0 <= end <= depth:
        raise NotationError(
            f"{where}: layer_range [{shown(first)}, {shown(end)}] leaves the model; its layers are 0 to {depth - 1} "
            f"and the end is left out, so it is at most {depth}",
            code="N102",
        )
    if end <= first:
        raise NotationError(
            f"{where}: layer_range [{first}, {end}] holds no layer, as its end is left out; write [{first}, "
            f"{first + 1}] for layer {first}",
            code="N102",
        )
    return range(first, end)


def _mapping(found: object, where: str, known: frozenset[str] | set[str]) -> dict[str, Any]:
    """A mapping whose keys a plan can hold. Raises N101 for something else, N103 for parameters and unknown keys."""
    if not isinstance(found, dict):
        raise NotationError(f"{NAME}: {where} is {shown(found)}; expected a mapping", code="N101")
    for key, value in found.items():
        if key not in known or (key == "parameters" and value):
            inside = f" ({', '.join(map(shown, list(value)[:3]))})" if isinstance(value, dict) and value else ""
            _refuse(f"{shown(key)}{inside} in {where}", "whole layers of one model, without it")
    return found


def _list(found: object, where: str) -> list[Any]:
    if not isinstance(found, list):
        raise NotationError(f"{NAME}: {where} is {shown(found)}; expected a list", code="N101")
    return found


def _refuse(what: str, instead: str) -> NoReturn:
    raise NotationError(f"{NAME}: a plan cannot say {what}; write {instead}", code="N103")


def _write(plan: Plan, spec: Spec | None = None) -> str:
    whole = tuple(Run(run.layer) for run in runs(plan.steps()))
    refuse_unless_said(plan, whole, name=NAME, can="whole layers with their own weights and KV, in any order")
    if not plan.base.source:
        raise NotationError(f"{NAME} needs the model's name, which this plan does not know; give it", code="N105")
    slices = [
        {"sources": [{"model": plan.base.source, "layer_range": [first, last + 1]}]}
        for first, last in _upward([run.layer for run in whole])
    ]
    return to_yaml({"slices": slices, "merge_method": METHOD}, NAME)


def _upward(layers: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each stretch that goes up by one."""
    start = 0
    for place, layer in enumerate(layers):
        if place + 1 == len(layers) or layers[place + 1] != layer + 1:
            yield layers[start], layer
            start = place + 1
