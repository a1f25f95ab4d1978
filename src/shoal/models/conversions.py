"""Whether transformers can make the model's tensors of those that it stacks, joins or splits when it loads."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from shoal.errors import first_line
from shoal.models.renaming import Renamed
from shoal.plan.tensors import Shapes


class Misfit(NamedTuple):
    """Tensors of the files that do not make one of the model."""

    name: str
    """Of the model's tensor."""
    file: str
    """The tensor in the files whose shape the fewest of its kind have."""
    why: str


def misfit(model: PreTrainedModel, shapes: Shapes, found: Mapping[str, Renamed], state: Shapes) -> Misfit | None:
    """The first tensor of `state`, the tensors of `model`, that transformers' conversions do not make in its shape.

    They are tried on the meta device, where they take no memory, and once for all layers whose files have equal shapes.
    `shapes`: of every tensor in the files; `found`: where transformers puts each.
    """
    by_pattern = {
        pattern: one
        for one in get_model_conversion_mapping(model)
        if isinstance(one, WeightConverter)
        for pattern in one.source_patterns
    }
    made_of: dict[str, list[str]] = {}
    for file, one in found.items():
        if one.name is not None and one.converter in by_pattern:
            made_of.setdefault(one.name, []).append(file)
    tried = set()
    for name, files in made_of.items():
        given = tuple((str(found[file].converter), shapes[file]) for file in files)
        if (given, state[name]) not in tried:
            tried.add((given, state[name]))
            why = _why_not(copy.deepcopy(by_pattern[given[0][0]]), given, name, model, state)
            if why is not None:
                seen = Counter(given)
                odd = min(zip(files, given, strict=True), key=lambda pair: seen[pair[1]])[0]
                return Misfit(name, odd, why)
    return None


def _why_not(
    converter: Any, given: tuple[tuple[str, tuple[int, ...]], ...], name: str, model: PreTrainedModel, state: Shapes
) -> str | None:
    for pattern, shape in given:
        converter.collected_tensors[pattern].append(torch.empty(shape, device="meta"))
    try:
        made = converter.convert(name, model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError) as error:
        return None if "meta tensor" in str(error) else first_line(error, 120)  # one that reads values tells nothing
    except Exception:  # one that needs more than shapes tells nothing either
        return None
    for target, value in made.items():
        shape = tuple((value[0] if isinstance(value, list) else value).shape)
        if target in state and shape != state[target]:
            return f"{target} would be {list(shape)}, not {list(state[target])}"
    return None
