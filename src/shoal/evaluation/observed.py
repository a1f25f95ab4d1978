"""One number for each token at each layer (or span), summed up as it is seen: by layer and by sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from shoal.data import Data
from shoal.errors import UsageError
from shoal.evaluation.scoring import Progress
from shoal.executing.inputs import require_whole
from shoal.models.opened import open_model
from shoal.plan.steps import PartName
from shoal.recording.observe import observe

Statistic = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The input and the output of a layer or span, [batch, length, hidden] each, to one number for each token."""


@dataclass(frozen=True)
class LayerStatistics:
    """Means over a layer's runs (one, unless a plan repeats it); NaN where a layer did not run."""

    stack: str
    sums: list[list[float]]
    """[layers or starts of spans][sequences]"""
    first: list[list[float]]
    """The share of `sums` that the first counted token of each sequence has."""
    counts: list[int]
    """Tokens counted in each sequence."""
    medians: list[float] = field(default_factory=list)
    """The middle value over all tokens that count, by layer or start; empty unless asked for."""


def observe_tokens(
    model: Any,
    data: Data,
    statistic: Statistic,
    *,
    what: str,
    span: int = 1,
    skip_first: int = 0,
    only: Literal["all", "first", "last"] = "all",
    medians: bool = False,
    part: PartName = "layer",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> LayerStatistics:
    """Sum `statistic` over the tokens of each sequence, without padding and the first `skip_first`, or at the first or
    the last of these `only`. `medians`: keep all of them, float32, for their middle value.

    `what` names the measure in progress and errors. Only `span` inputs are held at a time (of all
    batches, where layers are read from files one after the other). Raises U503 when the span
    does not fit, U508 when `skip_first` leaves no token, U507 for spans or parts while a plan is running.
    """
    found = open_model(model).stack(stack)
    _require(data, found.depth, span, skip_first)
    if span > 1:
        require_whole(model, what, stack)
    starts = found.depth - span + 1
    # made once: small tensors that stay, one for each layer and batch, scatter the heap, and the process grows with the
    # number of batches to many times what is in use
    sums = torch.zeros(starts, 2, len(data), dtype=torch.float64)
    passes = torch.zeros(starts, len(data), dtype=torch.float64)
    counts = torch.zeros(len(data), dtype=torch.int64)
    each = _Each(starts if medians else 0, len(data), data.ids.shape[1])
    inputs: dict[tuple[int, int], torch.Tensor] = {}
    keep = torch.ones(1, 1, dtype=torch.bool)
    rows = slice(0, 0)

    def before_layer(ids: torch.Tensor, mask: torch.Tensor | None, first: int) -> None:
        nonlocal keep, rows
        keep = _counted(ids, mask, skip_first, only)
        rows = slice(first, first + len(ids))

    def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        before_layer(ids, mask, rows.stop)
        counts[rows] = keep.sum(-1)
        each.counted[rows] = keep
        if progress is not None:
            progress(rows.stop, len(data), what)

    def watch(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        start = index - span + 1
        if span > 1:
            if index < starts:
                inputs[index, rows.start] = x
            if start < 0:
                return
            x = inputs.pop((start, rows.start)).to(y.device)
        found = torch.where(keep, statistic(x, y).cpu().double(), 0.0)
        first = found.gather(-1, keep.int().argmax(-1, keepdim=True))[:, 0]
        sums[start, :, rows] += torch.stack([found.sum(-1), first])
        passes[start, rows] += 1
        each.add(start, rows, found)

    observe(
        model,
        data.batches(batch),
        watch,
        before=before,
        before_layer=before_layer,
        progress=progress,
        stack=stack,
        part=part,
    )
    whole, first = (sums / passes[:, None]).unbind(1)  # 0 / 0 where a layer did not run
    return LayerStatistics(found.name, whole.tolist(), first.tolist(), counts.tolist(), each.medians(passes))


def _counted(
    ids: torch.Tensor, mask: torch.Tensor | None, skip_first: int, only: Literal["all", "first", "last"]
) -> torch.Tensor:
    """Which tokens count, bool [batch, length] on the CPU."""
    keep = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    keep = keep & (keep.cumsum(-1) > skip_first)
    if only == "first":
        keep = keep & (keep.cumsum(-1) == 1)
    if only == "last":
        keep = keep & (keep.flip(-1).cumsum(-1).flip(-1) == 1)
    return keep


class _Each:
    """What every token showed, for the middle value of all."""

    def __init__(self, starts: int, sequences: int, length: int) -> None:
        """`starts` 0: nothing is kept."""
        self.counted = torch.zeros(sequences, length, dtype=torch.bool)
        self.values = torch.zeros(starts, sequences, length)

    def add(self, start: int, rows: slice, found: torch.Tensor) -> None:
        if len(self.values):
            self.values[start, rows] += found.float()

    def medians(self, passes: torch.Tensor) -> list[float]:
        """By layer or start, given in how many `passes` [starts, sequences] each was seen; the mean of both where two
        are in the middle, NaN for what did not run."""
        found = [(own / runs[:, None])[self.counted] for own, runs in zip(self.values, passes, strict=False)]
        return [float(np.median(own.numpy())) if len(own) else math.nan for own in found]


def _require(data: Data, depth: int, span: int, skip_first: int) -> None:
    if not 1 <= span <= max(1, depth - 1):
        raise UsageError(f"a span of {span} layers does not fit {depth} layers; give 1 to {depth - 1}", code="U503")
    require_tokens_left(data, skip_first)


def require_tokens_left(data: Data, skip_first: int) -> None:
    """Raise U508 when leaving out the first `skip_first` tokens of each sequence leaves none of the longest."""
    longest = data.ids.shape[1] if data.mask is None else int(data.mask.sum(-1).max())
    if not 0 <= skip_first < longest:
        raise UsageError(
            f"leaving out the first {skip_first} tokens of sequences of {longest} counts none; use 0 to {longest - 1}",
            code="U508",
        )


def first_token_note(seen: LayerStatistics, skip_first: int) -> str:
    """Whether the first counted token, often an outlier a hundred times as long as the others, decides the order."""
    total = sum(seen.counts)
    rest = total - sum(1 for count in seen.counts if count)
    means = [math.fsum(own) / total for own in seen.sums]
    # one token a sequence leaves nothing behind it
    without = [(math.fsum(a) - math.fsum(b)) / max(rest, 1) for a, b in zip(seen.sums, seen.first, strict=True)]
    judged = [i for i, mean in enumerate(means) if not math.isnan(mean)]
    order, other = sorted(judged, key=means.__getitem__), sorted(judged, key=without.__getitem__)
    same = next((n for n, (a, b) in enumerate(zip(order, other, strict=True)) if a != b), len(order))
    counted = "all tokens counted" if not skip_first else f"the first {skip_first} tokens of each sequence left out"
    one = "the first one" if not skip_first else "one more"
    if same == len(order):
        return f"{counted}; leaving {one} out changes no rank"
    return f"{counted}; leaving {one} out keeps the {same} lowest ranks"


def without_part_note(seen: LayerStatistics, part: PartName) -> tuple[str, ...]:
    """Which layers have no such part and were therefore not judged."""
    missing = [i for i, own in enumerate(seen.sums) if any(map(math.isnan, own))]
    if part == "layer" or not missing:
        return ()
    return (f"not judged, having no {part} of their own: layers {', '.join(map(str, missing))}",)
