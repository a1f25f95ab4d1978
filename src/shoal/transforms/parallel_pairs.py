"""CQIL: neighbouring layers read one input and run side by side."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.fitting.merge import middle
from shoal.fitting.result import Job, Transformed
from shoal.plan import Parallel, Run, Step


def parallel_pairs(job: Job, *, first: int | None = None, last: int | None = None, group: int = 2) -> Transformed:
    """Let the layers `first`..`last` that run run in groups on one input: y = x + sum_j (F_j(x) - x).

    Without `first` and `last` these are the middle half of the stack. Consecutive whole layers are taken `group` at a
    time, in order; what is left over stays as it is. Every layer keeps its weights and its KV and runs once, so
    parameters, FLOPs and KV are those of the plan: what shrinks is the number of steps one after the other. `group` 1
    changes nothing. Raises U559 for a range in which no group fits.

    Source: Zou et al. 2024 (CQIL, arXiv 2404.06709). How we differ: no bypass (layer j's mlp does not see the other
    branches' attention), as a plan runs whole layers; the released code adds bypassed states in place, counting them
    twice.
    """
    first, last = middle(job, first, last)
    if group < 1 or first > last or group > last - first + 1:
        raise UsageError(
            f"no group of {group} layers fits in {first} to {last}; give a range of {max(group, 2)} layers or more",
            code="U559",
        )
    steps: list[Step] = []
    waiting: list[Run] = []
    for step in job.plan.steps(job.stack):
        fits = isinstance(step, Run) and first <= step.layer <= last and step.part == "layer" and step.kv.read is None
        if fits and isinstance(step, Run):
            waiting.append(step)
            if len(waiting) == group:
                steps += waiting if group == 1 else [Parallel(tuple(waiting))]
                waiting = []
        else:
            steps += [*waiting, step]
            waiting = []
    return Transformed(job.plan.with_steps((*steps, *waiting), job.stack), job.weights)
