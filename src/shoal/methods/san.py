"""SAN: blocks of layers with like attention maps share the map of their first one."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.examples import MethodExamples
from shoal.fitting.map_blocks import blocks_with
from shoal.fitting.sharing import can_share
from shoal.measures.attention_similarity import attention_similarity
from shoal.methods._job import PruningJob
from shoal.plan.steps import runs
from shoal.scores import Candidate, Found
from shoal.transforms.share_maps import share_maps

EXAMPLES = MethodExamples(
    chooses_by="place", counts="steps", exact=False, nested=False, budget=None, writable=False, best_first=True
)


def san(job: PruningJob, *, drop: int, matched: bool = False) -> Found:
    """Let the layers of blocks with like attention maps take over the map of their block's first one.

    Two layers are alike by 1 - J, J the Jensen-Shannon divergence of their maps (the measure `attention-similarity`),
    and a block takes in the next layer while the mean over every two of its layers stays at a threshold or above: the
    highest one at which at least `drop` layers follow. `matched`: heads are moved to the map that suits them best (the
    transform `share-maps`).

    Source: Xiao et al. 2019 (SAN, arXiv 1906.11024): self-attention.

    How we differ: the paper gives the threshold, trains the translation model anew under the blocks and derives them
    again until they stay; here a pretrained model is converted once, and the training is a step of its own (`shoal
    heal`). Its rule for attention to an encoder has no place here. Such plans run live only, and a follower's queries
    and keys are still made, so a budget is refused. Raises U504 when so many layers cannot follow, U523 for a budget,
    U537 for a model without maps, P108 where blocks would hold layers of two kinds.
    """
    if job.budget is not None:
        raise UsageError("san takes a number of layers, as in --drop 4, and no budget; give --drop", code="U523")
    stack = job.spec.stack(job.plan.stack_name(job.stack))
    layers = [run.layer for run in runs(job.plan.steps(stack.name)) if can_share(run, stack)]
    scores = attention_similarity(
        job.model, job.data, pairs="all", stack=job.stack, batch=job.batch, progress=job.progress
    )
    alike = [[1 - one for one in row] for row in scores.detail["matrix"]]
    blocks, threshold = blocks_with(alike, layers, drop) if drop > 0 else ((), 0.0)
    if not blocks:
        raise UsageError(
            f"san cannot let {drop} of {len(layers)} layers follow another one; take 1 to {len(layers) - 1}",
            code="U504",
        )
    text = "+".join("-".join(map(str, block)) for block in blocks)
    made = share_maps(job, pairs=text, matched=matched)
    if not job.legal(made.plan):
        raise UsageError(
            f"san finds {made.plan}, which is not allowed here; allow plans that only run live", code="U504"
        )
    return Found(made.plan, (Candidate(str(made.plan), 1 - threshold, f"blocks {text}"),), weights=made.weights)
