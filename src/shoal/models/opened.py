"""One model, opened: its stacks, what their layers do, and what they are made of, found out once and handed down."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cached_property
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import ModelError
from shoal.models.calls import device_of
from shoal.models.describe import describe
from shoal.models.examine import StackFacts, examine
from shoal.models.lists import beside
from shoal.models.stacks import Stack, find_stacks, unwrap
from shoal.plan import Spec
from shoal.plan.sources import StackLayer

T = TypeVar("T")
_KEY = "_shoal_opened"
"""Where a model keeps what is known of it: it lives as long as the model, and no longer."""


class OpenedModel:
    """What is known of a model. Made by `open_model`; found out when it is asked for, once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.stacks = find_stacks(model)
        self._facts: dict[str, StackFacts] = {}
        self._remembered: dict[Hashable, Any] = {}
        self._seen = _state(model)

    def stack(self, name: str | None = None) -> Stack:
        """The stack called `name`; without a name the decoder, or the only one. Raises M304 for an unknown name."""
        stacks = {stack.name: stack for stack in self.stacks}
        wanted = name or ("decoder" if "decoder" in stacks else next(iter(stacks)))
        if wanted not in stacks:
            raise ModelError(f"the model has no stack {wanted!r}; it has {', '.join(stacks)}", code="M304")
        return stacks[wanted]

    def layer_of(self, place: int | StackLayer, stack: Stack) -> nn.Module:
        """The layer that a plan names so in `stack`: of that stack by its base index, or of another one."""
        if isinstance(place, StackLayer):
            return self.stack(place.stack).layer(place.layer)
        return stack.layer(place)

    def facts(self, name: str | None = None) -> StackFacts:
        """What the layers of a stack do, by one forward of one token. Raises M305, see `examine`."""
        stack = self.stack(name)
        if stack.name not in self._facts:
            self._facts[stack.name] = examine(self.model, stack)
        return self._facts[stack.name]

    def remember(self, what: str, find: Callable[[], T]) -> T:
        """What `find` finds out of the model, found out once for each attention implementation and dtype. It is kept as
        long as the model is the one that was seen."""
        key = (what, getattr(self.model.config, "_attn_implementation", None), self.model.dtype)
        if key not in self._remembered:
            self._remembered[key] = find()
        found: T = self._remembered[key]
        return found

    @cached_property
    def spec(self) -> Spec:
        """What plans are checked and costed against. Raises what `facts` raises."""
        # before weights are counted: a forward makes new placeholders for those that are offloaded
        facts: Mapping[str, StackFacts] = {stack.name: self.facts(stack.name) for stack in self.stacks}
        return describe(self.model, self.stacks, facts)

    @cached_property
    def takes(self) -> frozenset[str]:
        """The arguments of the model's forward."""
        return frozenset(signature(self.model.forward).parameters)

    @property
    def device(self) -> torch.device:
        """Where the model reads its inputs; an offloaded one moves them itself."""
        return device_of(self.model)

    def is_current(self) -> bool:
        """Whether modules, shapes and settings of the model are those that were seen. Not to be asked under a plan."""
        return self._seen == _state(self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model is another model, of which nothing is known."""

    def __reduce__(self) -> Any:
        return type(None), ()


def open_model(model: nn.Module | OpenedModel) -> OpenedModel:
    """The opened model, from what is known of it where it is the model that was seen.

    A module that was replaced, a parameter of another shape (adapters, another quantisation) or another setting in the
    config makes it another model; dtype, device and attention implementation do not. Raises M301 for what is no
    transformers model, M302 or M303 when its layers cannot be found or not be planned.
    """
    if isinstance(model, OpenedModel):
        return model
    inner = unwrap(model)
    known = inner.__dict__.get(_KEY)
    if isinstance(known, OpenedModel) and known.model is inner and (_has_plan(known) or known.is_current()):
        return known
    made = inner.__dict__[_KEY] = OpenedModel(inner)
    return made


def _has_plan(opened: OpenedModel) -> bool:
    """Whether another list stands in for the layers of a stack: what is known was known before."""
    return any(getattr(stack.layers, "is_proxy_list", False) for stack in opened.stacks)


def _state(model: PreTrainedModel) -> tuple[list[Any], dict[str, Any]]:
    return list(_modules(model)), _settings(model.config)


def _modules(model: nn.Module) -> Iterator[Any]:
    """Weak references to all modules of the model's own, and the shapes of their own parameters."""
    others = beside(model)
    for module in model.modules():
        if id(module) in others:
            continue
        yield weakref.ref(module)
        for parameter in module._parameters.values():
            yield None if parameter is None else parameter.shape


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config and of those inside it, lists and dictionaries copied; private ones, which hold how it
    runs, left out."""
    return {name: _copied(value) for name, value in vars(config).items() if not name.startswith("_")}


def _copied(value: Any) -> Any:
    if isinstance(value, PreTrainedConfig):
        return _settings(value)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value
