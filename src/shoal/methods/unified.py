"""Unified Layer Skipping: layers at equal distances, the same for all tokens."""

from __future__ import annotations

import math
from typing import Literal

from shoal.errors import UsageError
from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.plan import keep as keep_layers
from shoal.scores import Candidate, Found

READS_DATA = False
EXAMPLES = MethodExamples(chooses_by="place", nested=False, most=2, without_data="0,3")


def unified(job: PruningJob, *, drop: int, spacing: Literal["even", "released"] = "even") -> Found:
    """Keep the first layer, the last one, and the others at equal distances, without looking at data.

    even: round(linspace(0, L-1, n)) for n layers to keep. released: every layer whose index is a multiple of
    int(L / (n - 1)), from below until n - 1 are kept, and the last; for n near L that keeps a solid prefix.

    Source: Liu et al. 2024 (arXiv 2404.06954); "released" is the rule of its published code.

    How we differ: removed statically, where the paper runs all layers in prefill. Raises U504 when fewer than 2 layers
    would be left.
    """
    layers = sorted(set(job.plan.layers(job.stack)))
    depth, count = len(layers), len(layers) - drop
    if drop < 1 or count < 2:
        raise UsageError(f"cannot keep {count} of {depth} layers at equal distances; keep 2 or more", code="U504")
    places = _even(depth, count) if spacing == "even" else _released(depth, count)
    smaller = keep_layers(job.plan, [layers[place] for place in places], stack=job.stack)
    if not job.legal(smaller):
        raise UsageError(f"the plan {smaller} is not legal; choose another number of layers", code="U504")
    return Found(smaller, (Candidate(str(smaller), math.nan, f"{count} layers at equal distances"),))


def _even(depth: int, count: int) -> list[int]:
    return [round(i * (depth - 1) / (count - 1)) for i in range(count)]


def _released(depth: int, count: int) -> list[int]:
    step = max(1, int(depth / (count - 1)))
    inner = [i for i in range(1, depth - 1) if i % step == 0][: count - 2]
    return [0, *inner, depth - 1]
