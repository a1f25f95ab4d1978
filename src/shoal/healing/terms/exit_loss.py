"""Cross-entropy at the exits."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy as nll

from shoal.errors import UsageError
from shoal.healing.exits import Weights, depths_of, open_exits, weights_of
from shoal.healing.seen import Seen

TRAINS_WHOLE = True


def exit_loss(seen: Seen, *, by: Weights = "layerskip", scale: float = 0.2, which: str = "all") -> torch.Tensor:
    """Cross-entropy of the next token at every exit, sum over l of e(l) -log p_l(y), summed over tokens that count.

    p_l is what final norm and head make of the state behind the plan's layer l; the last l is the end of the model.
    e(l) adds up to 1 over the exits that count in a step. `by` layerskip: e(l) is proportional to `scale` (1 + ... + l)
    for all but the last, and L - 1 + `scale` (1 + ... + (L - 2)) for that; aligned: to l, from 1; uniform. `which` all;
    rotate:R: each R-th exit, other ones in each step; gradual: from the last layer down. On held-out text all count.

    Source: layerskip: Elhoushi et al. 2024 (LayerSkip, arXiv 2404.16710, section 3.1.2); aligned: Jiang et al. 2024
    (arXiv 2406.14479); uniform: Dabre et al. 2020 (tied-multi transformers, arXiv 2002.08614).

    How we differ: one exit costs a head, so a step with all of them takes several times as long: rotate. torchtune's
    `sum_l` divides by the chosen exits alone, before it adds the last; here the last one is an exit as any other.
    """
    if scale < 0:
        raise UsageError(f"exit-loss: scale={scale:g} is below 0; write exit-loss:scale=0.2", code="U502")
    layers = depths_of(seen)
    learning = seen.sides[0].learning
    chosen = open_exits(len(layers), which, learning.step, learning.progress, "exit-loss")
    weights = [w if on else 0.0 for w, on in zip(weights_of(len(layers), by, scale), chosen, strict=True)]
    total = sum(weights)
    if total == 0:  # exit 0 alone, whose weight is 0
        return seen.student.last.sum() * 0.0
    found = []
    for layer, weight in zip(layers, weights, strict=True):
        if weight:
            states = seen.student.last if layer == layers[-1] else seen.student.behind[layer]
            found.append(weight / total * _at(seen, states, last=layer == layers[-1]))
    return torch.stack(found).sum()


def _at(seen: Seen, states: torch.Tensor, *, last: bool) -> torch.Tensor:
    return seen.over_logits(
        lambda student, _, labels: nll(student, labels, reduction="sum"), "exit-loss", behind=None if last else states
    )
