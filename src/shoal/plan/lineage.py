"""Where the layers of a checkpoint come from, over any number of prunings: one key of config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.errors import NotationError
from shoal.plan.file import MAX_BYTES, load_plan
from shoal.plan.notation import format_steps, parse_steps
from shoal.plan.select import paired
from shoal.plan.steps import Run, Step, runs

KEY = "shoal"
_LONGEST = 10_000


@dataclass(frozen=True, slots=True)
class Lineage:
    """What is known of the layers of one checkpoint."""

    layers: tuple[int, ...]
    """For each layer, in order, the layer of the ORIGINAL base that it is."""
    base: dict[str, Any]
    """The original base: {family, fingerprint, layers, source}."""
    chain: tuple[str, ...] = ()
    """The prunings, first one first, as depth notation in the numbers of the model that each was applied to."""
    silent: frozenset[tuple[int, str]] = field(default_factory=frozenset)
    """(place, part) whose tensors are zero."""
    mlps: Mapping[int, int] = field(default_factory=dict)
    """By place the layer of the original base whose mlp it is, where that is another than the attention's."""

    @property
    def notation(self) -> str:
        """The layers as one plan of the original base; a layer whose two parts are silent is left out."""
        return format_steps(_steps(self))

    def then(
        self,
        slots: Sequence[int],
        silent: Iterable[tuple[int, str]],
        plan: str,
        mlps: Mapping[int, int] | None = None,
    ) -> Lineage:
        """The lineage of a model whose place s is layer `slots[s]` of this one, made by `plan`.

        `mlps`: by place the layer of this one whose mlp it is, where that is another.
        """
        layers = tuple(self.layers[i] for i in slots)
        of_mlps = tuple((mlps or {}).get(slot, i) for slot, i in enumerate(slots))
        parts = {"attention": tuple(slots), "mlp": of_mlps}
        quiet = {(slot, part) for part, of in parts.items() for slot, i in enumerate(of) if (i, part) in self.silent}
        mixed = {slot: self.mlps.get(i, self.layers[i]) for slot, i in enumerate(of_mlps)}
        mixed = {slot: layer for slot, layer in mixed.items() if layer != layers[slot]}
        return Lineage(layers, self.base, (*self.chain, plan), frozenset(quiet | set(silent)), mixed)

    def to_note(self, version: str) -> dict[str, Any]:
        """The value of `KEY` in config.json."""
        note: dict[str, Any] = {
            "base_layers": list(self.layers),
            "plan": self.notation,
            "chain": list(self.chain),
            "base": self.base,
            "version": version,
        }
        note |= {"silent": sorted([slot, part] for slot, part in self.silent)} if self.silent else {}
        return note | ({"mlps": sorted(map(list, self.mlps.items()))} if self.mlps else {})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {"layers": list(self.layers), "plan": self.notation, "chain": list(self.chain), "base": self.base}

    def describe(self) -> str:
        """Two lines for people: the original layers, and the prunings when there were several."""
        return _described(self.base, self.notation, self.chain)


@dataclass(frozen=True, slots=True)
class LineageByStack:
    """What is known of the layers of a checkpoint that has several stacks."""

    stacks: dict[str, Lineage]
    """By stack, in the model's order; the chains of these are empty."""
    base: dict[str, Any]
    """The original base, as in `Lineage`."""
    chain: tuple[str, ...] = ()
    """The prunings, first one first, each with all stacks."""

    @property
    def notation(self) -> str:
        """The layers of all stacks as one plan of the original base."""
        return "; ".join(f"{name}: {part.notation}" for name, part in self.stacks.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json; the layers by stack."""
        layers = {name: list(part.layers) for name, part in self.stacks.items()}
        return {"layers": layers, "plan": self.notation, "chain": list(self.chain), "base": self.base}

    def describe(self) -> str:
        """Two lines for people, as `Lineage.describe`."""
        return _described(self.base, self.notation, self.chain)


def read_lineages(note: object, depths: Mapping[str, int]) -> Lineage | LineageByStack | None:
    """`read_lineage` for a model of any stacks, `depths` by their names: one stack's lineage, or that of each."""
    if len(depths) == 1:
        return read_lineage(note, next(iter(depths.values())))
    if not isinstance(note, dict) or not isinstance(note.get("base_layers"), dict):
        return None
    silent, mlps, found = note.get("silent", {}), note.get("mlps", {}), {}
    if not isinstance(silent, dict) or not isinstance(mlps, dict):
        return None
    for name, depth in depths.items():
        one = {"base_layers": note["base_layers"].get(name), "base": note.get("base"), "silent": silent.get(name, [])}
        one |= {"mlps": mlps.get(name, [])}
        known = read_lineage(one, depth)
        if known is None:
            return None
        found[name] = known
    return LineageByStack(found, note["base"], _chain(note))


def read_lineage(note: object, depth: int | None) -> Lineage | None:
    """The lineage that a config's `KEY` holds for a model of `depth` layers; None when there is none, or when the note,
    which anyone may have edited, does not fit."""
    if not isinstance(note, dict) or not isinstance(note.get("base"), dict):
        return None
    layers, silent, mlps = note.get("base_layers"), note.get("silent", []), note.get("mlps", [])
    if not isinstance(layers, list) or len(layers) != depth or not all(type(i) is int and i >= 0 for i in layers):
        return None
    if not isinstance(silent, list) or not all(
        isinstance(s, list) and len(s) == 2 and type(s[0]) is int and s[1] in ("attention", "mlp") for s in silent
    ):
        return None
    if not isinstance(mlps, list) or not all(
        isinstance(m, list) and len(m) == 2 and all(type(i) is int and i >= 0 for i in m) for m in mlps
    ):
        return None
    quiet = frozenset((slot, part) for slot, part in silent)
    return Lineage(tuple(layers), note["base"], _chain(note), quiet, dict(mlps))


def lineage_of_folder(place: str | Path) -> Lineage | LineageByStack | None:
    """The lineage of a folder that `shoal write` made, by config.json and plan.json alone; None for others."""
    config = Path(place) / "config.json"
    try:
        if not config.is_file() or config.stat().st_size > MAX_BYTES:
            return None
        data = json.loads(config.read_bytes())
        depths = {name: _depth(steps, data, name) for name, steps in load_plan(place).stacks}
    except (OSError, ValueError, RecursionError, NotationError):
        return None
    return read_lineages(data.get(KEY), depths) if isinstance(data, dict) else None


def _depth(steps: tuple[Step, ...], data: Any, stack: str) -> int:
    """How many layers a checkpoint of these steps has: one for each run, unless an attention and the mlp run behind it
    are one layer, and then as many as the note says."""
    count = len(list(runs(steps)))
    note = data.get(KEY) if isinstance(data, dict) else None
    layers = note.get("base_layers") if isinstance(note, dict) else None
    layers = layers.get(stack) if isinstance(layers, dict) else layers
    said = len(layers) if isinstance(layers, list) else count
    return said if len(list(paired(steps))) <= said else count


def _chain(note: dict[str, Any]) -> tuple[str, ...]:
    """The prunings, if every one of them is depth notation; otherwise the whole as one."""
    for found in (note.get("chain"), [note.get("plan")]):
        if isinstance(found, list) and found and all(_notation(text) for text in found):
            return tuple(found)
    return ()


def _notation(text: object) -> bool:
    """Is it depth notation, of one stack or of several with their names?"""
    if not isinstance(text, str) or len(text) > _LONGEST:
        return False
    try:
        return all(bool(parse_steps(piece.rpartition(":")[2])) for piece in text.split(";"))
    except NotationError:
        return False


def _described(base: Mapping[str, Any], notation: str, chain: Sequence[str]) -> str:
    source, depths = base.get("source"), _depths(base.get("layers"))
    name = f" of {source[:200]!r}" if isinstance(source, str) else " of its first base"
    depth = f" ({sum(depths)} layers)" if depths else ""
    text = f"original layers{name}{depth}: {notation}"
    if len(chain) > 1:
        text += f"\npruned {len(chain)} times, each in the numbers before it: {' then '.join(chain)}"
    return text


def _depths(found: object) -> list[int]:
    return [depth for depth in found.values() if type(depth) is int] if isinstance(found, dict) else []


def _steps(known: Lineage) -> tuple[Step, ...]:
    steps: list[Step] = []
    for slot, layer in enumerate(known.layers):
        mlp = known.mlps.get(slot, layer)
        match {part for at, part in known.silent if at == slot}:
            case parts if parts == {"mlp"}:
                steps.append(Run(layer, "attention"))
            case parts if parts == {"attention"}:
                steps.append(Run(mlp, "mlp"))
            case parts if not parts and mlp != layer:
                steps += [Run(layer, "attention"), Run(mlp, "mlp")]
            case parts if not parts:
                steps.append(Run(layer))
    return tuple(steps)
