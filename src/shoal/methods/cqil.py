"""CQIL: the layers that need one another's output least read one input, side by side."""

from __future__ import annotations

import math

from shoal.errors import UsageError
from shoal.examples import MethodExamples
from shoal.fitting.result import Job
from shoal.methods._job import PruningJob
from shoal.plan import Plan
from shoal.scores import Candidate, Found
from shoal.transforms.parallel_pairs import parallel_pairs

EXAMPLES = MethodExamples(
    chooses_by="place", counts="steps", nested=False, most=2, budget=None, writable=False, best_first=True
)


def cqil(job: PruningJob, *, drop: int, group: int = 2, bypass: bool = True) -> Found:
    """Let neighbouring layers run side by side in the range where the cross-entropy stays lowest; none is removed.

    `drop` counts the steps one after the other that are saved: `group` layers side by side save group - 1, and as many
    whole groups are made as that takes, all in one range. `bypass`: each mlp sees what the attentions of its own layer
    and of those before it in the group wrote (see the transform `parallel-pairs`). Such a plan is faster where the
    branches have a device each; on one device it costs what the model costs, so a budget is refused. It runs live only.

    Source: Zou et al. 2024 (CQIL, arXiv 2404.06709).

    How we differ: the range is chosen by the loss; the paper names one for each model, and heals it by distillation,
    which is a step of its own. Raises U504 when no such range fits, U523 for a budget.
    """
    if job.budget is not None:
        raise UsageError(
            f"a budget of {job.budget.unit}={job.budget.share:g} cannot be met by cqil, which runs every layer; give "
            "it the number of steps to save, as in --drop 6",
            code="U523",
        )
    layers = job.plan.layers(job.stack)
    count = group * math.ceil(drop / (group - 1)) if group > 1 else 0
    if not 2 <= count <= len(layers) or drop < 1:
        raise UsageError(
            f"cqil cannot save {drop} of {len(layers)} steps with groups of {group} layers; save fewer", code="U504"
        )
    pairing, objective = Job(job.model, job.data, job.plan, stack=job.stack), job.objective(job.data)
    trace: list[Candidate] = []
    plans: dict[str, Plan] = {}
    starts = range(len(layers) - count + 1)
    for done, start in enumerate(starts, 1):
        ends = {"first": layers[start], "last": layers[start + count - 1]}
        plan = parallel_pairs(pairing, **ends, group=group, bypass=bypass).plan
        plans[str(plan)] = plan
        loss = objective(plan) if job.legal(plan) else math.nan
        if not math.isnan(loss):
            trace.append(Candidate(str(plan), loss, f"layers {ends['first']} to {ends['last']} in groups of {group}"))
        if job.progress is not None:
            job.progress(done, len(starts), "ranges side by side")
    if not trace:
        raise UsageError(
            f"no range of {count} layers may run in groups of {group}; allow plans that only run live", code="U504"
        )
    trace.sort(key=lambda one: one.score)
    return Found(plans[trace[0].notation], tuple(trace))
