"""Cross-entropy of tokens behind masks."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy as nll

from shoal.errors import UsageError
from shoal.examples import TermExamples
from shoal.executing.mask_tokens import masked, masks_in
from shoal.healing.seen import Seen

EXAMPLES = TermExamples("masked-tokens:share=0.5", learn=("masks:count=2",))


def masked_tokens(seen: Seen, *, share: float = 0.3) -> torch.Tensor:
    """Cross-entropy of the token behind each mask, -log p(y), summed over the masks whose columns count.

    In each row of ids [batch, tokens] spans of as many tokens as the plan has masks are masked, every n-th token, so
    that a `share` of all are; mask j stands in the place of the j-th token of a span, and its column predicts the token
    behind. p is what the plan makes of that. Where the spans of a row begin moves from step to step, and is the same
    for the same row on held-out text.

    Source: S3D (Zhong & Bharadwaj, arXiv 2405.20314), its masked language modelling.

    How we differ: spans stand at equal distances; tokens behind a span see its masks in the place of its tokens, which
    a draft never does, and do not count.
    """
    vectors = masks_in(seen.sides[0].bound.tensors)
    if vectors is None:
        raise UsageError(
            "masked-tokens needs masks that learn, and there are none; let them learn (--learn masks, or --recipe s3d)",
            code="U675",
        )
    if not 0 < share < 1:
        raise UsageError(f"masked-tokens: share={share:g} must be above 0 and below 1; write share=0.3", code="U502")
    side = seen.sides[0]
    step = side.learning.step if torch.is_grad_enabled() else 0
    columns = _masked_columns(seen.ids, len(vectors), share, step)
    with masked(side.opened.model, columns, vectors):
        shown = side.show(seen.ids, seen.mask)
    return seen.over_logits(
        lambda student, _, labels: nll(student, labels, reduction="sum"),
        "masked-tokens",
        columns=columns >= 0,
        behind=shown.last,
    )


def _masked_columns(ids: torch.Tensor, masks: int, share: float, step: int) -> torch.Tensor:
    """For each token of ids [batch, tokens] the number of the mask in its place, -1 for none. The first is never
    masked: something must be known."""
    period = max(masks + 1, round(masks / share))
    behind = torch.arange(ids.shape[1], device=ids.device)[None] - 1 - ((ids.sum(-1) + step) % period)[:, None]
    return torch.where((behind >= 0) & (behind % period < masks), behind % period, -1)
