"""The plan: what runs, stack by stack, on which base. A frozen value: every edit returns a new plan."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import assert_never

from shoal.errors import NotationError, PlanError
from shoal.plan.notation import format_steps, parse_steps
from shoal.plan.sources import STACK_NAME
from shoal.plan.spec import Spec
from shoal.plan.steps import Exit, Map, Parallel, Run, Step, layers_of, runs

_STACK = re.compile(rf"\s*(?:(?P<name>{STACK_NAME.pattern})\s*:)?(?P<steps>.*)", re.DOTALL | re.ASCII)


@dataclass(frozen=True, slots=True)
class Base:
    """The model a plan is made for."""

    family: str
    fingerprint: str
    depths: tuple[tuple[str, int], ...]
    source: str | None = field(default=None, compare=False)
    """Where the model came from (hub id, folder); information only, not part of the plan's identity."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs, stack by stack. Layers keep the base model's 0-based index for ever.

    Raises `PlanError`: P102 when the stacks are not those of the base, P104 for a stack without a step, P117 for a name
    that depth notation cannot write. Whether the layers exist and fit is the question of `shoal.plan.check`.
    """

    base: Base
    stacks: tuple[tuple[str, tuple[Step, ...]], ...]

    def __post_init__(self) -> None:
        given, there = [name for name, _ in self.stacks], [name for name, _ in self.base.depths]
        if given != there:
            raise PlanError(
                f"the plan has the stacks {given}, its model has {there}; give these, in order", code="P102"
            )
        for name, steps in self.stacks:
            if not STACK_NAME.fullmatch(name):
                raise PlanError(f"a stack cannot be called {name!r:.60}; use letters, digits and _", code="P117")
            if not steps:
                raise PlanError(f"stack {name!r} would have no step left; keep at least one layer", code="P104")

    @staticmethod
    def identity(spec: Spec, *, source: str | None = None) -> Plan:
        """The plan that runs every layer of the base model once, in order."""
        base = Base(spec.family, spec.fingerprint, tuple((s.name, s.depth) for s in spec.stacks), source)
        return Plan(base, tuple((s.name, tuple(Run(i) for i in range(s.depth))) for s in spec.stacks))

    def stack_name(self, name: str | None = None) -> str:
        """`name` if the plan has that stack; without a name the decoder, or the first stack."""
        names = [n for n, _ in self.stacks]
        if name is None:
            return "decoder" if "decoder" in names else names[0]
        if name not in names:
            raise PlanError(f"the plan has no stack {name!r}; it has {', '.join(names)}", code="P102")
        return name

    def steps(self, stack: str | None = None) -> tuple[Step, ...]:
        """The steps of one stack."""
        return dict(self.stacks)[self.stack_name(stack)]

    def depth(self, stack: str | None = None) -> int:
        """The base model's number of layers in one stack."""
        return dict(self.base.depths)[self.stack_name(stack)]

    def with_steps(self, steps: tuple[Step, ...], stack: str | None = None) -> Plan:
        """The same plan with other steps in one stack."""
        name = self.stack_name(stack)
        return Plan(self.base, tuple((n, steps if n == name else old) for n, old in self.stacks))

    def layers(self, stack: str | None = None) -> tuple[int, ...]:
        """Base indices of the layers that run whole or in part, in order, repeats included."""
        return tuple(run.layer for run in runs(self.steps(stack)))

    def dropped(self, stack: str | None = None) -> tuple[int, ...]:
        """Base indices of the layers of which nothing runs, ascending."""
        return tuple(sorted(set(range(self.depth(stack))) - set(self.layers(stack))))

    def changed(self) -> tuple[str, ...]:
        """The stacks in which not every layer runs once, whole, in order, with its own weights and KV."""
        return tuple(name for name, depth in self.base.depths if self.steps(name) != tuple(map(Run, range(depth))))

    def is_identity(self) -> bool:
        """True when no stack is changed."""
        return not self.changed()

    @property
    def hash(self) -> str:
        """sha256 of what runs on which base; the same on every machine and Python."""
        facts = [self.base.fingerprint, [[n, format_steps(s)] for n, s in self.stacks]]
        return "sha256:" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def __str__(self) -> str:
        return format_plan(self)


def parse_plan(text: str, base: Plan) -> Plan:
    """Read the notation of a whole plan; stacks that are not named stay as they are in `base`.

    `base` is usually `Plan.identity(spec)`. Whether the layers exist is `check`'s question, not the parser's.
    """
    plan, seen = base, set[str]()
    for piece in text.split(";"):
        found = _STACK.fullmatch(piece)
        assert found is not None  # the pattern takes any text
        name = plan.stack_name(found["name"])
        if name in seen:
            raise NotationError(f"stack {name!r} is given twice; write each stack once")
        seen.add(name)
        plan = plan.with_steps(parse_steps(found["steps"]), name)
    return plan


def format_plan(plan: Plan) -> str:
    """The canonical text of a plan; the stack's name is left out when there is only one stack."""
    if len(plan.stacks) == 1:
        return format_steps(plan.stacks[0][1])
    return "; ".join(f"{name}: {format_steps(steps)}" for name, steps in plan.stacks)


def strip(plan: Plan, stack: str | None = None) -> str:
    """One character per base layer: █ runs, ▀ attention only, ▄ mlp only, ≡ mapped, ∥ parallel, ↻ repeated, · dropped.

    A layer outside the base model, which `check` would refuse, has no place and is left out.
    """
    marks = dict.fromkeys(range(plan.depth(stack)), "·")
    for step in plan.steps(stack):
        for layer in layers_of(step):
            if layer in marks:
                marks[layer] = _mark(step, marks[layer])
    return "".join(marks.values())


def _mark(step: Step, before: str) -> str:
    match step:
        case Run():
            mark = {"layer": "█", "attention": "▀", "mlp": "▄"}[step.part]
            if {before, mark} == {"▀", "▄"}:
                return "█"
            return mark if before == "·" else "↻"
        case Map():
            return "≡"
        case Parallel():
            return "∥"
        case Exit():
            return before
        case _:
            assert_never(step)
