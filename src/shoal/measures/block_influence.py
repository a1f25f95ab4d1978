"""Block influence: how much a layer turns the hidden state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from shoal.errors import UsageError
from shoal.evaluation.stats import ratio
from shoal.models.stacks import find_stack
from shoal.run.observe import observe
from shoal.scores import Scores

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress


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

    BI_i = 1 - E_t[ x_i,t . y_i,t / (|x_i,t| |y_i,t|) ], x_i and y_i [batch, length, hidden] the input and output of
    layer i, in float32.
    Source: ShortGPT (Men et al. 2024, arXiv 2403.03853), equation 1.
    How we differ: padding is left out; the first `skip_first` tokens of each sequence can be (attention sinks: their
    states are a hundred times longer and hardly turn), and a note says whether that changes the order; each layer has a
    standard error over sequences; 1 - cos is computed as |x/|x| - y/|y||^2 / 2, which keeps its digits when it is small
    and is exactly 0 for a layer that adds nothing. Under a running plan a layer that does not run gets NaN, one that
    runs more than once the mean over its runs. Cost: one pass without the head, nothing stored but two sums per layer
    and sequence. Raises U508 when `skip_first` leaves no token.
    """
    found = find_stack(model, stack)
    # made once: small tensors that stay, one for each layer and batch, scatter the heap, and the process grows with the
    # number of batches to many times what is in use
    sums = torch.zeros(found.depth, 2, len(data), dtype=torch.float64)
    passes = torch.zeros(found.depth, len(data), dtype=torch.float64)
    counts = torch.zeros(len(data), dtype=torch.int64)
    keep = torch.ones(1, 1, dtype=torch.bool)
    rows = slice(0, 0)

    def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        nonlocal keep, rows
        keep = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        keep = keep & (keep.cumsum(-1) > skip_first)
        rows = slice(rows.stop, rows.stop + len(ids))
        counts[rows] = keep.sum(-1)
        if progress is not None:
            progress(rows.stop, len(data), "block influence")

    def watch(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        turned = torch.where(keep, _turned(x, y).cpu().double(), 0.0)
        first = turned.gather(-1, keep.int().argmax(-1, keepdim=True))[:, 0]
        sums[index, :, rows] += torch.stack([turned.sum(-1), first])
        passes[index, rows] += 1

    _require_tokens(data, skip_first)
    observe(model, data.batches(batch), watch, before=before, stack=stack)
    tokens = counts.tolist()
    whole, first = (sums / passes[:, None]).unbind(1)  # 0 / 0 where a layer did not run
    means = [(math.nan, None) if s.isnan().any() else ratio(s.tolist(), tokens) for s in whole]
    rest = (whole - first).sum(-1).tolist()
    return Scores(
        measure="block-influence",
        stack=found.name,
        unit="1 - cosine",
        values=tuple(mean for mean, _ in means),
        errors=tuple(error for _, error in means),
        sequences=len(tokens),
        tokens=sum(tokens),
        data=data.info.describe(),
        notes=(_sinks([mean for mean, _ in means], rest, skip_first),),
    )


def _turned(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1 - cos for each token, [batch, length]."""
    x, y = (torch.nn.functional.normalize(state.float(), dim=-1) for state in (x, y))
    return (x - y).square().sum(-1) / 2


def _require_tokens(data: Data, skip_first: int) -> None:
    longest = data.ids.shape[1] if data.mask is None else int(data.mask.sum(-1).max())
    if not 0 <= skip_first < longest:
        raise UsageError(
            f"leaving out the first {skip_first} tokens of sequences of {longest} counts none; use 0 to {longest - 1}",
            code="U508",
        )


def _sinks(means: list[float], without: list[float], skipped: int) -> str:
    """Whether the first counted token, often an outlier a hundred times as long as the others, decides the order."""
    judged = [i for i, mean in enumerate(means) if not math.isnan(mean)]
    order, other = sorted(judged, key=means.__getitem__), sorted(judged, key=without.__getitem__)
    same = next((n for n, (a, b) in enumerate(zip(order, other, strict=True)) if a != b), len(order))
    counted = "all tokens counted" if not skipped else f"the first {skipped} tokens of each sequence left out"
    one = "the first one" if not skipped else "one more"
    if same == len(order):
        return f"{counted}; leaving {one} out changes no rank"
    return f"{counted}; leaving {one} out keeps the {same} lowest ranks"
