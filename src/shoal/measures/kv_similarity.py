"""KV similarity: how far the keys and values that a layer stores are from those of the layer below."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.errors import UsageError
from shoal.evaluation.alignment import EveryAlignment, centred_gram, independence, misalignment, require_tokens
from shoal.evaluation.distances import one_minus_cosine
from shoal.evaluation.layer_pairs import LayerPairs, kept_tokens
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.observed import require_tokens_left
from shoal.evaluation.stats import bootstrap
from shoal.models.opened import open_model
from shoal.models.precision import in_float64
from shoal.recording.keys_values import observe_kv
from shoal.scores import Scores, Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress

TRAITS = Traits(null="none", least=False, first=1)
_Pair = tuple[torch.Tensor, torch.Tensor]


def kv_similarity(
    model: Any,
    data: Data,
    *,
    by: Literal["cosine", "distance", "cka"] = "cosine",
    pairs: Literal["neighbours", "all"] = "neighbours",
    skip_first: int = 1,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """How far the keys and values of a layer are from those of the layer below, mean of keys and values.

    K_i, V_i [batch, heads, tokens, dim] as the cache holds them, the keys rotated. `by="cosine"`: E_t[ 1 - cos(K_it,
    K_jt) ] over tokens t, all heads side by side [heads * dim]; low for what one slot could hold for two layers.
    `by="cka"`: 1 minus the linear centred kernel alignment over tokens (see the measure `cka`); low for what a linear
    map takes from one layer to the other. `by="distance"`: KVSharer's, mean over heads and tokens of |A_i - A_j|, A_i
    [heads, tokens, dim] the mean of K_i (or V_i) over sequences; KVSharer lets the pairs that are *farthest* apart
    share, the highest first, the upper layer reading the lower one's. Layer i is compared with the next below that
    stores keys and values; the first has none below and gets NaN, as do layers of other shapes (not by cka). With
    `pairs="all"` the detail holds `matrix`, the figure of every two layers, and `keys` and `values`, those of either
    alone. A diagnostic: layers that could share keys and values cannot therefore be left out.

    Source: Yang et al. 2024 (KVSharer, arXiv 2410.18517) for the distance; the cosine of two layers' keys and values at
    one token is MiniCache's (Liu et al. 2024, arXiv 2405.14366).

    How we differ: KVSharer's released notebook adds up the sequences whose length is that of the first and divides by
    all of them; here all windows have one length. The first `skip_first` tokens, whose keys are often outliers, and
    padding do not count. Memory: keys and values of one batch, of all layers with `pairs="all"`. Raises U537 for a
    model that stores none, U536 for sequences too short for cka, U538 for padded sequences by distance, which averages
    them place by place, U508 when `skip_first` leaves no token, U507 while a plan is running.
    """
    require_tokens_left(data, skip_first)
    if by == "distance" and data.mask is not None:
        raise UsageError(
            "KV similarity by distance averages sequences place by place; give sequences without padding, or compare "
            "by cosine",
            code="U538",
        )
    found = open_model(model).stack(stack)
    ways = {"cosine": _Cosine, "distance": _Distance, "cka": _Alignment}
    way = ways[by](found.depth, data, every=pairs == "all", skip_first=skip_first)

    def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        way.begin(kept_tokens(ids, mask, skip_first=skip_first))
        if progress is not None:
            progress(len(way.counts), len(data), "KV similarity")

    def watch(index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        way.add(index, (keys, values))

    observe_kv(model, data.batches(batch), watch, what="KV similarity", before=before, stack=stack)
    return way.scores(found.name)


def _flat(states: torch.Tensor) -> torch.Tensor:
    """[batch, heads, tokens, dim] as [batch, tokens, heads * dim]."""
    return states.transpose(1, 2).flatten(2)


class _Way:
    """One way to compare: told what each layer stores, batch by batch."""

    def __init__(self, depth: int, data: Data, *, every: bool, skip_first: int) -> None:
        self.depth, self.data, self.every, self.skip_first = depth, data, every, skip_first
        self.counts: list[int] = []
        self.keep = torch.ones(1, 1, dtype=torch.bool)

    def begin(self, keep: torch.Tensor) -> None:
        """A new batch; `keep` [batch, tokens]: what is compared."""
        self.keep = keep
        self.counts += keep.sum(-1).tolist()

    def add(self, layer: int, own: _Pair) -> None:
        """The keys and values of a layer."""
        raise NotImplementedError

    def scores(self, stack: str) -> Scores:
        """What all batches showed."""
        raise NotImplementedError

    def _detail(self, keys: list[list[float]], values: list[list[float]]) -> dict[str, Any]:
        both = [[(k + v) / 2 for k, v in zip(*rows, strict=True)] for rows in zip(keys, values, strict=True)]
        return {"matrix": both, "keys": keys, "values": values} if self.every else {}

    def _scores(self, stack: str, unit: str, values: Any, errors: Any, detail: dict[str, Any]) -> Scores:
        return Scores(
            measure="kv-similarity", stack=stack, unit=unit, values=tuple(values), errors=tuple(errors),
            sequences=len(self.counts), tokens=sum(self.counts), data=self.data.info.describe(),
            notes=self._notes(), detail=detail, removal=False,
        )  # fmt: skip

    def _notes(self) -> tuple[str, ...]:
        return (f"the first {self.skip_first} tokens of each sequence left out",) if self.skip_first else ()


class _Cosine(_Way):
    def __init__(self, depth: int, data: Data, *, every: bool, skip_first: int) -> None:
        super().__init__(depth, data, every=every, skip_first=skip_first)
        self.both = tuple(LayerPairs[torch.Tensor](depth, every=every) for _ in range(2))

    def begin(self, keep: torch.Tensor) -> None:
        super().begin(keep)
        for one in self.both:
            one.begin(keep.sum(-1).tolist())

    def add(self, layer: int, own: _Pair) -> None:
        for pairs, states in zip(self.both, own, strict=True):
            pairs.add(layer, _flat(states), self._apart)

    def _apart(self, mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor | None:
        if mine.shape != theirs.shape:
            return None
        turned = one_minus_cosine(mine, theirs.to(mine.device)).cpu().double()
        return torch.where(self.keep, turned, 0.0).sum(-1)

    def scores(self, stack: str) -> Scores:
        keys, values = self.both
        sums = [
            # one and the same NaN, so that equal scores compare equal
            [math.nan if math.isnan(k + v) else (k + v) / 2 for k, v in zip(*own, strict=True)]
            for own in zip(keys.sums(), values.sums(), strict=True)
        ]
        return mean_scores(
            "kv-similarity", "1 - cosine", sums, self.counts, self.data, stack=stack, removal=False,
            notes=self._notes(), detail=self._detail(keys.matrix(), values.matrix()),
        )  # fmt: skip


class _Distance(_Way):
    def __init__(self, depth: int, data: Data, *, every: bool, skip_first: int) -> None:
        super().__init__(depth, data, every=every, skip_first=skip_first)
        self.sums: dict[int, list[torch.Tensor]] = {}

    def add(self, layer: int, own: _Pair) -> None:
        added = [in_float64(states[:, :, self.skip_first :]).sum(0).cpu() for states in own]
        held = self.sums.get(layer)
        self.sums[layer] = added if held is None else [a + b for a, b in zip(held, added, strict=True)]

    def scores(self, stack: str) -> Scores:
        keys, values = (self._matrix(place) for place in range(2))
        found = [math.nan] * self.depth
        for below, layer in itertools.pairwise(sorted(self.sums)):
            found[layer] = (keys[layer][below] + values[layer][below]) / 2
        unit = "mean distance of averaged keys and values"
        return self._scores(stack, unit, found, [None] * self.depth, self._detail(keys, values))

    def _matrix(self, place: int) -> list[list[float]]:
        found = torch.full((self.depth, self.depth), math.nan, dtype=torch.float64)
        for (i, mine), (j, theirs) in itertools.product(self.sums.items(), repeat=2):
            if mine[place].shape == theirs[place].shape:
                found[i, j] = (mine[place] - theirs[place]).norm(dim=-1).mean() / len(self.counts)
        listed: list[list[float]] = found.tolist()
        return listed


class _Alignment(_Way):
    def __init__(self, depth: int, data: Data, *, every: bool, skip_first: int) -> None:
        super().__init__(depth, data, every=every, skip_first=skip_first)
        self.sums: list[list[list[float]]] = [[] for _ in range(depth)]
        """By layer and sequence, of keys and then of values: H(K, L), H(K, K), H(L, L) with the layer below."""
        self.below: list[list[torch.Tensor]] = []
        self.seen = tuple(EveryAlignment(depth) for _ in range(2)) if every else ()

    def begin(self, keep: torch.Tensor) -> None:
        super().begin(keep)
        require_tokens(self.counts, self.skip_first)
        self.below = []
        for one in self.seen:
            one.close()

    def add(self, layer: int, own: _Pair) -> None:
        grams = [[centred_gram(_flat(states)[row].cpu()[real]) for states in own] for row, real in enumerate(self.keep)]
        for row, mine in enumerate(grams):
            for seen, gram in zip(self.seen, mine, strict=False):
                seen.add(row, layer, gram)
        for mine, theirs in zip(grams, self.below, strict=False):
            self.sums[layer].append(
                [independence(*two) for a, b in zip(mine, theirs, strict=True) for two in ((a, b), (a, a), (b, b))]
            )
        self.below = grams

    def scores(self, stack: str) -> Scores:
        values, errors = [], []
        for own in self.sums:
            known = torch.tensor(own, dtype=torch.float64).numpy() if own else None
            values.append(math.nan if known is None else float(_mean(known.sum(0))))
            errors.append(None if known is None else bootstrap(known, _mean))
        apart = [[[1 - alike for alike in row] for row in one.matrix()] for one in self.seen]
        return self._scores(stack, "1 - CKA", values, errors, self._detail(*apart) if apart else {})


def _mean(sums: Any) -> Any:
    """The mean of keys and values of 1 - CKA, from [..., 6]."""
    return (misalignment(sums[..., :3]) + misalignment(sums[..., 3:])) / 2
