"""Choices that are drawn learn by what came of them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.nn.functional import cross_entropy as nll

from shoal.errors import UsageError
from shoal.examples import TermExamples
from shoal.healing.seen import Seen

EXAMPLES = TermExamples(text="reinforce:reward=loss,baseline=mean", policy="routed:grain=row", learn=("gates",))


def reinforce(
    seen: Seen,
    *,
    reward: Literal["loss", "right"] = "loss",
    cost: float = 1.0,
    baseline: Literal["mean", "greedy"] = "mean",
) -> torch.Tensor:
    """Policy gradient of choices that were drawn: -(R - b) log pi for each sequence, times its tokens that count.

    pi is the probability of a row's drawn choices, a product over gates (of one answer for each row, grain=row; of
    answers for each token their mean). R by `reward` loss: minus the row's mean cross-entropy, minus `cost` times the
    share k of gates that are open; right: a (1 - k^2) - (1 - a) `cost`, a the share of its next tokens that are
    predicted right. `baseline` b: the mean R of the step before, or the R of the row's greedy choices (self-critical),
    which costs a forward. On held-out text, where the likeliest choices are taken, the value is -R.

    Source: loss: Wang et al. 2018 (SkipNet, arXiv 1711.09485); right, greedy: Wu et al. 2018 (BlockDrop, arXiv
    1711.08393), where an image is right or wrong as a whole.
    """
    if cost < 0:
        raise UsageError(f"reinforce: cost={cost:g} is below 0; write reinforce:cost=1", code="U502")
    scores, drawn = seen.noted("scores", "reinforce").float(), seen.noted("gates", "reinforce")
    counts = seen.counts.sum(-1).clamp(min=1)
    reached = _rewards(seen, drawn.detach(), reward, cost)
    if not torch.is_grad_enabled():
        return -(reached * counts).sum()
    likely = torch.where(drawn.detach() > 0, scores, -scores)
    log_pi = (torch.nn.functional.logsigmoid(likely).sum(0) * seen.counts).sum(-1) / counts
    if baseline == "greedy":
        before = _greedy(seen, reward, cost)
    else:
        known = seen.averages.of(f"reinforce {reward} {cost}", reached.repeat_interleave(counts)[None], math.nan)
        before = torch.where(known.isnan(), reached, known)  # the first step knows no mean yet, and moves nothing
    return -((reached - before) * log_pi * counts).sum()


def _rewards(seen: Seen, drawn: torch.Tensor, reward: str, cost: float) -> torch.Tensor:
    """R of each row, [batch], without gradients; `drawn` [gates, batch, tokens]."""
    told: list[torch.Tensor] = []

    def formula(student: torch.Tensor, _: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        right = student.argmax(-1) == labels
        told.append(right.float() if reward == "right" else nll(student, labels, reduction="none"))
        return student.new_zeros(())

    with torch.no_grad():
        seen.over_logits(formula, "reinforce")
    counts = seen.counts.sum(-1).clamp(min=1)
    each = torch.zeros_like(seen.counts, dtype=torch.float32)
    each[seen.counts] = torch.cat(told)
    mean = each.sum(-1) / counts
    open_ = ((drawn > 0).float().mean(0) * seen.counts).sum(-1) / counts
    if reward == "right":
        return mean * (1 - open_.square()) - (1 - mean) * cost
    return -mean - cost * open_


def _greedy(seen: Seen, reward: str, cost: float) -> torch.Tensor:
    """R of the likeliest choices of each row, [batch]."""
    side, before = seen.sides[0], seen.sides[0].learning.ledger
    kept = {name: list(values) for name, values in before.items()}
    with torch.no_grad():  # where no gradient is wanted nothing is drawn
        other = Seen(side, None, seen.ids, seen.mask, seen.labels, seen.averages)
        found = _rewards(other, other.noted("gates", "reinforce"), reward, cost)
    before.update(kept)
    return found
