"""Which drafted tokens stand: greedy by equality, sampled by the rule that leaves the base model's distribution.

Speculative sampling (Leviathan et al., 2211.17192; Chen et al., 2302.01318): a token x drawn from q stands with
probability min(1, p(x) / q(x)); if it falls, the token is drawn from max(0, p - q), made to sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from shoal.decoding.growing_text import next_tokens


@dataclass
class Proposal:
    """The drafted tokens of one round, in order."""

    tokens: list[int] = field(default_factory=list)
    probabilities: list[torch.Tensor | None] = field(default_factory=list)
    """For each token the distribution it was drawn from, [vocabulary]; None: it was not drawn (looked up, greedy)."""
    looked_up: bool = False

    def __len__(self) -> int:
        return len(self.tokens)


def pick(scores: torch.Tensor, sample: bool) -> tuple[int, torch.Tensor | None]:
    """A token from processed scores [1, vocabulary], and the distribution it was drawn from when it was drawn."""
    token, probabilities = next_tokens(scores, sample)
    return int(token), None if probabilities is None else probabilities[0]


def accept_or_resample(
    scores: torch.Tensor, token: int | None, drawn_from: torch.Tensor | None, sample: bool
) -> tuple[int, bool]:
    """The next token given the base model's processed scores [1, vocabulary], and whether it is the drafted `token`.

    `token` None: nothing was drafted at this position.
    """
    if not sample or token is None:
        chosen = pick(scores, sample)[0]
        return chosen, chosen == token
    target = scores.softmax(-1)[0]
    proposed = drawn_from if drawn_from is not None else _certain(target, token)
    if float(torch.rand(())) * float(proposed[token]) < float(target[token]):
        return token, True
    left = (target - proposed).clamp(min=0)
    # rounding may leave nothing where the two are the same: then the target itself is the distribution that is left
    return int(torch.multinomial(left if bool(left.sum() > 0) else target, 1)), False


def _certain(like: torch.Tensor, token: int) -> torch.Tensor:
    out = torch.zeros_like(like)
    out[token] = 1
    return out
