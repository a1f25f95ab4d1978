"""FuseGPT-style fusion: the removed layer's matrices flow into its neighbours by a local distillation."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.fused import Fusing, around, beside, fused
from shoal.fitting.holes import find_holes
from shoal.fitting.result import Job, Transformed

EXAMPLES = TransformExamples(
    role="trained", quick={"epochs": 1}, refused=(((2,), {"neighbours": 0}, "U557"), ((2,), {"group": 1}, "U657"))
)


def fuse_group(
    job: Job,
    *,
    neighbours: int = 1,
    rank: int = 8,
    epochs: int = 4,
    rate: float = 1e-3,
    skip_first: int = 1,
    group: int | None = None,
) -> Transformed:
    """Distil each removed span into the `neighbours` layers that run before it and as many behind it.

    With `group` into the `group` - 1 layers nearest to it instead, at the ends of the stack more on one side: 8 gives a
    removed layer the paper's seven neighbours. In each of these layers every matrix becomes
    W + B A + sum_j (C_j D_j) * W_j: W frozen, W_j the matrix of the j-th removed layer, frozen, times a coefficient for
    each element of the given rank (* elementwise), B A an update of that rank. B and C start at zero, so that training
    starts from dropping. Adam on mean |f(x) - y|^2 / |y|^2, x the states of the pruned model before the group, y the
    dense ones behind it, without the first `skip_first` tokens. A quarter of the sequences is held back and says after
    which epoch it is best; the start counts as one. The result is folded into dense matrices of the same shapes: no
    cost at run time, a stock checkpoint holds it. `epochs` 0 is dropping, bit for bit. Raises U556 when a neighbour has
    other matrices than a removed layer, U557 when the span has no neighbour that runs whole, U657 for a group of fewer
    than two layers.

    Source: Pei et al. 2024 (FuseGPT, arXiv 2411.14507).

    How we differ: squared error relative to each token's length instead of a KL divergence (the released code's is over
    the batch axis), one rate; choose what to remove by any method.
    """
    if group is not None and group < 2:
        raise UsageError(f"a group of {group} has no layer that takes another in; give 2 or more", code="U657")
    return fused(
        job,
        find_holes(job.plan, "fuse-group", job.stack),
        lambda hole: range(hole.first, hole.last + 1),
        beside(neighbours) if group is None else around(group),
        Fusing(rank, epochs, rate),
        skip_first,
    )
