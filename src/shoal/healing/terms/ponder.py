"""What looping on costs."""

from __future__ import annotations

import torch

from shoal.errors import UsageError
from shoal.examples import TermExamples
from shoal.healing.seen import Seen

EXAMPLES = TermExamples(text="ponder", plan="0,1,5x3", policy="act:unit=halt", learn=("gates",))


def ponder(seen: Seen, *, threshold: float = 0.99) -> torch.Tensor:
    """N + R for each token that counts: the loops that it makes, and what is left for the last of them.

    With the halting probabilities p_n of a token, N is the first n at which p_1 + ... + p_n reaches the `threshold`, or
    the last loop, and R = 1 - (p_1 + ... + p_(N-1)). A gradient exists through R alone. `weight` is the paper's tau.

    Source: Graves 2016 (ACT, arXiv 1603.08983, equation 13).
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"ponder: threshold={threshold:g} is outside (0, 1]; write threshold=0.99", code="U502")
    halting = seen.noted("halting", "ponder")[:, seen.counts]  # [exits, tokens]
    reached = halting.detach().cumsum(0) >= threshold
    before = ~torch.cat([torch.zeros_like(reached[:1]), reached[:-1]])  # who is still looping at exit n
    loops = 1 + (~reached).sum(0)
    # what was given before the last loop: the probabilities of the exits at which it went on
    rest = 1 - (halting * (before & ~reached)).sum(0)
    return (loops + rest).sum()
