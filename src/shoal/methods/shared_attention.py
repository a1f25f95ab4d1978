"""Shared Attention: a span of layers takes over the attention map of the layer below it."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.examples import MethodExamples
from shoal.fitting.map_blocks import mean_similarity
from shoal.fitting.sharing import can_share
from shoal.measures.attention_similarity import attention_similarity
from shoal.methods._job import PruningJob
from shoal.plan.steps import runs
from shoal.scores import Candidate, Found
from shoal.transforms.share_maps import share_maps

EXAMPLES = MethodExamples(
    chooses_by="place", counts="steps", nested=False, budget=None, writable=False, best_first=True
)


def shared_attention(job: PruningJob, *, drop: int, matched: bool = False) -> Found:
    """Let `drop` neighbouring layers take over the attention map of the layer below them, where maps are most alike.

    Every span of `drop` layers with one below it is scored by the mean over every two of these layers of 1 - J, J the
    Jensen-Shannon divergence of their maps over ln 2 (the measure `attention-similarity`); the first takes over, head
    by head. `matched`: heads are moved to the map that suits them best (the transform `share-maps`).

    Source: Liao and Vargas 2024 (Shared Attention, arXiv 2407.12866).

    How we differ: the paper reads the span off a picture of the maps' variances over many models and finds late ones;
    here the model's own maps decide. The fine-tuning of the paper is a step of its own (`shoal heal`). Such plans run
    live only, and a follower's queries and keys are still made, so a budget is refused. Raises U504 for more layers
    than can follow, U523 for a budget, U537 for a model without maps.
    """
    if job.budget is not None:
        raise UsageError("shared-attention takes a number of layers, as in --drop 4, and no budget", code="U523")
    stack = job.spec.stack(job.plan.stack_name(job.stack))
    layers = [run.layer for run in runs(job.plan.steps(stack.name)) if can_share(run, stack)]
    scores = attention_similarity(
        job.model, job.data, pairs="all", stack=job.stack, batch=job.batch, progress=job.progress
    )
    alike = [[1 - one for one in row] for row in scores.detail["matrix"]]
    trace = []
    for at in range(len(layers) - drop if drop > 0 else 0):
        span = layers[at : at + drop + 1]
        plan = share_maps(job, pairs="-".join(map(str, span)), matched=False).plan if _one_kind(job, span) else None
        if plan is not None and job.legal(plan):
            trace.append((Candidate(str(plan), 1 - mean_similarity(alike, span), f"{span[1]} to {span[-1]}"), span))
    if not trace:
        raise UsageError(
            f"shared-attention finds no span of {drop} layers that may follow the one below; take fewer, and allow "
            "plans that only run live",
            code="U504",
        )
    trace.sort(key=lambda one: one[0].score)
    made = share_maps(job, pairs="-".join(map(str, trace[0][1])), matched=matched)
    return Found(made.plan, tuple(one for one, _ in trace), weights=made.weights)


def _one_kind(job: PruningJob, span: list[int]) -> bool:
    layers = job.spec.stack(job.plan.stack_name(job.stack)).layers
    return len({(layers[layer].kv, layers[layer].kind, layers[layer].width) for layer in span}) == 1
