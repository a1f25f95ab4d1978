"""Hierarchical Skip Decoding as a static preset: every second layer, then every second one of what is left."""

from __future__ import annotations

import math

from shoal.deciding.policy_options import hierarchy
from shoal.errors import UsageError
from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.plan import drop as drop_layers
from shoal.scores import Candidate, Found

READS_DATA = False
EXAMPLES = MethodExamples(chooses_by="place", most=2, without_data="0,3")


def hsd(job: PruningJob, *, drop: int) -> Found:
    """Remove layers level by level, without looking at data; the first and the last layer stay.

    A level takes every second of the layers that are left between them, from the lowest on, and the next level begins
    when it is done: the order in which `by-position:layout=nested` leaves them out. So a plan with more removed lacks
    all that one with fewer lacks, and a text that begins with the one may go on with the other: no layer runs whose
    keys and values of earlier tokens were never stored.

    Source: Zhu et al. 2024 (HSD, arXiv 2403.14919), unverified: the formula from position to layers is not known to us,
    only that it is a hierarchy over the length of the text.

    How we differ: one plan for all positions. Raises U504 when fewer than 2 layers would be left.
    """
    layers = sorted(set(job.plan.layers(job.stack)))
    if not 1 <= drop <= len(layers) - 2:
        raise UsageError(
            f"cannot remove {drop} of {len(layers)} layers between the first and the last; remove 1 to "
            f"{len(layers) - 2}",
            code="U504",
        )
    smaller = drop_layers(job.plan, hierarchy(layers)[:drop], stack=job.stack)
    if not job.legal(smaller):
        raise UsageError(f"the plan {smaller} is not legal; choose another number of layers", code="U504")
    return Found(smaller, (Candidate(str(smaller), math.nan, f"the first {drop} layers of the hierarchy removed"),))
