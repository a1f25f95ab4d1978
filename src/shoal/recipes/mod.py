"""Only the tokens that score highest run a layer."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage, routed


def mod(
    *, capacity: float = 0.5, layers: str = "", labels: float = 1.0, learn: str = "lora:rank=16,rate=5e-4",
    rate: float = 1e-3,
) -> Recipe:  # fmt: skip
    """In each gated layer the `capacity` share of a row's tokens runs, and only they are seen by its attention.

    The loss is KL to the whole model + `labels` x `capacity-labels`, by which a predictor beside each gate learns to
    say without later tokens what the ranking of a whole row says; behind training it decides. What a layer changes is
    multiplied by sigmoid(score), through which gates learn. `layers` (1,3,5) have gates; without them all but the
    first, where the paper has every second one.

    Source: Raposo et al. 2024 (Mixture-of-Depths, arXiv 2404.02258).

    How we differ: the paper trains from random numbers, and its weights are scores that no sigmoid bounds.
    """
    policy = routed(f"relax=top-k,capacity={capacity},scale=true,fill=mask", layers)
    terms = ("logit-kd", f"capacity-labels:capacity={capacity},weight={labels}")
    return (Stage(terms=terms, learn=("gates", learn), policy=policy, settings=Settings(rate=rate)),)
