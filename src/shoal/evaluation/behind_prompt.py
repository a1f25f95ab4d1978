"""Prompts whose layers are given other states: what that changes for the tokens behind them, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from shoal.data import Data
from shoal.errors import UsageError
from shoal.evaluation.agreement import compare_logits
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.scoring import Progress, require_context
from shoal.executing.inputs import require_whole
from shoal.models.evaluating import evaluating
from shoal.models.kinds import require_causal
from shoal.models.opened import open_model
from shoal.recording.frozen import GoesOn, continued
from shoal.scores import Scores

Changes = Callable[[range], Callable[[int], GoesOn]]
"""The numbers of the sequences of a batch -> a layer -> what the layers of their prompts are given instead."""


def prompt_of(data: Data, tail: int | None, what: str) -> int:
    """How many tokens stand in front of the last `tail` (by default a quarter). Raises U538 for a tail that does not
    fit, and for padded sequences."""
    length = data.ids.shape[1]
    behind = max(2, length // 4) if tail is None else tail
    if not 2 <= behind < length:
        raise UsageError(
            f"a tail of {behind} of {length} tokens leaves no prompt or nothing to predict; use 2 or more", code="U538"
        )
    if data.mask is not None:
        raise UsageError(f"{what} splits every sequence at one place; give sequences without padding", code="U538")
    return length - behind


def behind_prompt(
    model: Any,
    data: Data,
    changes: Changes,
    *,
    measure: str,
    what: str,
    tail: int | None,
    notes: tuple[str, ...] = (),
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """Scores of a diagnostic: KL(model || model whose prompts are changed at layer i) in nats per token, over the last
    `tail` tokens of each sequence; the detail holds `top1`, the share of tokens whose first choice stays.

    Cost: one cached pass per layer. Raises U538 as `prompt_of` does, U537 for a model without a KV cache, M322 for one
    without next-token scores, U507 while a plan is running.
    """
    require_causal(model, what)
    require_whole(model, what, stack)
    require_context(model, data.ids.shape[1])
    prompt, found = prompt_of(data, tail, what), open_model(model).stack(stack)
    behind = data.ids.shape[1] - prompt
    moved: list[list[float]] = [[] for _ in range(found.depth)]
    same: list[list[float]] = [[] for _ in range(found.depth)]
    done = first = 0
    for ids, _ in data.batches(batch):
        with evaluating(model):
            changed = changes(range(first, first + len(ids)))
            dense = continued(model, ids, prompt, stack=stack)
            for layer in range(found.depth):
                logits = continued(model, ids, prompt, goes_on=changed(layer), stack=stack)
                divergence, agree = compare_logits(dense, logits)
                moved[layer] += divergence[:, :-1].sum(-1).tolist()
                same[layer] += agree[:, :-1].sum(-1).tolist()
                done += len(ids)
                if progress is not None:
                    progress(done, len(data) * found.depth, what)
        first += len(ids)
    counts = [behind - 1] * len(data)
    return mean_scores(
        measure, "nats per token", moved, counts, data, stack=found.name, removal=False,
        notes=(f"prompts of {prompt} tokens, judged on the {behind - 1} predictions behind them", *notes),
        detail={"top1": [math.fsum(own) / sum(counts) for own in same]},
    )  # fmt: skip
