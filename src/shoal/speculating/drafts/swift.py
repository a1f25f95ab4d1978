"""Draft by a skip set that is searched while the text is written."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from transformers.cache_utils import Cache

from shoal.errors import UsageError
from shoal.examples import DraftExamples
from shoal.plan import Run, Spec
from shoal.speculating.chooser import Chooser
from shoal.speculating.draft_context import DraftContext
from shoal.speculating.proposals import promising_subset, random_subset

EXAMPLES = DraftExamples(("swift:window=4;fraction=0.3", "swift:window=4,fraction=0.3,propose=local"))


def swift(
    *,
    spec: Spec,
    fraction: float = 0.4,
    window: int = 24,
    tries: int = 40,
    enough: float = 0.95,
    propose: Literal["paper", "local"] = "paper",
    every: int = 25,
    seed: int = 0,
) -> Chooser:
    """Skip `fraction` of the attentions and mlps, and look for a better set each time `window` tokens were written.

    A candidate's score is the share of the last `window` tokens that it would have drafted, in one pass over them on
    the cache as it stood before: matchness = mean(argmax draft(t) == text(t+1)). Each candidate skips
    int(2 (L - 2) fraction) parts. propose=paper: drawn at random, but each `every`-th is where Bayesian optimisation of
    the scores so far promises most (upper confidence bound, kappa 2.5); propose=local: one skipped part is exchanged
    for a kept one, each fifth is drawn anew. The search ends after `tries`, or at a score of `enough`. The first and
    the last layer stay whole.

    Source: SWIFT (Xia et al., ICLR 2025, arXiv 2410.06916).

    How we differ: the first set is spread evenly and skips as many parts as every other (there it is every second
    layer), four candidates are tried at a time instead of one after each token, and the Gaussian process is on
    exchanges between sets; its code skips by layer list files, here it is a plan.
    """
    if every < 1:
        raise UsageError(
            f"swift cannot make each {every}-th proposal a Bayesian one; give every=1 or more", code="U614"
        )
    if not 0 < fraction < 1 or window < 2:
        raise UsageError(
            f"swift cannot skip {fraction} of the parts judged by {window} tokens; "
            "use a fraction between 0 and 1 and a window of 2 or more",
            code="U614",
        )
    return _Swift(spec, fraction, window, tries, enough, propose, every, seed)


@dataclass
class _Swift(Chooser):
    spec: Spec
    fraction: float
    window: int
    tries: int
    enough: float
    propose: str
    every: int
    seed: int
    best: frozenset[int] = frozenset()
    score: float = -1.0
    tried: int = 0
    since: int = 0
    before: Cache | None = None
    random: random.Random = field(default_factory=random.Random)
    seen: dict[frozenset[int], float] = field(default_factory=dict)
    """What every set that was tried scored when it was last tried."""

    def begin(self, spec: Spec) -> tuple[Run, ...]:
        """A skip set spread evenly over the layers; what was found for another text or model does not count."""
        self.spec = spec
        self.random = random.Random(self.seed)
        self.tried, self.score, self.before, self.seen = 0, -1.0, None, {}
        parts = self._parts()
        count = max(1, int(self.fraction * len(parts)))
        self.best = (
            frozenset(parts[(2 * n + 1) * len(parts) // (2 * count)] for n in range(count)) if parts else frozenset()
        )
        return self._steps(self.best)

    def again(self, context: DraftContext) -> tuple[Run, ...] | None:
        """One candidate for each round, once there is text to judge it by."""
        if self.tried >= self.tries or self.score >= self.enough or not self.best:
            self.before = None
            return None
        if self.before is None:
            self.before, self.since = context.snapshot(), context.length
            return None
        if context.length - self.since < self.window:
            return None
        return self._search(context, self.before)

    def _search(self, context: DraftContext, before: Cache) -> tuple[Run, ...] | None:
        better = False
        self.score = self.seen[self.best] = context.agreement(self._steps(self.best), before, self.since)
        for _ in range(4):
            self.tried += 1
            candidate = self._neighbour() if self.propose == "local" else self._proposal()
            score = self.seen[candidate] = context.agreement(self._steps(candidate), before, self.since)
            if score > self.score:
                self.best, self.score, better = candidate, score, True
        self.before, self.since = context.snapshot(), context.length
        return self._steps(self.best) if better else None

    def _proposal(self) -> frozenset[int]:
        if self.tried % self.every == 0:
            return promising_subset(self._parts(), len(self.best), self.seen, self.random)
        return random_subset(self._parts(), len(self.best), self.random)

    def _neighbour(self) -> frozenset[int]:
        parts = self._parts()
        if self.tried % 5 == 0 or len(self.best) == len(parts):
            return frozenset(self.random.sample(parts, len(self.best)))
        out = self.random.choice(sorted(self.best))
        new = self.random.choice([part for part in parts if part not in self.best])
        return self.best - {out} | {new}

    def _parts(self) -> list[int]:
        """2 i is the attention of layer i, 2 i + 1 its mlp; a layer without parts is skipped as a whole (2 i).
        Layers that others read from stay."""
        layers = self.spec.stack("decoder").layers
        read = {needed for layer in layers for needed in layer.needs}
        return [
            2 * layer.index + part
            for layer in layers[1:-1]
            if layer.index not in read
            for part in ((0, 1) if layer.attention is not None and layer.mlp is not None else (0,))
        ]

    def _steps(self, skipped: frozenset[int]) -> tuple[Run, ...]:
        steps = []
        for layer in self.spec.stack("decoder").layers:
            whole = layer.attention is None or layer.mlp is None
            attention, mlp = 2 * layer.index not in skipped, 2 * layer.index + 1 not in skipped
            if attention and (mlp or whole):
                steps.append(Run(layer.index))
            elif attention:
                steps.append(Run(layer.index, part="attention"))
            elif mlp and not whole:
                steps.append(Run(layer.index, part="mlp"))
        return tuple(steps)
