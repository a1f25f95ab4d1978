"""LaCo's merge: the differences of the removed layers added to the layer before them."""

from __future__ import annotations

from shoal.examples import TransformExamples
from shoal.fitting.merge import merged
from shoal.fitting.result import Job, Transformed

EXAMPLES = TransformExamples(role="merge", null={"scale": 0.0}, refused=(((), {}, "U553"),))


def difference_sum(job: Job, *, scale: float = 1.0, norms: bool = False) -> Transformed:
    """Merge each removed span into the layer l before it: theta_l + scale * sum_k (theta_(l+k) - theta_l).

    theta are the layer's matrices; with `norms` also its vectors. `scale` 0 is dropping, bit for bit.

    Source: Yang et al. 2024 (LaCo, arXiv 2402.11187).

    How we differ: the paper's formula; for what its released notebooks compute see `laco-notebook`.
    """
    return merged(
        job,
        "difference-sum",
        lambda _, parts, __: parts[0] + scale * sum((other - parts[0] for other in parts[1:]), parts[0] * 0),
        norms=norms,
    )
