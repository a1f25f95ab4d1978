"""Order: the same layers in the order of a measure's scores, or in a random one."""

from __future__ import annotations

import math
import random
from importlib import import_module
from typing import Literal

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.result import Job, Transformed
from shoal.plan.select import whole_run
from shoal.scores import Traits
from shoal.spelling import chosen

NEEDS_PLAN = False
EXAMPLES = TransformExamples(
    quick={"by": "random"},
    refused=(((), {"first": 3, "last": 1}, "U664"), ((), {"first": 0, "last": 9}, "U664")),
)


def order(
    job: Job,
    *,
    by: str = "spectrum",
    highest: Literal["first", "last"] = "first",
    first: int | None = None,
    last: int | None = None,
    seed: int = 0,
) -> Transformed:
    """Run the whole layers `first`..`last` of the plan (without them all) in the order of a measure.

    `by` names any measure (`shoal ls measures`), as spectrum or block-influence:tokens=last, taken of the whole model
    on the job's text; the layer of the `highest` score runs first, or last, and equal ones keep their order. by=random
    draws an order with `seed`. Nothing is removed or added; parameters, FLOPs and KV stay. Written as a stock
    checkpoint, in which layers are in this order, where the family allows it (P126).

    Source: AEIUOrder, Ye 2023 (arXiv 2302.02123: spectrum, whose authors report an error in their implementation);
    LayerShuffle, Freiberger et al. 2024 (arXiv 2407.04513: random orders).

    How we differ: the first orders matrices of encoders and decoders before they are trained, greedily; the second
    trains for such orders. A trained model is worse for being put into another order. Raises U664 for a range without
    two whole layers with their own weights, and what the measure raises.
    """
    steps = list(job.plan.steps(job.stack))
    low, high = 0 if first is None else first, job.plan.depth(job.stack) - 1 if last is None else last
    places = [n for n, step in enumerate(steps) if (run := whole_run(step)) is not None and low <= run.layer <= high]
    runs = [run for n in places if (run := whole_run(steps[n])) is not None]
    if high >= job.plan.depth(job.stack) or low < 0 or len(runs) < 2 or not all(run.plain for run in runs):
        raise UsageError(
            f"the layers {low} to {high} of the plan {job.plan} have no order to choose; give a range of two whole "
            "layers or more that run with their own weights",
            code="U664",
        )
    if by == "random":
        ranks = list(range(len(runs)))
        random.Random(seed).shuffle(ranks)
    else:
        scores = _scores(job, by)
        sign = -1 if highest == "first" else 1
        values = [scores[run.layer] for run in runs]
        ranks = sorted(range(len(runs)), key=lambda n: math.inf if math.isnan(values[n]) else sign * values[n])
    for place, rank in zip(places, ranks, strict=True):
        steps[place] = runs[rank]
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), job.weights)


def _scores(job: Job, by: str) -> tuple[float, ...]:
    """A measure's scores by base layer. Raises what it raises, and U501 or the like for one that does not exist."""
    entry, options = chosen("measures", by)
    traits: Traits = getattr(import_module(entry.module), "TRAITS", Traits())
    scores = entry.load()(
        job.model, job.data if traits.text else None, stack=job.stack, batch=job.batch, progress=job.progress, **options
    )
    values: tuple[float, ...] = tuple(scores.values)
    return values
