"""Neighbouring layers share keys and values in closed form, chosen by the loss of each pair alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shoal.errors import UsageError
from shoal.evaluation.perplexity import perplexity
from shoal.examples import MethodExamples
from shoal.fitting.aligned_kv import Aligner, shared_plan
from shoal.fitting.result import Transformed
from shoal.fitting.sharing import Group, cheapest_apart, neighbours
from shoal.live import running
from shoal.methods._job import PruningJob
from shoal.scores import Candidate, Found

if TYPE_CHECKING:
    from shoal.data import Data

SEARCHES = True
EXAMPLES = MethodExamples(
    chooses_by="place", counts="steps", nested=False, most=2, budget=None, writable=False, best_first=True
)


def aligned_kv(job: PruningJob, *, drop: int, judged: int = 4) -> Found:
    """Let `drop` layers read the keys and values of the layer below, aligned, where the loss rises least.

    Each pair of neighbours of one kind is converted alone by the transform `share-kv` and judged by the cross-entropy
    on the first `judged` calibration sequences, which are fitted too; the pairs of the least sum that have no layer in
    common are converted together. Layers keep their queries, outputs and mlps, so the KV cache alone gets smaller.

    Source: our own; that neighbours share is cross-layer attention (Brandon et al. 2024, arXiv 2405.12981).

    How we differ: the paper trains such models from scratch; here a pretrained one is converted, see `share-kv`. Raises
    U504 when there are fewer such pairs, U523 for a budget, and what `share-kv` raises.
    """
    if job.budget is not None:
        raise UsageError("aligned-kv takes a number of layers, as in --drop 4, and no budget; give --drop", code="U523")
    stack = job.plan.stack_name(job.stack)
    pairs = tuple(
        pair for pair in neighbours(job.plan, job.spec.stack(stack)) if job.legal(shared_plan(job.plan, (pair,), stack))
    )
    aligner = Aligner(job, pairs, "aligned-kv")
    text = job.data.only(range(min(judged, len(job.data))))
    trace: dict[Group, Candidate] = {}
    for number, pair in enumerate(pairs if 1 <= drop <= len(pairs) else ()):
        made = aligner.convert((pair,))
        trace[pair] = Candidate(str(made.plan), _loss(job, made, text), f"{pair[1]} reads {pair[0]}")
        if job.progress is not None:
            job.progress(number + 1, len(pairs), "pairs that share")
    chosen = cheapest_apart({pair: one.score for pair, one in trace.items()}, drop) if drop > 0 else ()
    if not chosen:
        raise UsageError(
            f"aligned-kv finds no {drop} pairs of neighbours without a layer in common; share fewer, use the transform "
            "share-kv with groups, or allow plans that only run live",
            code="U504",
        )
    best = aligner.convert(chosen)
    found = Candidate(str(best.plan), _loss(job, best, text), "the best pairs together")
    return Found(best.plan, (found, *trace.values()), weights=best.weights)


def _loss(job: PruningJob, made: Transformed, text: Data) -> float:
    with running(job.model, made.plan, made.weights):
        mean = perplexity(job.model, text, batch=job.batch).nll
    return math.inf if math.isnan(mean) else mean
