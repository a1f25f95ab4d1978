"""Value drain: how short the first token's values are beside the others', with the peaks and the dormant heads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from shoal.errors import UsageError
from shoal.evaluation.mean_scores import mean_scores
from shoal.models.opened import open_model
from shoal.recording.attention import observe_maps
from shoal.recording.keys_values import observe_kv
from shoal.recording.observe import observe
from shoal.scores import Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores

TRAITS = Traits(null="none", least=False)
WHAT = "value drain"


def value_drain(
    model: Any,
    data: Data,
    *,
    dormant: float = 0.8,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The length of the first token's values over that of the others', mean over key-value heads and sequences.

    d_i = E_s,h[ |v_i,h(first)| / E_t[|v_i,h(t)|] ], v_i,h [tokens, dim] the values of head h of layer i, t all tokens
    of sequence s but the first; far below 1 where the head drains the token that it rests on, so that resting adds
    nothing. The detail holds `heads`, the same by layer and key-value head; `peak`, E_s[ |y_i(first)| / E_t[|y_i(t)|] ]
    of the layer's output y_i [tokens, hidden]; `sink`, by layer and head the attention that the other tokens pay the
    first one, mean over sequences; and `dormant`, [layer, head, share of sequences in which the sink is at least
    `dormant`] for each head with such a sequence: below 1 it is active on some texts and dormant on others. A
    diagnostic: it says which heads rest and on what, not which layer may go; a first token that is drained and peaks
    must keep its key and value.

    Source: Guo et al. 2024 (arXiv 2410.13835): attention sinks, value-state drains and residual-state peaks, and heads
    that are active or dormant by the input.

    How we differ: the paper plots single heads of Llama and OLMo and ablates them; here every head is counted, and
    whether its layer can do without it is another measure's question. The first real token counts as the first, padding
    is left out. Cost: three passes without the head, under eager attention in one. Raises U695 for a sequence of one
    token, U537 for a model without keys and values or attention maps, U507 while a plan is running.
    """
    found = open_model(model).stack(stack)
    seen = _Seen(found.depth, data, progress)
    passes: dict[str, Any] = {"before": seen.before, "stack": stack}
    observe_kv(model, data.batches(batch), lambda i, _, v: seen.values(i, v), what=WHAT, **passes)
    observe(model, data.batches(batch), lambda i, _, y: seen.states(i, y), **passes)
    observe_maps(model, data.batches(batch), seen.maps, what=WHAT, **passes)
    heads, sinks = ([torch.stack(own) if own else None for own in kind] for kind in (seen.drains, seen.sinks))
    sums = [[math.nan] * len(data) if own is None else own.mean(-1).tolist() for own in heads]
    resting = [torch.zeros(0) if own is None else (own >= dormant).mean(0, dtype=torch.float64) for own in sinks]
    listed = [[i, h, share] for i, own in enumerate(resting) for h, share in enumerate(own.tolist()) if share]
    always = sum(share == 1 for *_, share in listed)
    note = (
        f"{always} of {sum(map(len, resting))} heads rest on the first token with {dormant:g} of their attention in "
        f"every sequence, {len(listed) - always} in some"
    )
    return mean_scores(
        "value-drain", "length over that of the others", sums, [1] * len(data), data, stack=found.name,
        tokens=seen.tokens, notes=(note,), removal=False,
        detail={
            "heads": _means(heads), "peak": [math.fsum(own) / len(data) if own else math.nan for own in seen.peaks],
            "sink": _means(sinks), "dormant": listed,
        },
    )  # fmt: skip


class _Seen:
    """What the three passes see of each sequence, by layer."""

    def __init__(self, depth: int, data: Data, progress: Progress | None) -> None:
        self.drains: list[list[torch.Tensor]] = [[] for _ in range(depth)]
        """Of each sequence [key-value heads]."""
        self.sinks: list[list[torch.Tensor]] = [[] for _ in range(depth)]
        """Of each sequence [heads]."""
        self.peaks: list[list[float]] = [[] for _ in range(depth)]
        self.tokens = 0
        self._data, self._progress, self._done = data, progress, 0
        self._real: list[torch.Tensor] = []

    def before(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """A batch of one of the passes: notes where its real tokens are."""
        keep = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        self._real = [row.nonzero()[:, 0] for row in keep]
        if any(len(own) < 2 for own in self._real):
            raise UsageError(
                f"{WHAT} compares the first token of a sequence with the others, and one has none; give longer "
                "sequences",
                code="U695",
            )
        if self._done < len(self._data):
            self.tokens += int(keep.sum())
        self._done += len(ids)
        if self._progress is not None:
            self._progress(self._done, 3 * len(self._data), WHAT)

    def values(self, layer: int, values: torch.Tensor) -> None:
        """[batch, heads, tokens, dim]"""
        self.drains[layer] += [_first_over_others(own) for own in self._lengths(values.movedim(2, 1))]

    def states(self, layer: int, states: torch.Tensor) -> None:
        """[batch, tokens, hidden]"""
        self.peaks[layer] += [float(_first_over_others(own)) for own in self._lengths(states)]

    def maps(self, layer: int, maps: torch.Tensor) -> None:
        """[batch, heads, queries, keys]"""
        for row, real in zip(maps, self._real, strict=True):
            own = real.to(maps.device)
            self.sinks[layer].append(row[:, own[1:], own[0]].float().mean(-1).cpu().double())

    def _lengths(self, vectors: torch.Tensor) -> list[torch.Tensor]:
        """Of each sequence the lengths of its real tokens' vectors, [tokens, ...]."""
        lengths = vectors.float().norm(dim=-1).cpu().double()
        return [own[real] for own, real in zip(lengths, self._real, strict=True)]


def _first_over_others(lengths: torch.Tensor) -> torch.Tensor:
    """From [tokens, ...]; 1 where all are nothing."""
    others = lengths[1:].mean(0)
    return torch.where((others == 0) & (lengths[0] == 0), 1.0, lengths[0] / others)


def _means(layers: list[torch.Tensor | None]) -> list[list[float]]:
    """By layer and head the mean over sequences; a layer without heads has none."""
    return [[] if own is None else own.mean(0).tolist() for own in layers]
