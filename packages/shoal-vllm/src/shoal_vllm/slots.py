"""The slots of a planned checkpoint, read from its config.json and checked. Needs the standard library only.

A planned checkpoint is a stock model with one layer for each slot. A slot names the layer of the base whose place and
tensors it has, the part of it that runs, and what it takes from elsewhere. Shoal writes this
(`src/shoal/models/engine_slots.py` there); whoever changes one side changes `FORMAT` on both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = "shoal-slots/1"
MODEL_TYPE = "shoal"
PARTS = ("layer", "attention", "mlp")
_FIELDS = {"base", "part", "tie", "own", "keys", "values", "map", "before"}
_MAP = {"weight", "bias", "gate", "down", "up", "scale", "keys", "values", "limit"}


class FolderError(ValueError):
    """What is wrong with a folder, in one sentence with a code."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code


@dataclass(frozen=True)
class Slot:
    """One layer of the stock model."""

    base: int
    part: str = "layer"
    tie: int | None = None
    """The base layer whose matrices it has in place of its own."""
    own: tuple[str, ...] = ()
    """Ids of new tensors over these, later ones last."""
    reads: int | None = None
    """The slot whose keys and values it reads, of which it stores none."""
    before: tuple[str, ...] = ()
    """Ids of maps in front of it."""


@dataclass(frozen=True)
class Part:
    """The modules of one base layer."""

    attention: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    returns: Mapping[str, int] = field(default_factory=dict)
    """How many values each of them returns beside its tensor; -1: none, and no tuple."""
    stored: Mapping[str, int] = field(default_factory=dict)
    """The modules that make keys or values and nothing else, with their widths."""


@dataclass(frozen=True)
class Slots:
    """What config.json says to engines."""

    architecture: str
    config: Mapping[str, Any]
    layers: str
    slots: tuple[Slot, ...]
    behind: tuple[str, ...]
    parts: Mapping[int, Part]
    new: Mapping[str, Mapping[str, tuple[int, ...]]]
    """Shapes of new tensors by id and name."""
    outside: tuple[str, ...]
    """The names of tensors that are no layer's."""

    def left_out(self, slot: Slot) -> tuple[str, ...]:
        """The children of the layer that do not run in a slot."""
        part = self.parts[slot.base]
        return {"layer": (), "attention": part.mlp, "mlp": part.attention}[slot.part]

    def unmade(self, slot: Slot) -> Mapping[str, int]:
        """The modules of a slot whose answers nobody reads, with their widths."""
        return {} if slot.reads is None else self.parts[slot.base].stored

    def own(self, slot: Slot) -> dict[str, str]:
        """By name in the layer the tensor of the folder that a slot has of its own."""
        return {name: f"shoal.{one}.{name}" for one in slot.own for name in self.new[one]}

    def source(self, slot: Slot, name: str, *, matrix: bool) -> str:
        """The tensor of the folder that a slot's layer has under a name. A tie gives matrices: two and more
        dimensions."""
        base = slot.tie if matrix and slot.tie is not None else slot.base
        return self.own(slot).get(name) or f"{self.layers}.{base}.{name}"

    def stores(self) -> list[int]:
        """The slots that have a row in the KV cache."""
        return [n for n, slot in enumerate(self.slots) if slot.part != "mlp" and slot.reads is None]


def read_slots(config: Mapping[str, Any]) -> Slots:
    """The slots in the content of a planned checkpoint's config.json. Raises `FolderError` W300 for a plan without
    slots, W301 for another format, W302 for slots that do not belong together, W303 for keys and values of a slot that
    does not come before, W304 for what the engine cannot do, W305 for tensors that are named and not there, W306 for
    tensors with two uses."""
    said = config.get("slots")
    if said is None:
        why = config.get("no_slots") or "its plan has no slots"
        raise FolderError(
            f"vLLM cannot run this planned checkpoint: {why}; run it with Shoal, or write another plan", "W300"
        )
    _require_format(said)
    slots = [_slot(number, one) for number, one in enumerate(_list(said, "slots"))]
    found = Slots(
        _text(_list(said, "architectures")[:1]), _dict(said, "config"), _text([said.get("layers")]), tuple(slots),
        tuple(_list(said, "behind")), {int(base): _part(one) for base, one in _dict(said, "parts").items()},
        {one: {n: tuple(shape) for n, shape in names.items()} for one, names in _dict(said, "new").items()},
        tuple(_list(said, "outside")),
    )  # fmt: skip
    for problem in (*_places(found, config), *_sources(found), *_tensors(found)):
        raise problem
    return found


def _require_format(said: Any) -> None:
    given = said.get("format") if isinstance(said, Mapping) else None
    if given == FORMAT:
        return
    kind, _, number = str(given).partition("/")
    if kind == FORMAT.partition("/")[0] and number.isdigit() and int(number) > int(FORMAT.partition("/")[2]):
        raise FolderError(
            f"the folder has the format {given}, and this plugin reads {FORMAT}; install a newer shoal-vllm", "W301"
        )
    raise FolderError(
        f"the folder has no format that this plugin reads ({given!r:.40} instead of {FORMAT}); write it anew with a "
        "newer Shoal",
        "W301",
    )


def _slot(number: int, said: Any) -> Slot:
    if not isinstance(said, Mapping) or not _is_number(said.get("base")):
        raise FolderError(f"slot {number} names no layer of the base ({said!r:.60}); write the folder anew", "W302")
    strange = sorted(set(said) - _FIELDS)
    if strange:
        raise FolderError(
            f"slot {number} has {strange[0]!r}, which this plugin does not know; install a newer shoal-vllm", "W301"
        )
    if said.get("part", "layer") not in PARTS:
        raise FolderError(f"slot {number} runs the part {said['part']!r:.40}; a part is {', '.join(PARTS)}", "W302")
    keys, values = said.get("keys"), said.get("values")
    if said.get("map") is not None:
        raise FolderError(
            f"slot {number} takes the attention map of another layer, and vLLM's kernels keep none; run the plan with "
            "Shoal",
            "W304",
        )
    if keys != values:
        raise FolderError(
            f"slot {number} takes keys or values of another layer without the other half, and vLLM shares both or "
            "none; run the plan with Shoal",
            "W304",
        )
    names = (tuple(said.get("own", ())), tuple(said.get("before", ())))
    return Slot(said["base"], said.get("part", "layer"), said.get("tie"), names[0], keys, names[1])


def _part(said: Mapping[str, Any]) -> Part:
    return Part(
        tuple(said.get("attention", ())), tuple(said.get("mlp", ())), said.get("returns", {}), said.get("stored", {})
    )


def _places(found: Slots, config: Mapping[str, Any]) -> Iterator[FolderError]:
    """W302: slots that are no layers of this base, or not as many as the stock config has."""
    base = config.get("plan", {}).get("base", {}).get("stacks", {})
    depth = max(base.values()) if base else None
    counts = [found.config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in found.config]
    if not found.slots or (counts and counts[0] != len(found.slots)):
        layers = f"{counts[0]} layers" if counts else "layers"
        yield FolderError(
            f"the folder's config has {layers} and there are {len(found.slots)} slots; write it anew", "W302"
        )
    for number, slot in enumerate(found.slots):
        for layer in (slot.base, slot.tie):
            if layer is not None and not (_is_number(layer) and (depth is None or layer < depth)):
                there = "" if depth is None else f", and the base has {depth} layers"
                yield FolderError(f"slot {number} names layer {layer!r:.20}{there}; write the folder anew", "W302")
        if slot.base not in found.parts or (slot.part != "layer" and not found.parts[slot.base].attention):
            yield FolderError(
                f"slot {number} runs the {slot.part} of layer {slot.base}, whose parts are not named; write the "
                "folder anew",
                "W302",
            )


def _sources(found: Slots) -> Iterator[FolderError]:
    """W303: keys and values of a slot that comes later, or that stores none."""
    stores = set(found.stores())
    for number, slot in enumerate(found.slots):
        if slot.reads is None:
            continue
        if slot.part == "mlp":
            yield FolderError(f"slot {number} is an mlp and reads keys and values; write the folder anew", "W302")
        if not _is_number(slot.reads) or slot.reads >= number:
            yield FolderError(
                f"slot {number} reads the keys and values of slot {slot.reads!r:.20}, which does not come before it; "
                "write the folder anew",
                "W303",
            )
        elif slot.reads not in stores:
            yield FolderError(
                f"slot {number} reads the keys and values of slot {slot.reads}, which stores none; write the folder "
                "anew",
                "W303",
            )


def _tensors(found: Slots) -> Iterator[FolderError]:
    """W305 for ids without tensors, W306 for tensors of a run that are a map's too, and for ids that nobody uses."""
    runs = {one for slot in found.slots for one in slot.own}
    maps = {one for slot in found.slots for one in slot.before} | set(found.behind)
    for one in sorted(runs | maps):
        if not found.new.get(one):
            yield FolderError(f"a slot names the tensors {one!r:.40}, of which there is none; write it anew", "W305")
    for one in sorted(runs & maps):
        yield FolderError(f"the tensors {one!r:.40} have two owners, a map and a run; write the folder anew", "W306")
    for one in sorted(set(found.new) - runs - maps):
        yield FolderError(f"the new tensors {one!r:.40} belong to no slot; write the folder anew", "W306")
    for one in sorted(maps):
        for name in sorted(set(found.new.get(one, ())) - _MAP):
            yield FolderError(f"the map {one!r:.40} has the tensor {name!r:.40}, which no map has", "W305")


def _is_number(one: Any) -> bool:
    return isinstance(one, int) and not isinstance(one, bool) and one >= 0


def _list(said: Mapping[str, Any], name: str) -> list[Any]:
    found = said.get(name)
    if not isinstance(found, list):
        raise FolderError(f"the folder's slots have no list {name!r}; write it anew", "W302")
    return found


def _dict(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = said.get(name)
    if not isinstance(found, Mapping):
        raise FolderError(f"the folder's slots have no {name!r}; write it anew", "W302")
    return found


def _text(said: list[Any]) -> str:
    if not said or not isinstance(said[0], str):
        raise FolderError("the folder's slots name no architecture or no list of layers; write it anew", "W302")
    return said[0]
