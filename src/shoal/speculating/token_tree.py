"""A tree of drafted tokens: its shape, its places, and the inputs by which one pass of the model runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from shoal.speculating.accept import Proposal
from shoal.speculating.forward_inputs import FeedsForward

BOUNDS = ((0.95, 3), (0.8, 5), (0.5, 8), (0.0, 10))
"""SWIFT: how many tokens stand beside each other where the draft's largest probability is above this."""
BOUNDS_SAMPLED = ((0.95, 1), (0.8, 3), (0.5, 5), (0.0, 10))


@dataclass(frozen=True)
class TreeShape:
    """How many tokens are drafted behind each token of a level, and which of them are followed by more."""

    text: str
    widths: tuple[int, ...] | None = None
    """Level by level; None: SWIFT's numbers, by how sure the draft is, on any number of levels."""

    @property
    def follows_all(self) -> bool:
        """Whether every token is followed by the next level; otherwise the draft's first choice alone is."""
        return self.widths is not None

    def levels(self, most: int) -> int:
        """Levels of a draft of at most `most` tokens one behind the other."""
        return most if self.widths is None else min(most, len(self.widths))

    def width(self, level: int, largest: float, sample: bool) -> int:
        """Tokens behind one of level `level` - 1, where the draft's largest probability is `largest`."""
        if self.widths is not None:
            return self.widths[level]
        bounds = BOUNDS_SAMPLED if sample else BOUNDS
        return next((width for bound, width in bounds if largest > bound), bounds[-1][1])


@dataclass
class TokenTree:
    """The last token of a text (place 0) and drafted tokens, each behind one in front of it, in the order in which the
    model is given them."""

    proposal: Proposal = field(default_factory=Proposal)
    above: list[list[int]] = field(default_factory=lambda: [[0]])
    """For each place the places that its token sees, from place 0 to its own."""

    def add(self, token: int, drawn_from: torch.Tensor | None, parent: int) -> int:
        """Put a token behind the place `parent`; returns its place."""
        place = len(self.above)
        self.proposal.add(token, drawn_from, parent)
        self.above.append([*self.above[parent], place])
        return place

    def path(self, place: int) -> list[int]:
        """The drafted tokens from the text to `place`."""
        return [self.proposal.tokens[one - 1] for one in self.above[place][1:]]

    def visible(self, first: int, device: torch.device) -> torch.Tensor:
        """bool [places from `first` on, places]: which token sees which."""
        rows = torch.zeros(len(self.above) - first, len(self.above), dtype=torch.bool, device=device)
        for row, places in enumerate(self.above[first:]):
            rows[row, places] = True
        return rows

    def depths(self, first: int, device: torch.device) -> torch.Tensor:
        """int64 [places from `first` on]: how far each token stands behind place 0."""
        return torch.tensor([len(places) - 1 for places in self.above[first:]], device=device)


class TreeInputs:
    """Arguments of one forward over the last tokens of a tree: the position of each is that of its level, and it sees
    the text and the tokens in front of it on its own branch."""

    def __init__(self, model: PreTrainedModel, feed: FeedsForward, tree: TokenTree, text: int) -> None:
        """`text`: tokens of the text, the one at place 0 included."""
        self.feed, self.tree, self.text = feed, tree, text
        self.additive = mask_is_additive(model)
        self.dtype = model.dtype

    def __call__(self, ids: torch.Tensor, new: int, cache: Cache) -> dict[str, Any]:
        """As `ForwardInputs`; `ids` are the text and the whole tree so far, place by place, [1, tokens]."""
        inputs = self.feed(ids, new, cache)
        first = len(self.tree.above) - new
        told = inputs.get("attention_mask")
        before = torch.ones(1, self.text - 1, device=ids.device) if told is None else told[:, : self.text - 1]
        seen = torch.cat([before.bool().expand(new, -1), self.tree.visible(first, ids.device)], -1)[None, None]
        inputs["attention_mask"] = self._additive(seen) if self.additive else seen
        if (positions := inputs.get("position_ids")) is not None:
            in_line = torch.arange(first, first + new, device=ids.device)
            inputs["position_ids"] = positions - in_line + self.tree.depths(first, ids.device)
        return inputs

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        hidden = torch.finfo(self.dtype).min
        return torch.zeros_like(seen, dtype=self.dtype).masked_fill_(~seen, hidden)


def mask_is_additive(model: PreTrainedModel) -> bool | None:
    """Whether the attention takes a mask to add (eager) or one of bools (sdpa); None: no mask of ours."""
    used = getattr(model.config.get_text_config(), "_attn_implementation", None)
    return {"eager": True, "sdpa": False}.get(str(used))
