"""Which steps depth notation writes as one piece: 0-11, 10x3, 15-29=0-14."""

from __future__ import annotations

from shoal.plan.select import run_of
from shoal.plan.sources import StackLayer
from shoal.plan.steps import Run, Step

Tie = int | StackLayer | str | None


def folded(steps: tuple[Step, ...], start: int) -> int:
    """How many steps from `start` on are written as one piece: equal runs, or runs up or down by one that are plain or
    tied to one layer or to layers up or down by one."""
    step = run_of(steps[start])
    if step is None:
        return 1
    length = 1
    while start + length < len(steps) and steps[start + length] == step:
        length += 1
    if length > 1 or step != Run(step.layer, step.part, tie=step.tie):
        return length
    following = run_of(steps[start + 1]) if start + 1 < len(steps) else None
    direction = 0 if following is None else following.layer - step.layer
    turns = (turn for turn in (0, 1, -1) if following is not None and following.tie == _moved(step.tie, turn))
    turn = next(turns, None)
    if direction not in (1, -1) or turn is None:
        return 1

    def at(distance: int) -> Run:
        return Run(step.layer + direction * distance, step.part, tie=_moved(step.tie, turn * distance))

    while start + length < len(steps) and steps[start + length] == at(length):
        length += 1
    # a run that itself repeats belongs to the next piece: 0,1,2x3 and not 0-2,2x2
    while length > 1 and start + length < len(steps) and steps[start + length] == steps[start + length - 1]:
        length -= 1
    return length


def tied_span(first: Tie, last: Tie) -> str:
    """What stands behind a span of runs of which the first and the last have these ties."""
    if first is None:
        return ""
    return f"={first}" if first == last else f"={first}-{last.layer if isinstance(last, StackLayer) else last}"


def _moved(tie: Tie, by: int) -> Tie:
    """The tie to the layer so many further on; new matrices are the same everywhere."""
    match tie:
        case int():
            return tie + by
        case StackLayer():
            return StackLayer(tie.stack, tie.layer + by)
        case _:
            return tie
