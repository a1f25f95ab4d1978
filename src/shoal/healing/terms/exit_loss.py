"""Cross-entropy at the exits."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy as nll

from shoal.errors import UsageError
from shoal.healing.exits import Weights, check_of_exits, open_exits, places_of, weights_of
from shoal.healing.seen import Seen

TRAINS_WHOLE = True
CHECK_PLAN = check_of_exits("exit-loss", at="every:1")


def exit_loss(
    seen: Seen, *, by: Weights = "layerskip", scale: float = 0.2, which: str = "all", at: str = "every:1"
) -> torch.Tensor:
    """Cross-entropy of the next token at every exit, sum over l of e(l) -log p_l(y), summed over tokens that count.

    p_l is what final norm and head make of the state behind the plan's layer l; the last l is the end of the model.
    e(l) adds up to 1 over the exits that count in a step. `by` layerskip: e(l) is proportional to `scale` (1 + ... + l)
    for all but the last, and L - 1 + `scale` (1 + ... + (L - 2)) for that; aligned: to l, from 1; uniform. `which` all;
    rotate:R: each R-th exit, other ones in each step; gradual: from the last layer down. On held-out text all count.
    `at` every:N: behind each N-th layer of the base alone, and at the end; exits: at the plan's own exits, by their own
    heads or lenses, and at the end; l numbers what is read then.

    Source: layerskip: Elhoushi et al. 2024 (LayerSkip, arXiv 2404.16710, section 3.1.2); aligned: Jiang et al. 2024
    (arXiv 2406.14479), and with heads of their own Zhou et al. 2020 (PABEE, arXiv 2006.04152); uniform: Dabre et al.
    2020 (tied-multi transformers, arXiv 2002.08614), and with heads of their own Xin et al. 2020 (DeeBERT, arXiv
    2004.12993).

    How we differ: one exit costs a head, so a step with all of them takes several times as long: rotate. torchtune's
    `sum_l` divides by the chosen exits alone, before it adds the last; here the last one is an exit as any other.
    """
    if scale < 0:
        raise UsageError(f"exit-loss: scale={scale:g} is below 0; write exit-loss:scale=0.2", code="U502")
    places = places_of(seen, at, "exit-loss")
    learning = seen.sides[0].learning
    chosen = open_exits(len(places) + 1, which, learning.step, learning.progress, "exit-loss")
    weights = [w if on else 0.0 for w, on in zip(weights_of(len(places) + 1, by, scale), chosen, strict=True)]
    total = sum(weights)
    if total == 0:  # exit 0 alone, whose weight is 0
        return seen.student.last.sum() * 0.0
    found = []
    for place, weight in zip([*places, None], weights, strict=True):
        if weight:
            states, head = (None, "base") if place is None else place()
            found.append(weight / total * _at(seen, states, head))
    return torch.stack(found).sum()


def _at(seen: Seen, states: torch.Tensor | None, head: str) -> torch.Tensor:
    def formula(student: torch.Tensor, _: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        return nll(student, labels, reduction="sum")

    return seen.over_logits(formula, "exit-loss", behind=states, head=head)
