"""Block influence: how much a layer turns the hidden state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shoal.evaluate.stats import ratio
from shoal.run.observe import observe
from shoal.scores import Scores

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluate import Progress


def block_influence(
    model: Any,
    data: Data,
    *,
    skip_first: int = 0,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """1 minus the cosine between a layer's input and output, mean over tokens.

    BI_i = 1 - E_t[ x_i,t . x_i+1,t / (|x_i,t| |x_i+1,t|) ], x_i [batch, length, hidden] the input of layer i, in float32.
    Source: ShortGPT (Men et al. 2024, arXiv 2403.03853), equation 1.
    How we differ: padding is left out; the first `skip_first` tokens of each sequence can be (attention sinks: their
    states are a hundred times longer and hardly turn), and a note says whether that changes the order; each layer has a
    standard error over sequences. Cost: one pass without the head, nothing stored but three sums per layer and sequence.
    """
    sums: dict[int, list[torch.Tensor]] = {}
    heads: dict[int, list[torch.Tensor]] = {}
    counts: list[torch.Tensor] = []
    keep = torch.ones(1, 1)

    def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        nonlocal keep
        keep = torch.ones(ids.shape) if mask is None else mask.float()
        keep = keep * (keep.cumsum(-1) > skip_first)
        counts.append(keep.sum(-1))
        if progress is not None:
            progress(sum(len(c) for c in counts), len(data), "block influence")

    def watch(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        turned = 1 - torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).cpu()
        sums.setdefault(index, []).append((turned * keep).sum(-1))
        first = keep.argmax(-1, keepdim=True)
        heads.setdefault(index, []).append(turned.gather(-1, first)[:, 0])

    observe(model, data.batches(batch), watch, before=before, stack=stack)
    tokens = [int(n) for n in torch.cat(counts)]
    totals = [torch.cat(sums[i]).double() for i in sorted(sums)]
    means = [ratio(total.tolist(), tokens) for total in totals]
    rest = [float((t - torch.cat(heads[i]).double()).sum()) for i, t in enumerate(totals)]
    return Scores(
        measure="block-influence",
        stack=stack or "decoder",
        unit="1 - cosine",
        values=tuple(mean for mean, _ in means),
        errors=tuple(error for _, error in means),
        sequences=len(tokens),
        tokens=sum(tokens),
        data=data.info.describe(),
        notes=(_sinks([mean for mean, _ in means], rest, skip_first),),
    )


def _sinks(means: list[float], without: list[float], skipped: int) -> str:
    """Whether the first counted token, often an outlier a hundred times as long as the others, decides the order."""
    order = sorted(range(len(means)), key=means.__getitem__)
    other = sorted(range(len(means)), key=without.__getitem__)
    same = next((n for n, (a, b) in enumerate(zip(order, other, strict=True)) if a != b), len(order))
    counted = "all tokens counted" if not skipped else f"the first {skipped} tokens of each sequence left out"
    if same == len(order):
        return f"{counted}; leaving the first one out changes no rank"
    return f"{counted}; leaving the first one out keeps the {same} lowest ranks"
