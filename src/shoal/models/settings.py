"""The settings of a model as they are at one moment, to be put back later."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

LEFT_BY_GENERATE = ("_compiled_call", "_last_compile_config", "_previous_max_cache_length")
"""Attributes that `generate` leaves on a model: what was compiled, and for caches of which length."""
FOLLOWING_WEIGHTS = ("vocab_size",)
"""Fields of a config that say what weights are there; they stay when a method of the model has changed both."""
_MISSING = object()


class SettingsBefore:
    """Config, generation config and what `generate` leaves behind. Private fields of a config, which say how it runs
    (the attention implementation), are not looked at."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._objects = [("config", model.config), ("generation_config", getattr(model, "generation_config", None))]
        self._fields = [(one, _copied(one)) for _, found in self._objects for one in _nested(found)]
        self._left = {name: model.__dict__[name] for name in LEFT_BY_GENERATE if name in model.__dict__}
        self._rows = _rows(model)

    def put_back(self) -> None:
        """Every field has the value that it had, in the object that held it."""
        for name, found in self._objects:
            if getattr(self.model, name, None) is not found:
                setattr(self.model, name, found)
        resized = _rows(self.model) != self._rows
        for one, before in self._fields:
            _put_back(vars(one), {k: v for k, v in before.items() if not (resized and k in FOLLOWING_WEIGHTS)}, resized)
        for name in LEFT_BY_GENERATE:
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self._left)


def _nested(found: Any) -> Iterator[Any]:
    """A config and those inside it."""
    if found is None:
        return
    yield found
    for value in vars(found).values():
        if isinstance(value, PreTrainedConfig):
            yield from _nested(value)


def _copied(found: Any) -> dict[str, Any]:
    return {name: _copy(value) for name, value in vars(found).items() if not name.startswith("_")}


def _copy(value: Any) -> Any:
    return value if isinstance(value, PreTrainedConfig) else copy.deepcopy(value)


def _put_back(fields: dict[str, Any], before: dict[str, Any], resized: bool) -> None:
    for name in [name for name in fields if not name.startswith("_") and name not in before]:
        if not (resized and name in FOLLOWING_WEIGHTS):
            del fields[name]
    for name, value in before.items():
        now = fields.get(name, _MISSING)
        if now is not value and (type(now) is not type(value) or now != value):
            fields[name] = _copy(value)


def _rows(model: PreTrainedModel) -> int | None:
    """Rows of the input embeddings; None for a model that has no such table."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    weight = getattr(table, "weight", None)
    return None if weight is None else int(weight.shape[0])
