"""What probing cannot know, as data: one file a family, each with one `FAMILY`. Most families need no file."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from functools import cache

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """Facts about the model types named in `types`."""

    types: tuple[str, ...] = ()
    stack_path: str | None = None
    """Where the layers are, when the probing rule does not find them."""
    refused: str | None = None
    """Why no plan can be right for this family."""
    pinned: str | None = None
    """Why layer 0 must stay first, if it must."""
    pinned_if: str | None = None
    """The config field that must be set for `pinned` to hold."""
    first_owns: str | None = None
    """The module that only layer 0 has and whose result it hands on: with another layer first, that one gets it."""
    in_order: str | None = None
    """Why layers must keep their order: what a layer takes over from the one before."""
    takes_over: tuple[str, str] | None = None
    """(field with an entry for each layer, the entry of layers that take something over from the one before, so that
    none of them can run first)."""
    once: str | None = None
    """Why no layer can run twice."""
    sized_by_depth: dict[str, int] = field(default_factory=dict)
    """{end of a tensor's name: dimension} of tensors outside the layers that hold one block for every layer."""
    numbering: tuple[str, ...] = ()
    """Attributes that follow a layer's position and change nothing it computes; every other such attribute does."""
    shares_kv: str | None = None
    """The config field that says how many of the last layers read the keys and values of another, the last of their
    kind that stores its own."""
    sharing_marks: tuple[str, ...] = ()
    """Attributes by which such a layer, and the one that it reads, know what they are."""
    position_numbers: str | None = None
    """What the family computes from a layer's position: a rewritten model that shifts a layer would differ."""


@cache
def _all() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family: Family = importlib.import_module(f"{__name__}.{module.name}").FAMILY
        for model_type in family.types:
            found[model_type] = family
    return found


def family_of(config: PreTrainedConfig) -> Family:
    """The exceptions declared for this model type; an empty declaration when there are none."""
    return _all().get(config.model_type, Family())
