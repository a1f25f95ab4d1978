"""Cross-entropy of the next token."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy as nll

from shoal.errors import UsageError
from shoal.healing.seen import Seen


def cross_entropy(seen: Seen, *, smooth: float = 0.0) -> torch.Tensor:
    """Cross-entropy of the next token, -log p(y), summed over the tokens y that count.

    p = softmax of the student's logits [tokens, vocabulary]. `smooth` s: the label is (1 - s) of itself and s / V of
    each of the V tokens. What it learns is the text: `logit-kd` keeps more of what the model was besides.

    Source: the usual loss of language models; label smoothing is that of Szegedy et al. 2016 (arXiv 1512.00567).
    """
    if not 0 <= smooth < 1:
        raise UsageError(
            f"cross-entropy: smooth={smooth:g} must be at least 0 and below 1; write smooth=0.1", code="U502"
        )
    return seen.over_logits(
        lambda student, _, labels: nll(student, labels, reduction="sum", label_smoothing=smooth), "cross-entropy"
    )
