"""A map of low rank in the place of removed layers: cheaper than a full one."""

from __future__ import annotations

import torch

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.holes import Hole, Pair, filled, find_holes
from shoal.fitting.maps import judged, limit_tensor, sums
from shoal.fitting.normal import best_ridge
from shoal.fitting.result import Fit, Job, Transformed

EXAMPLES = TransformExamples(role="fitted", quick={"rank": 4}, refused=(((2,), {"rank": 33}, "U555"),))


def low_rank_map(
    job: Job, *, rank: int = 64, ridge: float | None = None, skip_first: int = 1, outlier: float = 8.0
) -> Transformed:
    """Put y = x + U D x + b with U [hidden, rank], D [rank, hidden] where layers, attentions or mlps were removed.

    Reduced-rank regression: of W - I of the full map (see `linear-map`) the part of the given rank that explains most
    of the change on the calibration tokens: U = the leading left singular vectors of (W - I) C^(1/2), C the covariance
    of the inputs, and D = U^T (W - I); the bias is that of the smaller map. Costs 2 * rank * hidden weights instead of
    hidden^2.

    Source: reduced-rank regression (Izenman 1975).

    Raises U555 for a rank that is not between 1 and the hidden size. Runs live only.
    """
    holes = find_holes(job.plan, "low-rank-map", job.stack)
    pair = Pair(job, skip_first=skip_first, outlier=outlier)
    size = pair.pruned.states[0].shape[-1]
    if not 1 <= rank <= size:
        raise UsageError(f"a map of rank {rank} is not possible; use 1 to {size}", code="U555")

    def fit(hole: Hole) -> tuple[dict[str, torch.Tensor], Fit]:
        limit = pair.limit()
        fitted, held = sums(pair, hole, limit)
        eye = torch.eye(size, dtype=torch.float64, device=fitted.xx.device)
        chosen, full = (
            best_ridge(fitted, held, bias=True, towards=eye)[:2]
            if ridge is None
            else (ridge, fitted.solve(ridge, towards=eye)[0])
        )
        up, down = _reduced(full - eye, fitted.centred()[0], rank)
        weight = eye + up @ down
        bias = (fitted.y - weight @ fitted.x) / fitted.count
        tensors = {f"{hole.weights}.{n}": t.float() for n, t in (("up", up), ("down", down), ("bias", bias))}
        tensors |= limit_tensor(hole, limit)
        return tensors, judged(hole, fitted, held, weight, bias, f"rank {rank}, ridge {chosen:g}")

    return filled(pair, holes, fit, "low-rank maps")


def _reduced(change: torch.Tensor, covariance: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U [q, rank] and D [rank, p] whose product is nearest to `change` [q, p] for inputs of this covariance [p, p]."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()
    left = torch.linalg.svd(change @ root, full_matrices=False).U[:, :rank]
    return left, left.T @ change
