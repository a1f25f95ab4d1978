"""Angular distance over spans: how far the hidden state turns between the input of a span and its end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.errors import UsageError
from shoal.evaluation.stats import ratio
from shoal.models.stacks import find_stack
from shoal.run.observe import observe, require_whole
from shoal.scores import Scores

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress


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
    mean over sequences at the last token, or over all tokens. For one token block influence is 1 - cos(pi d(l, 1)).
    Source: Gromov et al. 2024 (arXiv 2403.17887), equation 7.
    How we differ: `tokens="all"` is offered, padding is left out, only `span` inputs are held at a time instead of all,
    and the end of the last layer is taken before the final norm. In float32 from unit vectors u and v the angle is
    2 atan2(|u - v|, |u + v|), since arccos loses half its digits near 0; it is exactly 0 for a span that adds nothing.
    Raises U503 when the span does not fit, U507 while a plan is running, as spans are the base model's own.
    """
    found = find_stack(model, stack)
    if not 1 <= span < found.depth:
        raise UsageError(
            f"a span of {span} layers does not fit {found.depth} layers; give 1 to {found.depth - 1}", code="U503"
        )
    require_whole(model, "angular distance", stack)
    starts = found.depth - span + 1
    sums: list[list[torch.Tensor]] = [[] for _ in range(starts)]
    counts: list[torch.Tensor] = []
    inputs: dict[int, torch.Tensor] = {}
    keep = torch.ones(1, 1, dtype=torch.bool)

    def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        nonlocal keep
        keep = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        if tokens == "last":
            keep = keep & (keep.flip(-1).cumsum(-1).flip(-1) == 1)
        counts.append(keep.sum(-1))
        if progress is not None:
            progress(sum(len(c) for c in counts), len(data), "angular distance")

    def watch(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        if index < starts:
            inputs[index] = x
        start = index - span + 1
        if start >= 0:
            angle = _angle(inputs.pop(start).to(y.device), y).cpu().double()
            sums[start].append(torch.where(keep, angle, 0.0).sum(-1))

    observe(model, data.batches(batch), watch, before=before, stack=stack)
    weights = [int(n) for n in torch.cat(counts)]
    means = [ratio(torch.cat(total).tolist(), weights) for total in sums]
    return Scores(
        measure="angular-distance",
        stack=found.name,
        unit="half turns",
        values=tuple(mean for mean, _ in means),
        errors=tuple(error for _, error in means),
        sequences=len(weights),
        tokens=sum(weights),
        data=data.info.describe(),
        span=span,
        notes=("judged at the last token of each sequence" if tokens == "last" else "all tokens counted",),
    )


def _angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The angle between two states in half turns, [batch, length]."""
    u, v = (torch.nn.functional.normalize(state.float(), dim=-1) for state in (x, y))
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) / math.pi
