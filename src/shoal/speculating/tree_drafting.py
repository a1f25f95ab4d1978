"""A tree of tokens, drafted level by level."""

from __future__ import annotations

import torch

from shoal.speculating.accept import Candidate, Proposal, candidates, largest_chance
from shoal.speculating.draft_runner import Draft
from shoal.speculating.generation_settings import GenerationSettings
from shoal.speculating.lengths import Length
from shoal.speculating.token_tree import TokenTree, TreeInputs, TreeShape


def draft_tree(
    draft: Draft, shape: TreeShape, ids: torch.Tensor, most: int, rules: GenerationSettings, length: Length
) -> Proposal:
    """A tree behind the text `ids`, [1, tokens], of at most `most` levels, the tokens that the draft has run in front
    of those that it has not. One pass of the draft for each level; a token of which it was unsure is followed by none.
    """
    tree = TokenTree()
    draft.feed = TreeInputs(draft.runner.model, draft.feed, tree, ids.shape[1])
    levels, above, last = shape.levels(most), [0], list[tuple[int, Candidate]]()
    for level in range(levels):
        followed = list[tuple[int, Candidate]]()
        logits = draft.behind(_longer(ids, tree.proposal.tokens), len(above))
        for place, row in zip(above, logits, strict=True):
            scores = rules.processed(_longer(ids, tree.path(place)), row[None])
            largest = largest_chance(scores)
            ends = level + 1 == levels or length.stops(largest)
            for number, one in enumerate(candidates(scores, shape.width(level, largest, rules.sample), rules.sample)):
                (last if ends or (number and not shape.follows_all) else followed).append((place, one))
        if not followed:
            break
        above = [tree.add(*one, parent) for parent, one in followed]
    for parent, one in last:
        tree.add(*one, parent)
    draft.unrun = len(last)
    return tree.proposal


def _longer(ids: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    return torch.cat([ids, ids.new_tensor([tokens])], -1) if tokens else ids
