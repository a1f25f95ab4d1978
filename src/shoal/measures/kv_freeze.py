"""KV freeze: what it costs to make the prompt's keys and values above a layer from the state at that layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from shoal.errors import UsageError
from shoal.evaluation.agreement import compare_logits
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.scoring import require_context
from shoal.executing.inputs import require_whole
from shoal.models.evaluating import evaluating
from shoal.models.kinds import require_causal
from shoal.models.opened import open_model
from shoal.recording.frozen import continued
from shoal.scores import Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores

TRAITS = Traits(null="none", least=False)


def kv_freeze(
    model: Any,
    data: Data,
    *,
    tail: int | None = None,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """KL(model || model whose prompt is frozen at layer i), in nats per token, over the tokens behind the prompt.

    f_i = E_t[ KL(p_t || q_i,t) ] over the last `tail` tokens of each sequence (a quarter of it by default), which run
    as always; for the tokens before them, the prompt, the keys and values of all layers above i are made from the
    output of layer i. 0 for the last two layers, above which all is as always. The detail holds `top1`, the share of
    tokens whose first choice stays. A diagnostic: where the curve is low, the KV of the layers above could be shared,
    or computed without running these layers on the prompt.

    Source: Attend First, Consolidate Later (2024, arXiv 2409.03621), the freezing experiment.

    How we differ: a prompt of many tokens and a tail of several are judged instead of a single current token, by KL
    instead of answers; standard errors are over sequences. Cost: one cached pass per layer. Raises U538 for a tail that
    does not fit or padded sequences, U537 for a model without a KV cache, M322 for one without next-token scores, U507
    while a plan is running.
    """
    require_causal(model, "KV freeze")
    require_whole(model, "KV freeze", stack)
    require_context(model, data.ids.shape[1])
    length = data.ids.shape[1]
    behind = max(2, length // 4) if tail is None else tail
    if not 2 <= behind < length:
        raise UsageError(
            f"a tail of {behind} of {length} tokens leaves no prompt or nothing to predict; use 2 or more", code="U538"
        )
    if data.mask is not None:
        raise UsageError("KV freeze splits every sequence at one place; give sequences without padding", code="U538")
    found = open_model(model).stack(stack)
    moved: list[list[float]] = [[] for _ in range(found.depth)]
    same: list[list[float]] = [[] for _ in range(found.depth)]
    done = 0
    for ids, _ in data.batches(batch):
        with evaluating(model):
            dense = continued(model, ids, length - behind, stack=stack)
            for layer in range(found.depth):
                logits = continued(model, ids, length - behind, frozen=layer, stack=stack)
                divergence, agree = compare_logits(dense, logits)
                moved[layer] += divergence[:, :-1].sum(-1).tolist()
                same[layer] += agree[:, :-1].sum(-1).tolist()
                done += len(ids)
                if progress is not None:
                    progress(done, len(data) * found.depth, "KV freeze")
    counts = [behind - 1] * len(data)
    return mean_scores(
        "kv-freeze", "nats per token", moved, counts, data, stack=found.name, removal=False,
        notes=(f"prompts of {length - behind} tokens, judged on the {behind - 1} predictions behind them",),
        detail={"top1": [math.fsum(own) / sum(counts) for own in same]},
    )  # fmt: skip
