"""Each stretch of layers learns alone what the dense model makes of the same input."""

from __future__ import annotations

from typing import Literal

import torch

from shoal.errors import UsageError
from shoal.examples import TermExamples
from shoal.executing.forward import Forward
from shoal.healing.blocks import blocks_at_gaps, blocks_of_layers
from shoal.healing.seen import Seen

NEEDS_TEACHER = True

EXAMPLES = TermExamples(text="block-local", learn=("near",))


def block_local(
    seen: Seen,
    *,
    blocks: Literal["holes", "layers"] = "holes",
    width: int = 1,
    side: Literal["both", "before", "behind"] = "both",
    inputs: Literal["teacher", "student"] = "teacher",
) -> torch.Tensor:
    """The error of each block of layers against what the dense model makes of the same input.

    The sum over blocks of |f(x) - y|^2 / |y|^2, summed over the tokens that count.
    A block f is a stretch of the plan's steps that stands for the base layers first..last: x [tokens, hidden] is the
    dense state in front of `first` and y the one behind `last`. No gradient crosses a border, so nothing runs but these
    steps and the dense model, and neither head nor loss of the language is needed. `blocks` holes: the `width` steps
    before and behind each removed span (`side` before or behind: only there), those that share a step being one block;
    layers: every step is a block. `inputs` student: x is what the steps before make, without gradients.

    Source: Bercovich et al. 2024 (Puzzle's block-wise local distillation, arXiv 2411.19146); with `side` before and a
    width of 1 that of LLM-Streamline (Chen et al. 2024, arXiv 2403.19135).

    How we differ: errors are relative to each token's length, as attention sinks would drown the others.
    """
    if width < 1:
        raise UsageError(f"block-local: width={width} is no layer; write block-local:width=1", code="U502")
    plan, stack = seen.plan, seen.stack
    found = blocks_of_layers(plan, stack) if blocks == "layers" else blocks_at_gaps(plan, stack, width, side)
    told = seen.teacher
    calls = seen.prepared.calls
    forward = Forward(calls=calls)
    student, counts = seen.sides[0], seen.counts
    total = torch.zeros((), device=counts.device)
    at, state = 0, told.first.detach()
    steps = plan.steps(stack)
    with student.around():
        for block in found:
            if inputs == "student":
                with torch.no_grad():
                    for step in steps[at : block.begin]:
                        state = student.executor.run_step(step, state, forward)
            x = state if inputs == "student" else told.entering(block.first).detach()
            made = x
            for step in steps[block.begin : block.end]:
                made = student.executor.run_step(step, made, forward)
            total = total + _error(made[counts], told.behind[block.last].detach()[counts])
            at, state = block.end, made.detach()
    return total


def _error(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    made, wanted = made.float(), wanted.float()
    return ((made - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).sum()
