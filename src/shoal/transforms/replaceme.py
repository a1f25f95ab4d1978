"""ReplaceMe: a linear map behind the mlp before the hole, folded into the mlp's output matrix."""

from __future__ import annotations

import torch

from shoal.examples import TransformExamples
from shoal.fitting.fold import Site, rewritten
from shoal.fitting.holes import find_holes
from shoal.fitting.normal import Normal, best_ridge
from shoal.fitting.result import Fit, Job, Transformed
from shoal.fitting.writers import folded_map

EXAMPLES = TransformExamples(role="fitted")


def replaceme(job: Job, *, ridge: float | None = None, skip_first: int = 0) -> Transformed:
    """Multiply what the mlp before each removed span writes by a fitted map T: y = x + T mlp(x).

    T = argmin sum w |T m - (y - x)|^2 + ridge * mean(m^2) * |T - I|^2 over the tokens, x [hidden] the state before that
    mlp has written, m [hidden] what it writes, y [hidden] the dense model's state behind the span, w = 1 / |y|^2. T is
    multiplied into the output matrix of the mlp (every expert's, and its bias): exact, of the same size, and a stock
    checkpoint holds it. Attention sinks are in the fit like any other token, since the mlp writes them. T = I is
    dropping, so the fit is never worse than that. `ridge` None: chosen on held-out sequences.

    Source: Shopkhoev et al. 2025 (ReplaceMe, arXiv 2505.02819), the least-squares variant.

    How we differ: tokens are weighted by their length, the regularisation pulls towards the identity.
    """

    def rewrite(site: Site) -> tuple[dict[str, torch.Tensor], Fit]:
        size = site.targets[0].shape[-1]
        fitted, held = (Normal(size, size, site.targets[0].device) for _ in range(2))
        for is_held, number, keep, weight in site.tokens():
            rest, written = site.outputs(number)
            wanted = site.targets[number] - rest
            (held if is_held else fitted).add(written[keep] * weight, wanted[keep] * weight)
        eye = torch.eye(size, dtype=torch.float64, device=fitted.xx.device)
        chosen, found, _ = (
            best_ridge(fitted, held, bias=False, towards=eye)
            if ridge is None
            else (ridge, *fitted.solve(ridge, bias=False, towards=eye))
        )
        kept: tuple[float | None, float | None] = (held.error(eye), held.error(found)) if held.count else (None, None)
        fit = Fit(str(site.hole), fitted.error(eye), fitted.error(found), *kept, f"ridge {chosen:g}, relative errors")
        return folded_map(site.layer, site.writers, found), fit

    return rewritten(job, find_holes(job.plan, "replaceme", job.stack), "replaceme", rewrite, skip_first=skip_first)
