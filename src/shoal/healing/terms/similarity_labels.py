"""Routers learn what a layer changes."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from shoal.errors import UsageError
from shoal.evaluation.distances import one_minus_cosine
from shoal.examples import TermExamples
from shoal.healing.seen import Seen
from shoal.plan.steps import runs

EXAMPLES = TermExamples(text="similarity-labels:scope=all", policy="routed", learn=("gates",))


def similarity_labels(seen: Seen, *, capacity: float = 0.8, scope: Literal["layer", "all"] = "layer") -> torch.Tensor:
    """Binary cross-entropy of each score with "the layer changes this token", meaned over gates, summed over tokens.

    The change of a token is 1 - cos(x, f(x)) over the layer f behind the gate, without gradients; its label is 1 when
    it is among the `capacity` share of largest ones of its sequence, at the same gate (`scope` layer) or at all gates.

    Source: Tan et al. 2024 (DLO, arXiv 2407.11030), whose routers learn from the cosine of a layer's input and output.

    How we differ: a gate behind which nothing was
    called, as on held-out text, where a layer that no token needs is left out, says nothing.
    """
    if not 0 < capacity <= 1:
        raise UsageError(
            f"similarity-labels: capacity={capacity:g} is no share of the tokens; write capacity=0.8", code="U502"
        )
    scores = seen.noted("scores", "similarity-labels").float()  # [gates, batch, tokens]
    gates = [run.gate for run in runs(seen.plan.steps(seen.stack)) if run.gate is not None]
    called = [number for number, gate in enumerate(gates) if gate in seen.student.gated]
    if not called:
        return scores.sum() * 0.0
    with torch.no_grad():
        records = [seen.student.gated[gates[number]] for number in called]
        changes = torch.stack([one_minus_cosine(one.input, one.output) for one in records]).to(scores)
        changes = changes.masked_fill(~seen.counts, -1.0)
        counted = seen.counts.sum(-1, keepdim=True)  # [batch, 1]
        if scope == "all":
            ranks = _ranks(changes.transpose(0, 1).flatten(1)).unflatten(1, (len(called), -1)).transpose(0, 1)
            counted = counted * len(called)
        else:
            ranks = _ranks(changes)
        labels = (ranks < (capacity * counted).round().clamp(min=1)).to(scores)
    return bce(scores[called], labels, reduction="none").mean(0)[seen.counts].sum()


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """The place of each value among those of the last dimension, the largest being 0."""
    return values.argsort(-1, descending=True).argsort(-1)
