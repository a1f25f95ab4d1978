"""Draft several tokens for one place, and verify all branches in one pass."""

from __future__ import annotations

import math
import re

from shoal.errors import UsageError
from shoal.examples import DraftExamples
from shoal.plan import Spec
from shoal.speculating.token_tree import TreeShape

MOST = 512
"""Tokens in a tree: its mask has as many rows and columns."""

EXAMPLES = DraftExamples(("tree:3x2x1+exit:2", "tree+swift:window=4", "tree:2+lookup:1+skip:0,2-3"))


def tree(*, spec: Spec, shape: str = "swift") -> TreeShape:
    """Let the layers that draft (`exit:8+tree:3x2`) draft a tree of tokens in place of a line of them.

    `shape` 3x2x1: the 3 best tokens behind the text, behind each of these the 2 best, behind each of those the best
    one: 3 + 6 + 6 tokens. `shape` swift: as many levels as tokens may be drafted; only the best token of a level is
    followed by another, and beside it stand 2, 4, 7 or 9 others, more where the draft's largest probability is lower
    (above 0.95, 0.8, 0.5, below; 0, 2, 4, 9 in sampling). Either way no token of which the draft is unsure
    (`confidence`) is followed. One pass verifies the tree: every token sees the text and those in front of it on its
    own branch, by a mask [1, 1, tokens, text + tokens]; the branch that the base model takes stays in the KV cache.

    Sampling: tokens are drawn from the draft one after the other without replacement, and judged one after the other
    by what those before them left of both distributions, so the text has the base model's.

    Source: SWIFT (Xia et al., ICLR 2025, arXiv 2410.06916), its code for the numbers; the mask is that of SpecInfer
    (Miao et al., arXiv 2305.09781).

    How we differ: the released code takes the best tokens in sampling too, and draws from what they leave.
    """
    if shape == "swift":
        return TreeShape(shape)
    widths = tuple(int(part) for part in shape.split("x")) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    tokens = sum(math.prod(widths[: n + 1]) for n in range(len(widths)))
    if not widths or 0 in widths or tokens > MOST:
        raise UsageError(
            f"a tree of the shape {shape!r} cannot be drafted; write how many tokens stand behind each one, level by "
            f"level, of at most {MOST} in all, as in tree:3x2x1, or tree:swift",
            code="U704",
        )
    return TreeShape(shape, widths)
