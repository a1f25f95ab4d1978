"""FoldGPT: layers that the loss can spare go, and those that are left share matrices in groups."""

from __future__ import annotations

from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.greedy import greedy
from shoal.transforms.fold_groups import fold_groups

SEARCHES = True
EXAMPLES = MethodExamples(chooses_by="loss")


def foldgpt(job: PruningJob, *, drop: int, group: int = 2, exhaustive: bool = False) -> Found:
    """Remove layers greedily by the cross-entropy, then let the middle half of what is left share matrices in groups.

    `group` layers share one's matrices, and keep their norms and one scale for each part (the transform `fold-groups`);
    1 shares nothing, and so does a middle half of fewer layers. Sharing saves stored parameters, not time; a stock
    checkpoint holds copies, so a budget counts what was removed.

    Source: Liu et al. 2024 (FoldGPT, arXiv 2407.00928).

    How we differ: the paper learns a gate for each layer with the weights frozen; here a search with re-evaluation
    decides, which like gates knows what is gone already. Scales are found in closed form, and the fine-tuning that
    follows in the paper is a step of its own.
    """
    found = greedy(
        job.plan,
        objective=job.objective(job.data),
        drop=drop,
        exhaustive=exhaustive,
        legal=job.legal,
        stack=job.stack,
        progress=job.progress,
    )
    left = found.plan.layers(job.stack)
    quarter = len(left) // 4
    middle = left[quarter : len(left) - quarter]
    if group == 1 or len(middle) < max(2, group):
        return found
    return job.then(fold_groups, found, first=middle[0], last=middle[-1], group=group)
