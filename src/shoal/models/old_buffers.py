"""Buffers that older versions stored with a model and that no class takes now: masks, positions, tables."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from shoal.models.renaming import renamed, state_shapes

ShapesOrNames = Mapping[str, tuple[int, ...] | None]


def old_buffers(model: PreTrainedModel, shapes: ShapesOrNames, dtypes: Mapping[str, str]) -> set[str]:
    """The tensors of a checkpoint that have no place in `model` and can be no weights, by what they are and not by
    their names: whole numbers or bools, single numbers, and tables [1, 1, ...] for all heads and batches. `dtypes`: as
    the files' headers call them, where they are known.
    """
    odd = [name for name, shape in shapes.items() if shape is not None and _no_weight(shape, dtypes.get(name, "F"))]
    if not odd:
        return set()
    return {file for file, one in renamed(model, odd, state_shapes(model)).items() if one.name is None}


def _no_weight(shape: tuple[int, ...], dtype: str) -> bool:
    return not dtype.startswith(("F", "BF")) or not shape or (len(shape) == 4 and shape[:2] == (1, 1))
