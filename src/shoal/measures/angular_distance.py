"""Angular distance over spans: how far the hidden state turns between the input of a span and its end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.errors import UsageError
from shoal.evaluate.stats import ratio
from shoal.models.stacks import find_stack
from shoal.run.observe import observe
from shoal.scores import Scores

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluate import Progress


def angular_distance(
    model: Any,
    data: Data,
    *,
    span: int = 1,
    tokens: Literal["last", "all"] = "last",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The angle, in half turns, between the input of layer l and the input of layer l + span.

    d(l, n) = arccos( x_l . x_l+n / (|x_l| |x_l+n|) ) / pi in [0, 1], x_l [batch, length, hidden] the input of layer l;
    mean over sequences at the last token, or over all tokens.
    Source: Gromov et al. 2024 (arXiv 2403.17887), equation 7.
    How we differ: `tokens="all"` is offered, padding is left out, the angle is computed in float64 from float32 states,
    and only `span` inputs are held at a time instead of all layers. Raises U503 when the span does not fit.
    """
    depth = find_stack(model, stack).depth
    if not 1 <= span < depth:
        raise UsageError(f"a span of {span} layers does not fit {depth} layers; give 1 to {depth - 1}", code="U503")
    starts = depth - span + 1
    sums: list[list[torch.Tensor]] = [[] for _ in range(starts)]
    counts: list[torch.Tensor] = []
    inputs: dict[int, torch.Tensor] = {}
    keep = torch.ones(1, 1)

    def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        nonlocal keep
        keep = torch.ones(ids.shape) if mask is None else mask.float()
        if tokens == "last":
            place = torch.arange(ids.shape[1]) * (keep > 0)
            keep = (torch.arange(ids.shape[1]) == place.amax(-1, keepdim=True)).float()
        counts.append(keep.sum(-1))
        if progress is not None:
            progress(sum(len(c) for c in counts), len(data), "angular distance")

    def watch(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        inputs[index] = x
        start = index - span + 1
        if start < 0:
            return
        cosine = torch.nn.functional.cosine_similarity(inputs.pop(start).float(), y.float(), dim=-1).double().cpu()
        angle = torch.arccos(cosine.clamp(-1, 1)) / math.pi
        sums[start].append((angle * keep).sum(-1))

    observe(model, data.batches(batch), watch, before=before, stack=stack)
    weights = [int(n) for n in torch.cat(counts)]
    means = [ratio(torch.cat(total).tolist(), weights) for total in sums]
    return Scores(
        measure="angular-distance",
        stack=stack or "decoder",
        unit="half turns",
        values=tuple(mean for mean, _ in means),
        errors=tuple(error for _, error in means),
        sequences=len(weights),
        tokens=sum(weights),
        data=data.info.describe(),
        span=span,
        notes=("judged at the last token of each sequence" if tokens == "last" else "all tokens counted",),
    )
