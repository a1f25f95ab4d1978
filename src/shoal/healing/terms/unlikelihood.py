"""Unlikelihood of what repeats the text before it."""

from __future__ import annotations

import torch

from shoal.errors import UsageError
from shoal.examples import TermExamples
from shoal.healing.repeats import repeats
from shoal.healing.seen import Seen

_FLOOR = 1e-6
"""The least that 1 - q(y) counts as: at q(y) = 1 the formula is infinite."""

EXAMPLES = TermExamples(text="unlikelihood:ngram=1")


def unlikelihood(seen: Seen, *, ngram: int = 4) -> torch.Tensor:
    """The unlikelihood -log(1 - q(y)) of each token y that ends an n-gram which stands earlier in its row.

    q = softmax of the student's logits [tokens, vocabulary]. Meant for text that the plan itself writes (`own`, see
    the recipe `less-repetition`): there it takes away from what starts a loop. It says nothing of any other token.

    Source: the sequence-level objective (equations 6 and 7) of Welleck et al. 2019 (arXiv 1908.04319).

    How we differ: only the last token of a repeated n-gram counts, not each of its tokens, since the first ones are
    read before anything repeats.
    """
    if ngram < 1:
        raise UsageError(f"unlikelihood: ngram={ngram} is none; write unlikelihood:ngram=4", code="U502")

    def formula(student: torch.Tensor, _: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        likely = student.softmax(-1).gather(-1, labels[:, None])
        return -(1 - likely).clamp(min=_FLOOR).log().sum()

    return seen.over_logits(formula, "unlikelihood", columns=repeats(seen.ids, ngram))
