"""One number for each channel of what the mlp before the hole writes: the cheapest fold."""

from __future__ import annotations

import torch

from shoal.examples import TransformExamples
from shoal.fitting.fold import Site, rewritten
from shoal.fitting.holes import find_holes
from shoal.fitting.result import Fit, Job, Transformed
from shoal.fitting.writers import folded_scale
from shoal.models.precision import in_float64

EXAMPLES = TransformExamples(role="fitted")


def channel_scale(job: Job, *, ridge: float = 1e-3, skip_first: int = 0) -> Transformed:
    """Scale each channel of what the mlp before each removed span writes: y = x + s * mlp(x).

    s_c = (sum w m_c r_c + k) / (sum w m_c^2 + k) over the tokens with m [hidden] what the mlp writes, r = y - x
    what it should write for the dense model's state y behind the span, w = 1 / |y|^2, and k = ridge * sum w m_c^2 as a
    mean over the channels: a ridge towards s = 1, which is dropping, so the fit is never worse than that. Folded into
    the rows of the mlp's output matrix (every expert's, and its bias): exact.

    Source: our own; it is `replaceme` (Shopkhoev et al. 2025, arXiv 2505.02819) with a diagonal T.
    """

    def rewrite(site: Site) -> tuple[dict[str, torch.Tensor], Fit]:
        sums = {is_held: torch.zeros(3, site.targets[0].shape[-1], dtype=torch.float64) for is_held in (False, True)}
        count = {False: 0, True: 0}
        for is_held, number, keep, weight in site.tokens():
            rest, written = site.outputs(number)
            m = in_float64(written[keep] * weight)
            r = in_float64((site.targets[number] - rest)[keep] * weight)
            sums[is_held] += torch.stack([(m * m).sum(0), (m * r).sum(0), (r * r).sum(0)]).cpu()
            count[is_held] += len(m)
        mm, mr, _ = sums[False]
        pull = ridge * mm.mean()
        scale = (mr + pull) / (mm + pull)

        def error(is_held: bool, by: torch.Tensor | float) -> float:
            squares, products, wanted = sums[is_held]
            return float((wanted - 2 * by * products + by * by * squares).sum()) / (count[is_held] * len(wanted))

        kept: tuple[float | None, float | None] = (
            (error(True, 1.0), error(True, scale)) if count[True] else (None, None)
        )
        fit = Fit(str(site.hole), error(False, 1.0), error(False, scale), *kept, f"ridge {ridge:g}, relative errors")
        return folded_scale(site.layer, site.writers, scale), fit

    return rewritten(
        job, find_holes(job.plan, "channel-scale", job.stack), "channel-scale", rewrite, skip_first=skip_first
    )
