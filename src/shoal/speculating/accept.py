"""Which drafted tokens stand: greedy by equality, sampled by the rule that leaves the base model's distribution.

Speculative sampling (Leviathan et al., 2211.17192; Chen et al., 2302.01318): a token x drawn from q stands with
probability min(1, p(x) / q(x)); if it falls, the token is drawn from max(0, p - q), made to sum to one. Of several
tokens, drawn from q one after the other without replacement, the second is judged in the same way by what the first
left of p and of q, and so on (SpecInfer, 2305.09781; without replacement: Jeon et al., 2402.14160).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from shoal.decoding.growing_text import next_tokens

Candidate = tuple[int, torch.Tensor | None]
"""A drafted token and the distribution it was drawn from, [vocabulary]; None: it was not drawn (looked up, greedy)."""


@dataclass
class Proposal:
    """The drafted tokens of one round, in order. Place 0 is the text's last token, place n the n-th drafted one."""

    tokens: list[int] = field(default_factory=list)
    probabilities: list[torch.Tensor | None] = field(default_factory=list)
    """For each token the distribution it was drawn from, [vocabulary]; None: it was not drawn (looked up, greedy)."""
    looked_up: bool = False
    parents: list[int] = field(default_factory=list)
    """For each token the place that it stands behind."""

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, drawn_from: torch.Tensor | None, parent: int | None = None) -> None:
        """One more token, behind the place `parent` or else behind the token before."""
        self.parents.append(len(self.tokens) if parent is None else parent)
        self.tokens.append(token)
        self.probabilities.append(drawn_from)

    def children(self, place: int) -> list[int]:
        """The places behind `place`."""
        return [n + 1 for n, parent in enumerate(self.parents) if parent == place]

    @property
    def length(self) -> int:
        """The most tokens that stand one behind the other."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return max(depths)


def pick(scores: torch.Tensor, sample: bool) -> Candidate:
    """A token from processed scores [1, vocabulary], and the distribution it was drawn from when it was drawn."""
    token, probabilities = next_tokens(scores, sample)
    return int(token), None if probabilities is None else probabilities[0]


def candidates(scores: torch.Tensor, most: int, sample: bool) -> list[Candidate]:
    """Up to `most` different tokens to stand beside each other, by the draft's processed scores [1, vocabulary]: the
    best ones, or drawn one after the other without replacement."""
    if not sample:
        values, tokens = scores[0].topk(min(most, scores.shape[-1]))
        return [(token, None) for token in tokens[values > -torch.inf].tolist()]
    left, found = scores.softmax(-1)[0], list[Candidate]()
    while len(found) < most and bool(left.sum() > 0):
        left = left / left.sum() if found else left
        token = int(torch.multinomial(left, 1))
        found.append((token, left))
        left = left.clone()
        left[token] = 0
    return found


def accept_or_resample(
    scores: torch.Tensor, token: int | None, drawn_from: torch.Tensor | None, sample: bool
) -> tuple[int, bool]:
    """The next token given the base model's processed scores [1, vocabulary], and whether it is the drafted `token`.

    `token` None: nothing was drafted at this position.
    """
    chosen, which = accept_one_of(scores, [] if token is None else [(token, drawn_from)], sample)
    return chosen, which is not None


def accept_one_of(scores: torch.Tensor, drafted: Sequence[Candidate], sample: bool) -> tuple[int, int | None]:
    """The next token given the base model's processed scores [1, vocabulary], and which of the `drafted` it is.

    `drafted`: different tokens, each drawn from what was left of the draft's distribution behind those before it.
    """
    if not sample or not drafted:
        chosen = pick(scores, sample)[0]
        return chosen, next((n for n, (token, _) in enumerate(drafted) if token == chosen), None)
    target = scores.softmax(-1)[0]
    for number, (token, drawn_from) in enumerate(drafted):
        proposed = drawn_from if drawn_from is not None else _certain(target, token)
        if float(torch.rand(())) * float(proposed[token]) < float(target[token]):
            return token, number
        left = (target - proposed).clamp(min=0)
        # rounding may leave nothing where the two are the same: then the target itself is the distribution that is left
        target = left / left.sum() if bool(left.sum() > 0) else target
    return int(torch.multinomial(target, 1)), None


def largest_chance(scores: torch.Tensor, probabilities: torch.Tensor | None = None) -> float:
    """The largest probability by processed scores [1, vocabulary], read off `probabilities` where they are known."""
    if probabilities is not None:
        return float(probabilities.max())
    return float((scores.max() - scores.logsumexp(-1)).exp())


def _certain(like: torch.Tensor, token: int) -> torch.Tensor:
    out = torch.zeros_like(like)
    out[token] = 1
    return out
