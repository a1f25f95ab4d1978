"""What a draft of several tokens in one pass is worth, and which share of the layers it should skip."""

from __future__ import annotations

import math
from collections.abc import Callable

from shoal.errors import UsageError

Acceptance = Callable[[float], float]
"""The share of the layers that is skipped -> the probability that a drafted token stands behind ones that do."""


def speed_up(tokens: int, skipped: float, acceptance: float) -> float:
    """Tokens for the time of one pass of the whole model, IF(g, b) = (1 - a^(g + 1)) / ((1 - a) (2 - b)).

    g = `tokens` are drafted in one pass without the share b = `skipped` of the layers, which takes 1 - b of a whole
    pass, and verified in one of 1; a = `acceptance` of each, so 1 + a + ... + a^g of them stand. A pass is taken to
    last as long for several tokens as for one, as where memory bounds it, and norm and head to last no time.

    Source: S3D (Zhong & Bharadwaj, arXiv 2405.20314), its speed-up factor IF(gamma, beta).

    How we differ: derived from the mechanism, as the paper's text was not at hand. Raises U706 for what is no share.
    """
    if tokens < 1 or not (0 <= skipped <= 1 and 0 <= acceptance <= 1):
        raise UsageError(
            f"s3d has no speed for {tokens} tokens, a share of {skipped} skipped and an acceptance of {acceptance}; "
            "give 1 token or more, and shares from 0 to 1",
            code="U706",
        )
    return sum(acceptance**n for n in range(tokens + 1)) / (2 - skipped)


def acceptance_by(strength: float) -> Acceptance:
    """a(b) = 1 - b^U with U = `strength`: 1 where nothing is skipped, 0 where all is; a greater U bears more.

    How we differ: one parameter as in S3D (its a(b; U)), whose own form was not at hand.
    """
    return lambda skipped: 1 - skipped**strength


def strength_of(skipped: float, acceptance: float) -> float:
    """The U of `acceptance_by` that goes through one measured point, both shares between 0 and 1."""
    if not (0 < skipped < 1 and 0 < acceptance < 1):
        raise UsageError(
            f"an acceptance of {acceptance} with a share of {skipped} skipped tells nothing of other shares; give that "
            "of a draft which skips some layers and is right at times",
            code="U706",
        )
    return math.log(1 - acceptance) / math.log(skipped)


def best_skip(depth: int, tokens: int, acceptance: Acceptance) -> tuple[int, float]:
    """How many of `depth` layers to skip for the greatest `speed_up`, at least one being left, and that speed-up."""
    found = ((layers, speed_up(tokens, layers / depth, acceptance(layers / depth))) for layers in range(depth))
    return max(found, key=lambda one: one[1])
