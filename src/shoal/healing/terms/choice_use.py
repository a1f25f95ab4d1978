"""Which of several candidates are taken, and how clearly."""

from __future__ import annotations

import math
from typing import Literal

import torch

from shoal.deciding.places import PlacePolicy
from shoal.errors import UsageError
from shoal.examples import TermExamples
from shoal.healing.seen import Seen

EXAMPLES = TermExamples(text="choice-use:by=exploration", plan="0,1,4,5", policy="assembled:part=layer",
                        learn=("gates",))  # fmt: skip


def choice_use(
    seen: Seen, *, by: Literal["exploration", "exploitation"] = "exploration", clamp: float = 0.05
) -> torch.Tensor:
    """KL of the uniform distribution to what a policy takes, meaned over its places, for each token that counts.

    p [candidates] is what the router of a place (`assembled`) or the predictor of orders (`ordered`) says of a token.
    By exploration: KL(u || mean p) = -mean_k log(mean p)_k - log K, which is least where all K candidates are taken
    alike; the mean over tokens is that of the step before (`Averages`), so that the gradient does not depend on how a
    step is cut. By exploitation: -KL(u || c), c the p of each token held within `clamp` and 1 - (K - 1) `clamp`, which
    is least where every choice is clear.

    Source: Zhu et al. 2021 (IOT, arXiv 2103.03457), with weights 0.1 and 0.01, by its released code.

    How we differ: a sequence counts with its tokens that count.
    """
    deciding = seen.sides[0].deciding
    policy = None if deciding is None else deciding.policy
    if not isinstance(policy, PlacePolicy):
        raise UsageError(
            "choice-use reads the choices of the policies ordered and assembled, and none of them decides here; use a "
            "recipe that has one, as iot or mom",
            code="U675",
        )
    noted = seen.noted("choices", "choice-use")[:, seen.counts].float()  # [candidates of all places, tokens]
    sizes = [len(numbers) for numbers in policy.places.values()]
    if not 0 <= clamp < 1 / max(sizes) and by == "exploitation":
        raise UsageError(
            f"choice-use: clamp={clamp:g} leaves no choice among {max(sizes)} candidates; write "
            f"choice-use:by=exploitation,clamp={0.1 / max(sizes):.2g}",
            code="U502",
        )
    count = noted.new_tensor([size for size in sizes for _ in range(size)])[:, None]
    if by == "exploitation":
        held = torch.minimum(noted.clamp(min=clamp), 1 - (count - 1) * clamp)
        return (held.log() / count).sum(0).add(sum(map(math.log, sizes))).sum() / len(sizes)
    mean = seen.averages.of("choice-use", noted * count, 1.0)[:, None].clamp(min=1e-6) / count
    value = -(mean.log() / count).sum() - sum(map(math.log, sizes))
    slope = -1 / (count * mean)
    # the value of F(mean p), with the gradient that it has for each token
    return (value + (slope * (noted - noted.detach())).sum(0)).sum() / len(sizes)
