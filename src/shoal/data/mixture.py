"""How many windows each source of a mixture gives, and in which order they come."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from shoal.errors import DataError


def apportion(count: int, shares: Sequence[float]) -> list[int]:
    """`count` windows by `shares` (which add up to 1), the largest remainders rounded up. Raises D490 for a share of
    none."""
    exact = [count * share for share in shares]
    found = [math.floor(one + 1e-9) for one in exact]
    rest = sorted(range(len(shares)), key=lambda n: (found[n] - exact[n], n))
    for n in rest[: count - sum(found)]:
        found[n] += 1
    if 0 in found:
        needed = math.ceil(1 / min(shares))
        raise DataError(
            f"of {count} windows a weight of {min(shares):.2g} of the whole is none; use --limit {needed} or more",
            code="D490",
        )
    return found


def fitting(quotas: Sequence[int], counts: Sequence[int], shares: Sequence[float]) -> list[int]:
    """The most windows in these shares, `quotas` at most, that sources of `counts` windows can give. Raises D490."""
    if len(quotas) == 1:
        return [min(quotas[0], counts[0])]
    total = sum(quotas)
    found = list(quotas)
    while any(quota > count for quota, count in zip(found, counts, strict=True)):
        # at the first step far enough down, then one at a time past what rounding adds
        limit = min(math.floor((count + 1) / share) for count, share in zip(counts, shares, strict=True))
        total = min(total - 1, limit)
        found = apportion(total, shares)
    return found


def interleaved(chosen: Sequence[Sequence[int]], seed: int) -> list[tuple[int, int]]:
    """(source, window) of all chosen windows: sources in an order drawn with `seed`, the windows of each in theirs."""
    order = [source for source, windows in enumerate(chosen) for _ in windows]
    if len(chosen) > 1:
        random.Random(seed).shuffle(order)
    each = [iter(windows) for windows in chosen]
    return [(source, next(each[source])) for source in order]
