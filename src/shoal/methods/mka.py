"""MKA: the last layers are merged into the ones before them."""

from __future__ import annotations

import math

from shoal.errors import UsageError
from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.plan import drop as drop_layers
from shoal.scores import Candidate, Found
from shoal.transforms import mka as transform

EXAMPLES = MethodExamples(sequences=8, chooses_by="place", most=2)


def mka(job: PruningJob, *, drop: int, spare: int = 1) -> Found:
    """Merge the last layers but `spare` into the one before them, weighted by how alike their outputs are.

    Source: Liu et al. 2024 (MKA, arXiv 2406.16330), whose released code takes the last two layers again and again and
    changes no weight.

    How we differ: weights do change, see the transform `mka`, and the last layer stays. Raises U504.
    """
    layers = sorted(set(job.plan.layers(job.stack)))
    end = len(layers) - spare
    if not 1 <= drop < end:
        raise UsageError(f"cannot merge {drop} of {end} layers; merge 1 to {end - 1}", code="U504")
    smaller = drop_layers(job.plan, layers[end - drop : end], stack=job.stack)
    if not job.legal(smaller):
        raise UsageError(f"the plan {smaller} is not legal; merge another number of layers", code="U504")
    found = Found(smaller, (Candidate(str(smaller), math.nan, f"{drop} layers before the last {spare} merged"),))
    return job.then(transform.mka, found)
