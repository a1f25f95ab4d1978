"""Draft by the attentions and mlps that are worth their measured time."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from shoal.errors import UsageError
from shoal.examples import DraftExamples
from shoal.executing.timing import synchronized_time
from shoal.plan import Run, Spec
from shoal.plan.steps import PartName
from shoal.speculating.chooser import Chooser, PeriodicChooser
from shoal.speculating.draft_context import DraftContext
from shoal.speculating.layer_trial import LayerTrial, similarity

BUCKETS = 12
"""Steps in which a draft's time is counted."""

EXAMPLES = DraftExamples(("knapsack:every=3",))


def knapsack(*, spec: Spec, every: int = 24, length: int = 4) -> Chooser:
    """Pick attentions and mlps by a knapsack over their measured times, judged at the last token.

    g[i, t], [hidden], is the state nearest to the true one behind part i (of 2 x depth) at a cost of t buckets of time:
    skip the part, or run it and pay. Of all final t the one is taken with the most tokens for the time:
    (1 - a^(n+1)) / (1 - a) / (n t + 1), a = its cosine with the whole model's state, n = `length` drafted tokens, times
    as shares of a whole pass. Parts are timed again when the text is half as long again: attention grows with it.
    Chosen anew when `every` tokens were written. Layer 0 stays whole; a layer without parts counts as one.

    Source: KnapSpec (arXiv 2602.20217), which shows that cosine stands for acceptance.

    How we differ: times are those of single parts on this machine, batched states are tried by the buckets, and the
    drafted length is given.
    """
    if every < 1 or length < 1:
        raise UsageError(f"knapsack cannot draft {length} tokens every {every}; use 1 or more of each", code="U610")
    return _Knapsack(every, length)


@dataclass
class _Knapsack(PeriodicChooser):
    every: int
    length: int
    timed_at: int = 0
    timed_model: Callable[[], object] = lambda: None
    """The model whose parts were timed, while it lives: one draft may serve several."""
    costs: dict[tuple[int, PartName], float] = field(default_factory=dict)

    def chosen(self, context: DraftContext) -> tuple[Run, ...]:
        """Choose by the last token and the clock."""
        trial, items = context.layer_trial(), _items(context.runner.spec)
        model = context.runner.model
        if self.timed_model() is not model or context.length > 1.5 * self.timed_at:
            self.costs, self.timed_at = _timed(trial, items), context.length
            self.timed_model = weakref.ref(model)
        kept = self._fill(trial, items)
        return _steps(context.runner.depth, kept, items)

    def _fill(self, trial: LayerTrial, items: list[tuple[int, PartName]]) -> frozenset[int]:
        whole = sum(self.costs.values())
        buckets = [max(1, round(BUCKETS * len(items) * self.costs[item] / whole)) for item in items]
        best: dict[int, tuple[torch.Tensor, frozenset[int]]] = {0: (trial.start, frozenset())}
        true = trial.start
        for n, (layer, part) in enumerate(items):
            spent = list(best)
            ran = trial.run(Run(layer, part=part), torch.cat([true, *(best[t][0] for t in spent)]))
            true = ran[:1]
            options = [(t + buckets[n], ran[m + 1 : m + 2], best[t][1] | {n}) for m, t in enumerate(spent)]
            options += [(t, *best[t]) for t in spent] if layer else []
            best = _thin(options, true, BUCKETS)
        scale = sum(buckets)
        found = max(best, key=lambda t: self._worth(similarity(best[t][0], true), t / scale))
        return best[found][1]

    def _worth(self, near: float, share: float) -> float:
        near = min(max(near, 0.0), 1 - 1e-6)
        return (1 - near ** (self.length + 1)) / (1 - near) / (self.length * share + 1)


def _thin(
    options: list[tuple[int, torch.Tensor, frozenset[int]]], true: torch.Tensor, most: int
) -> dict[int, tuple[torch.Tensor, frozenset[int]]]:
    """The nearest state for each time spent, and of all times at most `most`, evenly spread."""
    after: dict[int, tuple[float, torch.Tensor, frozenset[int]]] = {}
    for spent, state, kept in options:
        near = similarity(state, true)
        if spent not in after or near > after[spent][0]:
            after[spent] = (near, state, kept)
    low, high = min(after), max(after)
    width = max(1, math.ceil((high - low + 1) / most))
    chosen: dict[int, int] = {}
    for spent in sorted(after):
        slot = (spent - low) // width
        if slot not in chosen or after[spent][0] > after[chosen[slot]][0]:
            chosen[slot] = spent
    return {spent: after[spent][1:] for spent in {*chosen.values(), high}}


def _items(spec: Spec) -> list[tuple[int, PartName]]:
    items: list[tuple[int, PartName]] = []
    for layer in spec.stack("decoder").layers:
        whole = layer.index == 0 or layer.attention is None or layer.mlp is None
        items += [(layer.index, "layer")] if whole else [(layer.index, "attention"), (layer.index, "mlp")]
    return items


def _timed(trial: LayerTrial, items: list[tuple[int, PartName]]) -> dict[tuple[int, PartName], float]:
    """Seconds of each part for one token, the lesser of two."""
    times = {}
    for layer, part in items:
        spent = []
        for _ in range(2):
            start = synchronized_time(trial.start.device)
            trial.run(Run(layer, part=part), trial.start)
            spent.append(synchronized_time(trial.start.device) - start)
        times[layer, part] = min(spent)
    return times


def _steps(depth: int, kept: frozenset[int], items: list[tuple[int, PartName]]) -> tuple[Run, ...]:
    parts = {
        layer: [part for n, (one, part) in enumerate(items) if one == layer and n in kept] for layer in range(depth)
    }
    return tuple(Run(layer, part="layer" if len(found) == 2 else found[0]) for layer, found in parts.items() if found)
