"""Where the layers of a written model come from: one key in config.json, composed over repeated pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from shoal._version import __version__
from shoal.plan import Plan, Run, Step, format_steps
from shoal.writing.surgery import Blueprint

KEY = "shoal"


def config_note(config: PreTrainedConfig, plan: Plan, plans: Blueprint) -> dict[str, Any]:
    """The value of the key `shoal` in the config of the model of `plan`, whose base has `config`.

    base_layers: for each layer of the new model, in order, the layer of the ORIGINAL base that it is: a base that was
    itself pruned hands its own numbers on. plan: the same as depth notation, with a or m where a part is silent; a
    layer whose two parts are silent does nothing and is left out of it. silent: those parts, [place, part].
    base: the original base, {family, fingerprint, layers, source}, without paths of this machine.
    A model of several stacks has base_layers and silent by stack, and all stacks in the plan.
    """
    if plans.others:
        return _several(config, plan, plans)
    old = _known(config)
    layers = [old["base_layers"][i] for i in plans.slots] if old else list(plans.slots)
    silent = set(plans.silent)
    if old:
        silent |= {(slot, part) for slot, i in enumerate(plans.slots) for at, part in old["silent"] if at == i}
    note = {
        "base_layers": layers,
        "plan": format_steps(_steps(layers, silent)),
        "base": old["base"] if old else _base(plan),
        "version": __version__,
    }
    return note | ({"silent": sorted([slot, part] for slot, part in silent)} if silent else {})


def _several(config: PreTrainedConfig, plan: Plan, plans: Blueprint) -> dict[str, Any]:
    known = getattr(config, KEY, None)
    before = {name: _part(known, name, depth) for name, depth in plan.base.depths}
    old = all(part is not None for part in before.values()) and isinstance(known, dict)
    layers, silent, texts = {}, {}, []
    for name, _ in plan.stacks:
        own = plans.of(name)
        part = before[name] if old else None
        layers[name] = [part["base_layers"][i] for i in own.slots] if part else list(own.slots)
        quiet = set(own.silent)
        if part:
            quiet |= {(slot, which) for slot, i in enumerate(own.slots) for at, which in part["silent"] if at == i}
        silent[name] = sorted([slot, which] for slot, which in quiet)
        texts.append(f"{name}: {format_steps(_steps(layers[name], quiet))}")
    base = known["base"] if old and isinstance(known, dict) else _base(plan)
    note = {"base_layers": layers, "plan": "; ".join(texts), "base": base, "version": __version__}
    return note | ({"silent": silent} if any(silent.values()) else {})


def _part(note: Any, stack: str, depth: int) -> dict[str, Any] | None:
    """What the note of a model of several stacks says of one of them."""
    if not isinstance(note, dict) or not isinstance(note.get("base_layers"), dict):
        return None
    quiet = note.get("silent", {})
    one = {"base_layers": note["base_layers"].get(stack), "base": note.get("base")}
    return _checked(one | {"silent": quiet.get(stack, []) if isinstance(quiet, dict) else None}, depth)


def original_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """For each layer of a model of one stack the layer of the original base that it is; its own number when nothing is
    known."""
    known = _known(config)
    depth = config.get_text_config(decoder=True).num_hidden_layers
    return tuple(known["base_layers"]) if known else tuple(range(depth))


def _base(plan: Plan) -> dict[str, Any]:
    source = plan.base.source
    if source is not None and Path(source).is_absolute():
        source = Path(source).name
    base = {"family": plan.base.family, "fingerprint": plan.base.fingerprint, "layers": dict(plan.base.depths)}
    return base | ({"source": source} if source is not None else {})


def _steps(layers: list[int], silent: set[tuple[int, str]]) -> tuple[Step, ...]:
    steps: list[Step] = []
    for slot, layer in enumerate(layers):
        match {part for at, part in silent if at == slot}:
            case parts if parts == {"mlp"}:
                steps.append(Run(layer, "attention"))
            case parts if parts == {"attention"}:
                steps.append(Run(layer, "mlp"))
            case parts if not parts:
                steps.append(Run(layer))
    return tuple(steps)


def _known(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The note of a base that Shoal wrote, or None: it comes from a file that anyone may have edited."""
    return _checked(getattr(config, KEY, None), config.get_text_config(decoder=True).num_hidden_layers)


def _checked(note: Any, depth: int) -> dict[str, Any] | None:
    if not isinstance(note, dict) or not isinstance(note.get("base"), dict):
        return None
    layers, silent = note.get("base_layers"), note.get("silent", [])
    if not isinstance(layers, list) or len(layers) != depth or not all(type(i) is int and i >= 0 for i in layers):
        return None
    pairs = isinstance(silent, list) and all(
        isinstance(s, list) and len(s) == 2 and type(s[0]) is int and s[1] in ("attention", "mlp") for s in silent
    )
    return {"base_layers": layers, "silent": [tuple(s) for s in silent], "base": note["base"]} if pairs else None
