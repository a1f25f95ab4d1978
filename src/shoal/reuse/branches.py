"""The branches of a model by name, and a way around the forwards of modules that leaves nothing behind."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from shoal.errors import UsageError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with."""
Around = Callable[[Callable[[], Any], Call], Any]
"""Answers in place of a forward; it is given the forward, ready to run, and what that would be called with."""


def named_branches(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """The names of the modules that fit `patterns`, in the model's order.

    A pattern is a module's name in which * stands for anything: `transformer_blocks.*.attn1`. Raises U707 for a pattern
    that fits no module, and for modules of which one is inside another.
    """
    there = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not fnmatch.filter(there, pattern):
            raise UsageError(
                f"no module of the model is called {pattern}; its modules are called like {', '.join(there[:3])}",
                code="U707",
            )
    found = [name for name in there if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    for name in found:
        if inner := next((other for other in found if other.startswith(f"{name}.")), None):
            raise UsageError(f"the branch {inner} is inside the branch {name}; name one of them", code="U707")
    return tuple(found)


def modules_of(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules with these names. Raises U707 for a name that the model does not have."""
    there = dict(model.named_modules())
    for name in names:
        if name not in there:
            raise UsageError(f"the model has no module {name}, which the schedule names", code="U707")
    return [there[name] for name in names]


@contextmanager
def around_forwards(pairs: Sequence[tuple[nn.Module, Around]]) -> Iterator[None]:
    """Meanwhile the forward of each module is asked of the function beside it. Hooks of the module see what that
    answers. Afterwards the module has the attributes that it had."""
    with ExitStack() as undone:
        for module, around in pairs:
            undone.callback(_put_around(module, around))
        yield


def _put_around(module: nn.Module, around: Around) -> Callable[[], None]:
    held = module.__dict__.get("forward")  # that of another wrapper, such as accelerate's
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(inner, *args, **kwargs), (args, kwargs))

    def undo() -> None:
        if held is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = held

    module.__dict__["forward"] = forward
    return undo


def each_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in it changed, in tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        changed = [each_tensor(one, change) for one in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    if isinstance(value, dict):
        return {name: each_tensor(one, change) for name, one in value.items()}
    return value


def copied(value: Any) -> Any:
    """Tensors as they are now: what is done to them in place later is not seen."""
    return each_tensor(value, lambda tensor: tensor.detach().clone())


def shapes_given(call: Call) -> list[tuple[int, ...]]:
    """The shapes of the tensors that a module is called with."""
    found: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tuple(tensor.shape))
        return tensor

    each_tensor(call, note)
    return found
