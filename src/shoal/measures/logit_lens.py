"""Logit lens: from which layer on the model knows what it will say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from shoal.evaluation.agreement import compare_logits
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.scoring import logits_of, require_context, require_scored, token_nll, windows
from shoal.executing.bind import bind
from shoal.executing.inputs import require_whole
from shoal.executing.recorder import Outputs
from shoal.models.evaluating import evaluating
from shoal.models.opened import open_model
from shoal.scores import Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores

TRAITS = Traits(null="none", least=False)


def logit_lens(
    model: Any, data: Data, *, stack: str | None = None, batch: int = 1, progress: Progress | None = None
) -> Scores:
    """The share of tokens for which final norm and head, put behind layer i, would choose another token than the model.

    d_i = E_t[ argmax_v q_i,t(v) != argmax_v p_t(v) ], p_t [vocab] the model's distribution and q_i,t [vocab] the one
    that its own norm and head make of the output of layer i; 0 for the last layer. The detail holds `kl`, KL(p || q_i)
    in nats per token by layer; `nll`, -log q_i of the text's own next token in nats; `saturation`, the share of tokens
    whose first choice stays the same from that layer on and not from the one before; and `depth`, the mean of that
    layer with its standard error. A diagnostic: it says where a model may leave early, not which layer may go.

    Source: nostalgebraist 2020 (the logit lens); saturation: Geva et al. 2022 (arXiv 2203.14680).

    How we differ: whatever the family puts behind its last layer (a scale, a soft cap) is what is put behind layer i,
    as the stock forward runs it; standard errors are over sequences. Cost: one pass, and the head and one layer more
    per layer; memory: the layers' outputs of one batch. Raises U507 while a plan is running.
    """
    require_whole(model, "the logit lens", stack)
    require_context(model, data.ids.shape[1])
    found, whole = open_model(model).stack(stack), bind(model)
    executor = whole.executor(found.name)
    changed: list[list[float]] = [[] for _ in range(found.depth)]
    divergence = torch.zeros(found.depth, dtype=torch.float64)
    loss, settled = torch.zeros_like(divergence), torch.zeros_like(divergence)
    depths: list[float] = []
    counts: list[int] = []
    for ids, mask, keep in windows(data, batch, None, "logit lens"):
        outputs, agree = Outputs(), []
        with evaluating(model), whole.running():
            with executor.recording(outputs):
                dense = logits_of(model, ids, mask)
            for layer in range(found.depth):
                with executor.between(found.depth, outputs.states.pop(layer)):
                    read = logits_of(model, ids, mask)
                kl, same = compare_logits(dense, read)
                loss[layer] += torch.where(keep, token_nll(read, ids), 0.0).sum()
                agree.append(same[:, :-1])
                changed[layer] += (keep & ~same[:, :-1]).sum(-1).tolist()
                divergence[layer] += torch.where(keep, kl[:, :-1], 0.0).sum()
                if progress is not None:
                    progress(len(counts) * found.depth + (layer + 1) * len(ids), len(data) * found.depth, "logit lens")
        # the first layer from which all agree: as many as do not agree with all that follow
        first = (~torch.stack(agree).flip(0).cummin(0).values).sum(0)
        settled += torch.bincount(first[keep].clamp(max=found.depth - 1), minlength=found.depth)
        depths += map(float, torch.where(keep, first, 0).sum(-1))
        counts += keep.sum(-1).tolist()
    total = sum(counts)
    require_scored(total, data)
    depth = mean_scores("depth", "layers", [depths], counts, data, stack=found.name)
    return mean_scores(
        "logit-lens", "share of tokens", changed, counts, data, stack=found.name, removal=False,
        notes=(f"the first choice stays from layer {depth.values[0]:.1f} on, mean over tokens",),
        detail={
            "kl": (divergence / total).tolist(),
            "nll": (loss / total).tolist(),
            "saturation": (settled / total).tolist(),
            "depth": [depth.values[0], math.nan if depth.errors[0] is None else depth.errors[0]],
        },
    )  # fmt: skip
