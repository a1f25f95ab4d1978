"""SOLAR: the model twice, the seam between the copies cut away."""

from __future__ import annotations

from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.scores import Found

READS_DATA = False
REMOVES = False
EXAMPLES = MethodExamples(chooses_by="place", budget=None)


def solar(job: PruningJob, *, cut: int | None = None) -> Found:
    """Run the first n - `cut` layers and then the last n - `cut`: 0-23,8-31 of 32 layers with a cut of 8.

    The transform `grow` with style=solar; without `cut` a quarter of the layers, as in the paper; takes no --drop.

    Source: Kim et al. 2023 (SOLAR 10.7B, arXiv 2312.15166), depth up-scaling.

    How we differ: continued training, without which it is worse than the model it comes from, is a step of its own.
    """
    return job.grown(style="solar", cut=cut)
