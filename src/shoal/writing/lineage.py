"""The lineage and the records of a base, handed on to the model that is made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from shoal._version import __version__
from shoal.models.depth import depth_of
from shoal.plan import Plan, format_steps
from shoal.plan.lineage import KEY, Lineage, LineageByStack, read_lineage, read_lineages
from shoal.writing.blueprint import Blueprint

MAX_RECORDS = 20_000_000
"""Bytes of a base's records that are handed on; a larger file was not written by Shoal."""


def lineage_of(config: PreTrainedConfig) -> Lineage | None:
    """Where the layers of a model come from, by its config; None for a model that Shoal did not write."""
    return read_lineage(getattr(config, KEY, None), depth_of(config.get_text_config(decoder=True)))


def config_note(config: PreTrainedConfig, plan: Plan, plans: Blueprint) -> dict[str, Any]:
    """The value of the key `shoal` in the config of the model of `plan`, whose base has `config`.

    base_layers: for each layer of the new model, in order, the layer of the ORIGINAL base that it is: a base that was
    itself pruned hands its own numbers on. plan: the same as depth notation, with a or m where a part is silent; a
    layer whose two parts are silent does nothing and is left out of it. mlps: [place, layer] where the mlp is another
    layer's than base_layers says, which is then that of the attention. chain: the prunings, in the numbers of the
    model that each was applied to. silent: those parts, [place, part]. base: the original base, {family, fingerprint,
    layers, source}, without paths of this machine. A model of several stacks has base_layers and silent by stack, and
    all stacks in the plan.
    """
    if plans.others:
        return _several(config, plan, plans)
    known = lineage_of(config)
    text = format_steps(plan.steps())
    if known is not None:
        return _then(known, plans, text).to_note(__version__)
    depth = dict(plan.base.depths)[plan.stack_name()]
    return _then(Lineage(tuple(range(depth)), _base(plan)), plans, text).to_note(__version__)


def _then(known: Lineage, plans: Blueprint, text: str) -> Lineage:
    return known.then(plans.slots, plans.zeroed, text, {slot: half.layer for slot, half in plans.mlps})


def _several(config: PreTrainedConfig, plan: Plan, plans: Blueprint) -> dict[str, Any]:
    depths = dict(plan.base.depths)
    known = read_lineages(getattr(config, KEY, None), depths)
    if not isinstance(known, LineageByStack):
        base = _base(plan)
        known = LineageByStack({name: Lineage(tuple(range(depth)), base) for name, depth in depths.items()}, base)
    after = {name: _then(part, plans.of(name), format_steps(plan.steps(name))) for name, part in known.stacks.items()}
    note = {
        "base_layers": {name: list(part.layers) for name, part in after.items()},
        "plan": LineageByStack(after, known.base).notation,
        "chain": [*known.chain, str(plan)],
        "base": known.base,
        "version": __version__,
    }
    silent = {name: sorted([slot, which] for slot, which in part.silent) for name, part in after.items()}
    note |= {"silent": silent} if any(silent.values()) else {}
    mlps = {name: sorted(map(list, part.mlps.items())) for name, part in after.items()}
    return note | ({"mlps": mlps} if any(mlps.values()) else {})


def original_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """For each layer of a model the layer of the original base that it is; its own number when nothing is known."""
    known = lineage_of(config)
    return known.layers if known else tuple(range(depth_of(config.get_text_config(decoder=True)) or 0))


def record_lines(base: Path | None, records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The lines of shoal/records.jsonl: those of the folder that the base came from, then `records`. What is no JSON
    object there, or lies behind a symlink, is left out."""
    return [*_earlier(base), *(json.dumps(dict(record), ensure_ascii=False) for record in records)]


def _earlier(base: Path | None) -> list[str]:
    file = None if base is None else base / "shoal" / "records.jsonl"
    if file is None or not file.is_file() or file.is_symlink() or file.stat().st_size > MAX_RECORDS:
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if _is_record(line)]


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _base(plan: Plan) -> dict[str, Any]:
    source = plan.base.source
    if source is not None and Path(source).is_absolute():
        source = Path(source).name
    base = {"family": plan.base.family, "fingerprint": plan.base.fingerprint, "layers": dict(plan.base.depths)}
    return base | ({"source": source} if source is not None else {})
