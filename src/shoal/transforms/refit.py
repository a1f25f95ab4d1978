"""The output matrix of the mlp before the hole, fitted again so that the state comes near the dense one."""

from __future__ import annotations

import torch

from shoal.examples import TransformExamples
from shoal.fitting.fold import Site, rewritten
from shoal.fitting.holes import find_holes, places_behind
from shoal.fitting.normal import Normal, best_ridge
from shoal.fitting.result import Fit, Job, Transformed
from shoal.models.precision import in_float64

EXAMPLES = TransformExamples(role="fitted")


def refit(job: Job, *, ridge: float | None = None, skip_first: int = 0, every: bool = False) -> Transformed:
    """Fit the output matrix of the mlp before each removed span anew: y = x + W' a.

    W' = argmin sum w |W' a - (y - x)|^2 + ridge * mean(a^2) * |W' - W|^2 over the tokens, a [inner] what goes into the
    matrix, x [hidden] the state before it has written, y [hidden] the dense model's state behind the span, w = 1 /
    |y|^2, W [hidden, inner] the matrix as it was. Freer than `replaceme`, whose T W is one such matrix, and like it
    exact, of the same size and held by a stock checkpoint. An existing bias stays as it is. W' = W is dropping, so the
    fit is never worse than that. `ridge` None: chosen on held-out sequences. Where several matrices write (experts),
    nothing is fitted and the notes say so.

    `every`: from the first span on the mlps of all layers are fitted, each to the dense model's state behind its layer
    and on the stream that the layers before it give as fitted, so that what a span left is taken back step by step.

    Source: our own; it is `replaceme` (Shopkhoev et al. 2025, arXiv 2505.02819) without its constraint.
    """

    def rewrite(site: Site) -> tuple[dict[str, torch.Tensor], Fit | None]:
        if site.module is None:
            return {}, None
        module = site.layer.get_submodule(site.module)
        old = module.get_parameter("weight").detach()
        turned = next(w.dim for w in site.writers if w.name.endswith("weight")) == 1
        start = in_float64(old.T if turned else old)
        fitted, held = (Normal(start.shape[1], start.shape[0], old.device) for _ in range(2))
        for is_held, number, keep, weight in site.tokens():
            rest, _, given, factor = site.inputs(number)
            wanted = (site.targets[number] - rest)[keep] / factor
            if module._parameters.get("bias") is not None:
                wanted = wanted - module.get_parameter("bias").detach()
            (held if is_held else fitted).add(given[keep] * weight, wanted * weight)
        chosen, found, _ = (
            best_ridge(fitted, held, bias=False, towards=start)
            if ridge is None
            else (ridge, *fitted.solve(ridge, bias=False, towards=start))
        )
        kept: tuple[float | None, float | None] = (held.error(start), held.error(found)) if held.count else (None, None)
        fit = Fit(str(site.hole), fitted.error(start), fitted.error(found), *kept, f"ridge {chosen:g}, relative errors")
        return {f"{site.module}.weight": (found.T if turned else found).to(old.dtype).contiguous()}, fit

    holes = find_holes(job.plan, "refit", job.stack)
    places = places_behind(job.plan, holes, job.stack) if every else holes
    return rewritten(job, places, "refit", rewrite, skip_first=skip_first)
