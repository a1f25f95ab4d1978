"""Position presets as a baseline."""

from __future__ import annotations

from typing import Literal

from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search import position as presets

READS_DATA = False
EXAMPLES = MethodExamples(chooses_by="place", without_data="0-1")


def position(
    job: PruningJob, *, drop: int, which: Literal["first", "last", "middle", "alternate", "random"] = "last"
) -> Found:
    """Remove the first, last, middle, every other or random layers, without looking at data.

    Source: Poor Man's BERT (Sajjad et al. 2020, arXiv 2004.03844).

    How we differ: the paper's top, bottom and symmetric are called last, first and middle, the contribution-based
    choice is `shortgpt`, and no task is learnt afterwards.
    """
    return presets.position(job.plan, drop=drop, legal=job.legal, which=which, stack=job.stack, seed=job.seed)
