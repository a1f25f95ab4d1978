"""Draft by the skip set that dynamic programming finds nearest to the whole model at the last token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.errors import UsageError
from shoal.examples import DraftExamples
from shoal.plan import Run, Spec
from shoal.speculating.chooser import Chooser, PeriodicChooser
from shoal.speculating.draft_context import DraftContext
from shoal.speculating.layer_trial import similarity

EXAMPLES = DraftExamples(("clasp:skip=1;every=1",))


def clasp(*, spec: Spec, skip: int | None = None, every: int = 8, first: int = 1) -> Chooser:
    """Skip the `skip` layers (left out: a third) that keep the last token's state nearest to the whole model's.

    g[i, j], [hidden], is the best state behind layer i with j layers skipped: of g[i-1, j-1] (layer i skipped) and
    layer_i(g[i-1, j]) the one whose cosine with the true state x_i is larger. All j of a layer run as one batch, and
    the true state is one more row of it. Chosen anew when `every` tokens were written. Layers before
    `first` stay; the verification shares them.

    Source: CLaSp (Chen et al., ACL 2025, arXiv 2505.24196).

    How we differ: the paper chooses anew after every verification; `every=1` does so.
    """
    depth = spec.stack("decoder").depth
    skip = max(1, depth // 3) if skip is None else skip
    first = max(1, first)
    if not 0 < skip <= depth - first or every < 1:
        raise UsageError(
            f"clasp cannot skip {skip} of the layers {first} to {depth - 1} every {every} tokens; "
            f"skip 1 to {depth - 1} of them",
            code="U610",
        )
    return _Clasp(skip, every, first)


@dataclass
class _Clasp(PeriodicChooser):
    skip: int
    every: int
    first: int

    def chosen(self, context: DraftContext) -> tuple[Run, ...]:
        """Choose by the last token."""
        trial = context.layer_trial()
        best: dict[int, tuple[torch.Tensor, tuple[int, ...]]] = {0: (trial.start, ())}
        true = trial.start
        for layer in range(context.runner.depth):
            counts = list(best)
            ran = trial.run(Run(layer), torch.cat([true, *(best[j][0] for j in counts)]))
            true = ran[:1]
            after: dict[int, tuple[torch.Tensor, tuple[int, ...]]] = {}
            options = [(j, ran[n + 1 : n + 2], (*best[j][1], layer)) for n, j in enumerate(counts)]
            options += [(j + 1, *best[j]) for j in counts if layer >= self.first and j < self.skip]
            for j, state, kept in options:
                if j not in after or similarity(state, true) > similarity(after[j][0], true):
                    after[j] = (state, kept)
            best = after
        return tuple(Run(layer) for layer in best[max(best)][1])
