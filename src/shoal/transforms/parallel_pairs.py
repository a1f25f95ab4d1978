"""CQIL: neighbouring layers read one input and run side by side."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.merge import middle
from shoal.fitting.result import Job, Transformed
from shoal.plan import Parallel, Run, Step
from shoal.plan.select import run_of

NEEDS_PLAN = False
EXAMPLES = TransformExamples(refused=(((), {"first": 2, "last": 2}, "U559"),))


def parallel_pairs(
    job: Job, *, first: int | None = None, last: int | None = None, group: int = 2, bypass: bool = False
) -> Transformed:
    """Let the layers `first`..`last` that run run in groups on one input: y = x + sum_j (F_j(x) - x).

    With `bypass` the mlp of each layer also reads what the attentions of the layers before it in the group wrote, which
    is counted once: y = x + sum_j A_j(x) + sum_j M_j(x + sum_(i <= j) A_i(x)). Without `first` and `last` these are the
    middle half of the stack. Consecutive whole layers are taken `group` at a time, in order; what is left over stays as
    it is. Every layer keeps its weights and its KV and runs once, so parameters, FLOPs and KV are those of the plan:
    what shrinks is the number of steps one after the other. `group` 1 changes nothing. Raises U559 for a range in which
    no group fits.

    Source: Zou et al. 2024 (CQIL, arXiv 2404.06709).

    How we differ: the bypass reaches over the whole group, where the paper limits how many layers back it does; for
    pairs that is the same. The released code adds bypassed states in place, which counts them twice.
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
        run = run_of(step)
        if run is not None and first <= run.layer <= last and run.part == "layer" and not run.layer_sources:
            waiting.append(run)
            if len(waiting) == group:
                steps += _together(waiting, bypass)
                waiting = []
        else:
            steps += [*waiting, step]
            waiting = []
    return Transformed(job.plan.with_steps((*steps, *waiting), job.stack), job.weights)


def _together(waiting: list[Run], bypass: bool) -> list[Step]:
    if len(waiting) == 1:
        return [*waiting]
    return [Parallel(tuple(waiting), "bypass" if bypass else "sum")]
