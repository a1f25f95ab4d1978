"""KV freeze: what it costs to make the prompt's keys and values above a layer from the state at that layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.evaluation.behind_prompt import behind_prompt
from shoal.recording.frozen import frozen_at
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
    return behind_prompt(
        model, data, lambda _: frozen_at, measure="kv-freeze", what="KV freeze", tail=tail, stack=stack, batch=batch,
        progress=progress,
    )  # fmt: skip
