"""A causal stand-in of top-k routing."""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from shoal.errors import UsageError
from shoal.examples import TermExamples
from shoal.healing.seen import Seen

EXAMPLES = TermExamples(text="capacity-labels", policy="routed:relax=top-k", learn=("gates",))


def capacity_labels(seen: Seen, *, capacity: float = 0.5) -> torch.Tensor:
    """Binary cross-entropy of causal scores with "it is among its row's highest", meaned over gates.

    A token's label is 1 when its score is one of the `capacity` share of highest scores in its row, else 0. What learns
    is the causal score of gates that rank (`routed:relax=top-k`), which reads the state without gradients and says
    without the tokens to come what a ranking of all of them would.

    Source: Raposo et al. 2024 (Mixture-of-Depths, arXiv 2404.02258, section 3.5): the second of its two ways.
    """
    if not 0 < capacity <= 1:
        raise UsageError(
            f"capacity-labels: capacity={capacity:g} is no share of the tokens; write capacity=0.5", code="U502"
        )
    scores = seen.noted("scores", "capacity-labels").float()  # [gates, batch, tokens]
    count = max(1, round(capacity * scores.shape[-1]))
    labels = torch.zeros_like(scores).scatter(-1, scores.detach().topk(count, -1).indices, 1.0)
    causal = seen.noted("causal", "capacity-labels").float()
    found = bce(causal, labels, reduction="none")[:, seen.counts]
    return found.mean(0).sum()
