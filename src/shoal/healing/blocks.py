"""Where a plan lacks something of its base, and the stretches of steps that can make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.errors import UsageError
from shoal.fitting.holes import find_holes
from shoal.plan import Map, Plan, Run, Step

Side = Literal["both", "before", "behind"]


@dataclass(frozen=True, slots=True)
class Block:
    """The steps begin..end-1, which stand for the base layers first..last: what enters layer `first` of the dense model
    goes in, and what layer `last` makes is to come out."""

    begin: int
    end: int
    first: int
    last: int


def gaps(plan: Plan, stack: str) -> tuple[tuple[int, int], ...]:
    """The places (begin, end) in the steps where something of the base is missing (begin = end) or a map stands in.

    Raises U552 unless layers run upwards, each once, and U641 where nothing is missing.
    """
    try:
        found = {(hole.position, hole.position) for hole in find_holes(plan, "healing beside removed layers", stack)}
    except UsageError as error:
        if error.code != "U553":
            raise
        found = set()
    found |= {(n, n + 1) for n, step in enumerate(plan.steps(stack)) if isinstance(step, Map)}
    if not found:
        raise UsageError(
            f"the plan {plan} removes nothing, so there is nothing beside which to heal; learn all (--learn lora)",
            code="U641",
        )
    return tuple(sorted(found))


def beside_gaps(plan: Plan, stack: str, width: int, side: Side = "both") -> list[int]:
    """The places in the steps of the `width` runs before and behind each gap."""
    steps = plan.steps(stack)
    found: set[int] = set()
    for begin, end in gaps(plan, stack):
        before = [n for n in range(begin - 1, -1, -1) if not isinstance(steps[n], Map)][:width]
        behind = [n for n in range(end, len(steps)) if not isinstance(steps[n], Map)][:width]
        found |= set(before if side != "behind" else ()) | set(behind if side != "before" else ())
        if side == "before" and not before:  # nothing runs before the first layer
            found |= set(behind)
        if side == "behind" and not behind:
            found |= set(before)
    return sorted(found)


def blocks_at_gaps(plan: Plan, stack: str, width: int, side: Side = "both") -> tuple[Block, ...]:
    """One block for each gap with the `width` steps before and behind it; those that share a step are one."""
    steps = plan.steps(stack)
    ranges: list[tuple[int, int]] = []
    for begin, end in gaps(plan, stack):
        left = begin - width if side != "behind" or end >= len(steps) else begin
        right = end + width if side != "before" or begin == 0 else end
        left, right = _whole(steps, max(0, left), min(len(steps), right))
        if ranges and left < ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(right, ranges[-1][1]))
        else:
            ranges.append((left, right))
    return _blocks(plan, stack, ranges)


def blocks_of_layers(plan: Plan, stack: str) -> tuple[Block, ...]:
    """A block for each step, which makes up for what is missing behind it too. Raises U552 as `gaps` does."""
    steps = plan.steps(stack)
    if not plan.is_identity():
        gaps(plan, stack)
    ranges, at = list[tuple[int, int]](), 0
    while at < len(steps):
        ranges.append(_whole(steps, at, at + 1))
        at = ranges[-1][1]
    return _blocks(plan, stack, ranges)


def _whole(steps: tuple[Step, ...], begin: int, end: int) -> tuple[int, int]:
    """The range, widened where it cuts a layer between its attention and its mlp."""
    if begin > 0 and begin < len(steps) and _layer(steps[begin]) == _layer(steps[begin - 1]) is not None:
        begin -= 1
    if 0 < end < len(steps) and _layer(steps[end]) == _layer(steps[end - 1]) is not None:
        end += 1
    return begin, end


def _layer(step: Step) -> int | None:
    return step.layer if isinstance(step, Run) else None


def _blocks(plan: Plan, stack: str, ranges: list[tuple[int, int]]) -> tuple[Block, ...]:
    """What is missing in front of a block's first step or behind its last belongs to it; between two blocks to the
    former."""
    steps, made = plan.steps(stack), list[Block]()
    for begin, end in ranges:
        first = 0 if begin == 0 else _extent(steps[begin - 1])[1] + 1
        if made and made[-1].end == begin:
            first = made[-1].last + 1
        last = plan.depth(stack) - 1 if end == len(steps) else _extent(steps[end])[0] - 1
        made.append(Block(begin, end, first, last))
    return tuple(made)


def _extent(step: Step) -> tuple[int, int]:
    assert isinstance(step, Run | Map)
    return (step.layer, step.layer) if isinstance(step, Run) else (step.first, step.last)
