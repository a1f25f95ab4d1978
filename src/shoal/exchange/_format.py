"""What every format is: two functions, and the refusals that they share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from shoal.errors import NotationError
from shoal.plan import Plan, Run, Spec, Step, format_steps

MAX_BYTES = 4_000_000


@dataclass(frozen=True)
class Format:
    """A file format that holds a plan.

    `read(text, identity)`: `identity` is the plan that runs the whole base model. Any bytes give a plan or a
    `ShoalError`: N101 unreadable, N102 a layer that does not exist, N103 something that no plan can say, N106 another
    depth. `write(plan, spec)`: raises N104 for a plan that the format cannot say, N105 when a fact is missing; `spec`
    is needed by formats that state sizes.
    """

    read: Callable[[str | bytes, Plan], Plan]
    write: Callable[[Plan, Spec | None], str]


def decoded(text: str | bytes, name: str, *, limit: int = MAX_BYTES) -> str:
    """The text of a file. Raises N101 when it is too large or not UTF-8."""
    if len(text) > limit:
        raise NotationError(f"the {name} file is larger than {limit // 1000} kB; give the right file", code="N101")
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise NotationError(f"the {name} file is not UTF-8 text; give the right file", code="N101") from None


def from_json(text: str | bytes, name: str) -> Any:
    """Parsed JSON. Raises N101 for anything else, nesting without end included."""
    try:
        return json.loads(decoded(text, name))
    except (ValueError, RecursionError) as error:
        raise NotationError(f"the {name} file is not JSON ({type(error).__name__}); give JSON", code="N101") from None


def layer_numbers(found: object, what: str, depth: int, *, first: int = 0) -> frozenset[int]:
    """A list of layers as 0-based base indices; `first` is how the format calls layer 0. Raises N101 or N102."""
    if not isinstance(found, list):
        raise NotationError(f"{what} is {shown(found)}; expected a list of layers", code="N101")
    layers = set[int]()
    for number in found:
        if type(number) is not int or not first <= number < depth + first:
            raise NotationError(
                f"{what} names layer {shown(number)}; its layers are {first} to {depth + first - 1}", code="N102"
            )
        if number - first in layers:
            raise NotationError(f"{what} names layer {number} twice; name each layer once", code="N102")
        layers.add(number - first)
    return frozenset(layers)


def shown(value: object) -> str:
    """A value as a message may quote it: never long, whatever a file holds."""
    if isinstance(value, str):
        return repr(value[:40])
    if isinstance(value, int | float | None) and (not isinstance(value, int) or abs(value) < 10**18):
        return repr(value)
    names = {list: "a list", dict: "a mapping", int: "a huge number"}
    return names.get(type(value), f"a {type(value).__name__}")


def refuse_unless_said(plan: Plan, sayable: tuple[Step, ...], *, name: str, can: str) -> None:
    """Raise N104 unless the plan's main stack runs exactly `sayable` and every other stack is whole.

    The message names the first step that differs, what the format can say (`can`), and `sayable` as the nearest plan.
    """
    main = plan.stack_name()
    for stack, depth in plan.base.depths:
        if stack != main and plan.steps(stack) != tuple(Run(i) for i in range(depth)):
            raise NotationError(
                f"{name} cannot say {stack}: {_short(plan.steps(stack))}, it knows the {main} alone; "
                f"keep the {stack} whole",
                code="N104",
            )
    steps = plan.steps(main)
    if steps != sayable:
        _refuse_step(steps, sayable, name, can)


def _refuse_step(steps: tuple[Step, ...], sayable: tuple[Step, ...], name: str, can: str) -> NoReturn:
    pairs = zip(steps, sayable, strict=False)
    place = next((n for n, (step, near) in enumerate(pairs) if step != near), len(sayable))
    near = f"the nearest plan is {_short(sayable)}" if sayable else "keep at least one layer"
    raise NotationError(
        f"{name} cannot say {_short((steps[place],))} (step {place}, 0-based), it says {can}; {near}", code="N104"
    )


def _short(steps: tuple[Step, ...]) -> str:
    text = format_steps(steps)
    return text if len(text) <= 120 else f"{text[:120]}..."
