"""Names of tensors in files -> names in the model, as transformers itself renames them when it loads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from shoal.plan.tensors import Shapes


@dataclass(frozen=True, slots=True)
class Renamed:
    """Where transformers puts one tensor of a file."""

    name: str | None
    """In the model; None when it belongs to no part of it."""
    converter: str | None = None
    """The pattern of the conversion in which it is put together with others, or split; None for one that is renamed."""
    ignored: bool = False
    """Does transformers leave it out without a word?"""
    called: str = ""
    """What transformers calls it when it reports that the model has no place for it."""

    @property
    def converted(self) -> bool:
        """Is it one of several tensors that are put together, or a part of one that is split?"""
        return self.converter is not None


def state_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of a model, which may be on the meta device."""
    found: dict[str, torch.Tensor] = model.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def renamed(model: PreTrainedModel, files: Iterable[str], state: Shapes) -> dict[str, Renamed]:
    """Each tensor of the files as transformers renames it when it loads `model`, whose tensors are `state`."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    found: dict[str, Renamed] = {}
    lost: dict[str, str] = {}
    for file in sorted(files, key=dot_natural_key):  # some renamings remember the names before, in this order
        name, pattern = rename_source_key(file, renamings, converters, model.base_model_prefix, state)
        if name not in state and file in state:
            name, pattern = file, None
        if name in state:
            found[file] = Renamed(name, pattern)
        else:
            lost[file] = name
    ignored = left_out_silently(model, {*lost, *lost.values()})
    return found | {
        file: Renamed(None, ignored=not ignored.isdisjoint((file, name)), called=name) for file, name in lost.items()
    }


def left_out_silently(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Those of `names`, which are no tensors of `model`, that transformers leaves out without a word when it loads it:
    asked of transformers itself, which knows more than the patterns of the model's class."""
    asked = set(names)
    info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(asked))
    model._adjust_missing_and_unexpected_keys(info)
    return asked - info.unexpected_keys
