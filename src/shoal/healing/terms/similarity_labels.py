"""Routers learn what a layer changes."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from shoal.errors import UsageError
from shoal.evaluation.distances import one_minus_cosine
from shoal.healing.seen import Seen
from shoal.plan.steps import runs


def similarity_labels(seen: Seen, *, capacity: float = 0.8, scope: Literal["layer", "all"] = "layer") -> torch.Tensor:
    """Binary cross-entropy of each score with "the layer changes this token", meaned over gates, summed over tokens.

    The change of a token is 1 - cos(x, f(x)) over the layer f behind the gate, without gradients; its label is 1 when
    it is among the `capacity` share of largest ones, of the same gate (`scope` layer) or of all gates together.

    Source: Tan et al. 2024 (DLO, arXiv 2407.11030), whose routers learn from the cosine of a layer's input and output.

    How we differ: shares are taken over the micro-batch and not over each sequence. A gate behind which nothing was
    called, as on held-out text, where a layer that no token needs is left out, says nothing.
    """
    if not 0 < capacity <= 1:
        raise UsageError(
            f"similarity-labels: capacity={capacity:g} is no share of the tokens; write capacity=0.8", code="U502"
        )
    scores = seen.noted("scores", "similarity-labels")[:, seen.counts].float()  # [gates, tokens]
    deciding = seen.sides[0].deciding
    assert deciding is not None
    gates = [run.gate for run in runs(seen.plan.steps(seen.stack)) if run.gate is not None]
    called = [number for number, gate in enumerate(gates) if gate in seen.student.gated]
    if not called:
        return scores.sum() * 0.0
    with torch.no_grad():
        records = [seen.student.gated[gates[number]] for number in called]
        changes = torch.stack([one_minus_cosine(one.input, one.output)[seen.counts] for one in records])
        whole = changes if scope == "layer" else changes.flatten()[None]
        labels = torch.zeros_like(whole)
        labels.scatter_(-1, whole.topk(max(1, round(capacity * whole.shape[-1])), -1).indices, 1.0)
    wanted = labels.reshape(changes.shape).to(scores)
    return bce(scores[called], wanted, reduction="none").mean(0).sum()
