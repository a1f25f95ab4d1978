"""Residual oracle: how many tokens a layer is run for when those that it would hardly change are told in advance."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from shoal.errors import UsageError
from shoal.evaluation.agreement import compare_logits
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.scoring import logits_of, require_context, require_scored, token_nll, windows
from shoal.evaluation.stats import ratio
from shoal.executing.bind import bind
from shoal.executing.calls import hidden_of
from shoal.executing.forward import Forward
from shoal.executing.inputs import require_whole
from shoal.models.evaluating import evaluating
from shoal.models.kinds import require_causal
from shoal.models.opened import open_model
from shoal.plan import Run
from shoal.recording.observe import require_token_axis
from shoal.scores import Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores

TRAITS = Traits(least=False)
WHAT = "the residual oracle"


def residual_oracle(
    model: Any,
    data: Data,
    *,
    threshold: float = 0.1,
    curve: tuple[float, ...] = (),
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The share of tokens for which an oracle runs layer i: it skips those that the layer changes by less than a share.

    u_i = E_t[ r_i,t >= threshold ], r_i,t = |y_i,t - x_i,t| / |y_i,t|, x_i [batch, tokens, hidden] the state that the
    skips before have left and y_i what layer i makes of it; where r_i,t is smaller, token t keeps x_i,t. The detail
    holds `curve`, for the threshold and for each of `curve` besides, from the lowest on: [threshold, layers run for a
    token, their standard error, rise of the cross-entropy in nats, its standard error, share of tokens whose first
    choice stays]. A threshold of 0 skips nothing. A diagnostic: the oracle computes every layer to know what it would
    add, so nothing is saved; it says what a controller could find, and a layer that is skipped for most tokens cannot
    therefore be left out for all.

    Source: Dotzel et al. 2024 (CVPR workshop ELVM, "Opportunities for Post-Training Dynamic Layer Sparsity"), oracles
    at each layer with a threshold on the residual's contribution; Radial Networks (arXiv 2404.04900) has the ratio.

    How we differ: only the abstract of the paper was at hand. A layer is attention and mlp together, and a token that
    skips it still has keys and values there, made from the state that it keeps, as the fill `project` makes them.
    The last token of a sequence, behind which nothing is predicted, is treated alike and does not count. Cost: two
    passes and one more for each threshold. Raises U693 for a threshold that is no share, M316 for streams side by side,
    M322 for a model without next-token scores, U507 while a plan is running.
    """
    thresholds = sorted({threshold, *curve})
    if odd := [one for one in thresholds if not 0 <= one < math.inf]:
        raise UsageError(
            f"a threshold of {odd[0]:g} is no share of the state; use 0 (nothing is skipped) or more, as in 0.1",
            code="U693",
        )
    require_causal(model, WHAT)
    require_whole(model, WHAT, stack)
    require_context(model, data.ids.shape[1])
    found, whole = open_model(model).stack(stack), bind(model)
    executor = whole.executor(found.name)
    used: list[list[list[float]]] = [[[] for _ in range(found.depth)] for _ in thresholds]
    rise: list[list[float]] = [[] for _ in thresholds]
    same: list[list[float]] = [[] for _ in thresholds]
    counts: list[int] = []
    for ids, mask, keep in windows(data, batch, None, WHAT):
        with evaluating(model), whole.running():
            call = partial(logits_of, model, ids, mask)
            dense, record = call(), executor.prepared(call)
            nll = token_nll(dense, ids)
            for place, one in enumerate(thresholds):
                # a record of its own: what runs share, they put into it
                state, now, runs = hidden_of(record.calls[0]), Forward(calls=record.calls), []
                for layer in range(found.depth):
                    made = executor.run_step(Run(layer), state, now)
                    require_token_axis(made, ids.shape, layer)
                    runs.append(_changes(state, made, one))
                    state = torch.where(runs[-1][..., None], made, state)
                with executor.between(found.depth, state):
                    logits = call()
                for own, ran in zip(used[place], runs, strict=True):
                    own.extend((ran.cpu()[:, :-1] & keep).sum(-1).tolist())
                rise[place] += torch.where(keep, token_nll(logits, ids) - nll, 0.0).sum(-1).tolist()
                same[place] += (compare_logits(dense, logits)[1][:, :-1] & keep).sum(-1).tolist()
        counts += keep.sum(-1).tolist()
        if progress is not None:
            progress(len(counts), len(data), WHAT)
    require_scored(sum(counts), data)
    rows = []
    for one, layers, rises, agreed in zip(thresholds, used, rise, same, strict=True):
        depth = [math.fsum(own) for own in zip(*layers, strict=True)]
        rows.append([one, *ratio(depth, counts), *ratio(rises, counts), math.fsum(agreed) / sum(counts)])
    scored = thresholds.index(threshold)
    note = f"{rows[scored][1]:.1f} of {found.depth} layers run for a token, {rows[scored][3]:+.3f} nats per token"
    return mean_scores(
        "residual-oracle", "share of tokens", used[scored], counts, data, stack=found.name, removal=False,
        notes=(note,), detail={"curve": rows},
    )  # fmt: skip


def _changes(x: torch.Tensor, y: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which tokens a layer changes by a share of the threshold or more, bool [batch, tokens]."""
    added, total = (y.float() - x.float()).norm(dim=-1), y.float().norm(dim=-1)
    return (added >= threshold * total) & ((added > 0) | (threshold == 0))
