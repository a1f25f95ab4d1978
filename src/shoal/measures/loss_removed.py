"""Loss when removed: what each layer is worth to the model as it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from shoal.evaluation.scoring import sequence_nll
from shoal.evaluation.stats import ratio
from shoal.models.inspect import inspect
from shoal.models.kinds import require_causal
from shoal.plan import Plan, check, drop
from shoal.run.live import running
from shoal.run.observe import require_whole
from shoal.scores import Scores

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress


def loss_removed(
    model: Any,
    data: Data,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The rise of the cross-entropy, in nats per token, when one layer (or its attention or mlp) is removed.

    delta_i = NLL(model without i) - NLL(model), token-weighted mean over sequences, paired sequence by sequence; the
    standard error is that of the paired differences.
    Source: the one-shot form of SLEB's metric (Song et al. 2024, arXiv 2402.09025, section 3) and of Shortened LLaMA's
    perplexity criterion (Kim et al. 2024, arXiv 2402.02834).
    How we differ: nothing is rebuilt, the layer is left out of the running model; a layer whose removal is not legal
    gets NaN and a note. Cost: one full pass per layer. Raises U507 while a plan is running.
    """
    require_causal(model, "loss when removed")
    require_whole(model, "loss when removed", stack)
    spec = inspect(model)
    plan = Plan.identity(spec)
    depth = spec.stack(stack).depth
    dense = sequence_nll(model, data, batch=batch)
    means: list[tuple[float, float | None]] = []
    refused: list[str] = []
    for layer in range(depth):
        if progress is not None:
            progress(layer + 1, depth + 1, "loss when removed")
        candidate = drop(plan, [layer], part=part, stack=stack) if depth > 1 else plan
        problems = check(candidate, spec)
        if problems or depth == 1:
            means.append((math.nan, None))
            refused.append(f"layer {layer} was not judged: {problems[0] if problems else 'it is the only one'}")
            continue
        with running(model, candidate):
            sums = sequence_nll(model, data, batch=batch)
        differences = [without - with_all for (without, _), (with_all, _) in zip(sums, dense, strict=True)]
        means.append(ratio(differences, [count for _, count in dense]))
    if progress is not None:
        progress(depth + 1, depth + 1, "loss when removed")
    return Scores(
        measure="loss-removed",
        stack=spec.stack(stack).name,
        unit="nats per token",
        values=tuple(mean for mean, _ in means),
        errors=tuple(error for _, error in means),
        sequences=len(data),
        tokens=sum(count for _, count in dense),
        data=data.info.describe(),
        notes=tuple(refused),
    )
