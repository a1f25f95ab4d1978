"""BlockPruner and FinerCut: attention and mlp are removed one by one."""

from __future__ import annotations

from typing import Literal

from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.greedy import greedy

SEARCHES = True
EXAMPLES = MethodExamples(chooses_by="loss", counts="parts", writable=False)


def block_pruner(
    job: PruningJob, *, drop: int | None = None, rank: Literal["loss", "saving"] = "loss", exhaustive: bool = False
) -> Found:
    """In each round remove the attention or the mlp without which the cross-entropy is lowest.

    `drop` counts parts; with a budget, as many go as it takes, and `rank=saving` takes the lowest rise per saved share.

    Source: Zhong et al. 2024 (BlockPruner, arXiv 2406.10594), which ranks by perplexity as here; Zhang et al. 2024
    (FinerCut, arXiv 2405.18218) does the same by the distance of the output.

    How we differ: candidates race on shared hidden states (`exhaustive` evaluates all of them in full), and the price
    of a part can count.
    """
    return greedy(
        job.plan,
        objective=job.objective(job.data),
        drop=drop if job.budget is None else None,
        budget=job.budget,
        grain="sublayers",
        rank=rank,
        exhaustive=exhaustive,
        legal=job.legal,
        stack=job.stack,
        progress=job.progress,
    )
