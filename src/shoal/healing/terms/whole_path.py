"""What the tokens would say if a policy left nothing out."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import cross_entropy as nll

from shoal.errors import UsageError
from shoal.evaluation.distances import one_minus_cosine
from shoal.examples import TermExamples
from shoal.healing.seen import Seen

EXAMPLES = TermExamples(text="whole-path:by=cosine", policy="unified")


def whole_path(seen: Seen, *, by: Literal["labels", "cosine"] = "labels") -> torch.Tensor:
    """A second forward in which a policy takes all tokens for a prompt, summed over the tokens that count.

    `by` labels: cross-entropy of the next token there, -log p(y); cosine: 1 - cos(s, t), s and t [tokens, hidden] the
    states in front of norm and head where tokens are left out as the policy says, and where none is. Gradients flow
    through both forwards. For policies that spare what the model writes and run prompts whole, as `unified`.

    Source: the two further losses of the released code of Liu et al. 2024 (unified layer skipping, arXiv 2404.06954).

    How we differ: 1 is added to the cosine's negative, which changes no gradient; whether theirs flows through the
    whole forward is not known.
    """
    if seen.sides[0].deciding is None:
        raise UsageError(
            "whole-path is of what a policy leaves out, and there is none; use the recipe unified-tune", code="U675"
        )
    if by == "labels":
        return seen.whole.over_logits(lambda student, _, labels: nll(student, labels, reduction="sum"), "whole-path")
    spared, whole = (one.student.last[seen.counts].float() for one in (seen, seen.whole))
    return one_minus_cosine(spared, whole).sum()
