"""Which tokens repeat what stands before them."""

from __future__ import annotations

import torch


def repeats(ids: torch.Tensor, ngram: int) -> torch.Tensor:
    """The columns whose next token ends an n-gram that stands earlier in its row, bool [batch, tokens]."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(ids.tolist()):
        known = set[tuple[int, ...]]()
        for end in range(ngram, len(tokens) + 1):
            piece = tuple(tokens[end - ngram : end])
            # the column before the last token of the n-gram predicts that token
            found[row, max(end - 2, 0)] = piece in known
            known.add(piece)
    return found
