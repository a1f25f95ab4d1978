"""Skipping attention or mlp from the top downwards (Tyukin)."""

from __future__ import annotations

import math
from typing import Literal

from shoal.errors import UsageError
from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.plan import drop as drop_layers
from shoal.scores import Candidate, Found

READS_DATA = False
EXAMPLES = MethodExamples(
    chooses_by="place",
    counts="parts",
    budget="flops=0.85",  # attentions alone leave no written parameters out
    writable=False,
    without_data="0,1-2m,3",
)


def tyukin(
    job: PruningJob, *, drop: int, part: Literal["attention", "mlp"] = "attention", keep_last: bool = True
) -> Found:
    """Remove the attention (or mlp) of the `drop` deepest layers, without looking at data.

    Source: Tyukin et al. 2024 (arXiv 2407.15516; 2404.05741), who find that a third of the attentions of Llama 2 13B
    can go, and that keeping the last layer whole helps for attention.

    How we differ: the attention is really removed, with its KV. Raises U504 when there are not so many.
    """
    layers = sorted(set(job.plan.layers(job.stack)))
    layers = layers[:-1] if keep_last else layers
    if not 1 <= drop <= len(layers):
        raise UsageError(f"cannot remove {drop} of {len(layers)} {part}s; ask for fewer", code="U504")
    smaller = drop_layers(job.plan, layers[-drop:], part=part, stack=job.stack)
    if not job.legal(smaller):
        raise UsageError(
            f"the plan is not legal without the {part} of the layers {layers[-drop:]}; allow plans that only run live",
            code="U504",
        )
    return Found(smaller, (Candidate(str(smaller), math.nan, f"{part} of the {drop} deepest layers removed"),))
