"""Several tokens drafted in one pass: behind the text stand mask tokens, and each predicts the token behind its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.executing.mask_tokens import masked, mean_embedding
from shoal.plan.steps import Step
from shoal.speculating.accept import Proposal, largest_chance, pick
from shoal.speculating.chooser import Fixed
from shoal.speculating.draft_runner import Draft
from shoal.speculating.generation_settings import GenerationSettings
from shoal.speculating.lengths import Length


@dataclass(frozen=True)
class Masked(Fixed):
    """Layers that draft `tokens` tokens in one pass: the last token of the text predicts the first of them, and
    `tokens` - 1 masks behind it the others."""

    steps: tuple[Step, ...]
    tokens: int
    masks: torch.Tensor | None = None
    """[at least tokens - 1, hidden]; None: the mean embedding for all."""

    @property
    def most(self) -> int:  # type: ignore[override]
        """Tokens to draft at most."""
        return self.tokens


def draft_masked(
    draft: Draft, chooser: Masked, ids: torch.Tensor, most: int, rules: GenerationSettings, length: Length
) -> Proposal:
    """`most` tokens behind the text `ids`, [1, tokens], or fewer behind one of which the draft is unsure."""
    count = most - 1
    text = torch.cat([ids, ids[:, -1:].expand(1, count)], -1)  # which token stands under a mask does not matter
    columns = torch.tensor([[-1, *range(count)]])
    model, opened = draft.runner.model, draft.runner.opened
    vectors = chooser.masks
    if vectors is None:
        vectors = opened.remember("mean embedding", lambda: mean_embedding(model)).expand(max(1, count), -1)
    with masked(model, columns, vectors):
        logits = draft.behind(text, most)
    proposal, path = Proposal(), ids
    for row in logits:
        scores = rules.processed(path, row[None])
        token, probabilities = pick(scores, rules.sample)
        proposal.add(token, probabilities)
        path = torch.cat([path, path.new_tensor([[token]])], -1)
        if length.looks and length.stops(largest_chance(scores, probabilities)):
            break
    return proposal


def middle(depth: int, layers: int) -> Sequence[int]:
    """The `layers` layers in the middle of `depth`; of an odd rest one more stands behind them."""
    first = (depth - layers) // 2
    return range(first, first + layers)
