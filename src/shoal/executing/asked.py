"""What is asked of a model while a plan is on it, and what of that is refused before the first token.

Methods of the model are stood in for on the instance alone, and only as long as the plan is there. A copy of the model
has copies of the stand-ins, which belong to the copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import update_wrapper
from typing import Any

from shoal.errors import PlanError, ShoalWarning
from shoal.models.depth import depth_fields
from shoal.models.lists import Stack
from shoal.plan.answers import Refused
from shoal.plan.generate_ways import ANOTHER_DEPTH, BY_NUMBER, EARLY_EXIT, says

COUNTING: tuple[tuple[str, Refused, Callable[[Any], bool]], ...] = (
    ("assistant_early_exit", EARLY_EXIT, lambda value: value is not None),
    ("dola_layers", BY_NUMBER, lambda value: value is not None),
    ("use_mtp", BY_NUMBER, bool),
    ("speculation_type", BY_NUMBER, lambda value: value == "dflash"),
)
"""Settings of `generate` that mean layers by their number, and which of their values do."""
READING_INSIDE = ("Gemma4Assistant", "Gemma4UnifiedAssistant")
"""Beginnings of the classes of assistants that read what layers of the model store."""


Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], Callable[[Any], None] | None]
"""Called with a model, and with what a method of it is called with; what it returns is called with the method's result
when the method is done, with None after an error."""


class StandIn:
    """Stands in for one method of one model: `before` first, then the method."""

    def __init__(self, model: Any, name: str, before: Before) -> None:
        self.model, self.name, self.before = model, name, before
        self.method: Any = None
        self.had = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        after = self.before(self.model, args, kwargs)
        result = None
        try:
            result = self.method(*args, **kwargs)
            return result
        finally:
            if after is not None:
                after(result)

    def put(self) -> None:
        """From now on it is called."""
        self.had, self.method = self.name in self.model.__dict__, getattr(self.model, self.name)
        update_wrapper(self, self.method)
        setattr(self.model, self.name, self)

    def take_away(self) -> None:
        """The method is called again."""
        if self.had:
            setattr(self.model, self.name, self.method)
        else:
            self.model.__dict__.pop(self.name, None)


def stand_ins(model: Any, checks: Mapping[str, Before]) -> list[StandIn]:
    """One for each of the methods in `checks` that the model has, not yet put."""
    return [StandIn(model, name, check) for name, check in checks.items() if getattr(model, name, None) is not None]


def refuse_counting(settings: Any, given: Mapping[str, Any]) -> None:
    """Raise P142 when a generation config, or the assistant among what else is `given` to `generate`, means layers by
    their number in the base."""
    for name, no, is_so in COUNTING:
        value = getattr(settings, name, None)
        if is_so(value):
            sentence, code = says(no, asked=f"{name}={value}")
            raise PlanError(sentence, code=code)
    assistant = type(given.get("assistant_model")).__name__
    if assistant.startswith(READING_INSIDE):
        sentence, code = says(BY_NUMBER, asked=f"assistant_model={assistant}")
        raise PlanError(sentence, code=code)


class SaidDepth:
    """How many layers the config says, remembered from when a plan was put on: a loop that cuts the list of layers
    there would cut the plan, and a KV cache made from it would lack rows."""

    def __init__(self, stack: Stack) -> None:
        self.config, self.field = stack.config, (stack.fields or depth_fields(stack.config))[0]
        self.before = getattr(self.config, self.field, None)

    def require(self) -> None:
        """Raise P143 when the config says another number now."""
        now = getattr(self.config, self.field, None)
        if now != self.before:
            sentence, code = says(ANOTHER_DEPTH, before=self.before, now=now)
            raise PlanError(sentence, code=code)


def warn_saving(_: Any, __: tuple[Any, ...], ___: dict[str, Any]) -> None:
    """Say that the whole base is saved, whatever plan runs."""
    warnings.warn(
        ShoalWarning(
            "save_pretrained writes every layer of the base model and nothing of the plan that runs on it; "
            "shoal.write(model, plan, folder) writes the shallower model",
            code="P148",
        ),
        stacklevel=3,
    )
