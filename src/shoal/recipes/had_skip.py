"""Gates that harden on the way to a budget."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage, routed


def had_skip(
    *,
    most: float = 0.8,
    layers: str = "",
    strength: float = 100.0,
    initial_bias: float = 4.0,
    rate: float = 3e-3,
    learn: str = "lora:rank=16,rate=5e-4",
) -> Recipe:
    """A gate for each sequence at each layer, soft at first and hard in the end, held below a budget of layers.

    The loss is KL to the whole model + `strength` max(0, d - `most`)^2, d the mean share of the layers that sequences
    run. A layer counts with sigmoid(s / T), T falling from 1 to 0.05, so that the problem goes over from all gates
    open to gates that are 0 or 1.

    Source: Wang et al. 2023 (HadSkip, Findings of EMNLP 2023, 283).

    How we differ: its exact gate and penalty could not be read; a budget on the mean is held here, not one for each
    batch.
    """
    policy = routed(f"grain=row,relax=soft,final_temperature=0.05,initial_bias={initial_bias:g}", layers)
    terms = ("logit-kd", f"density:target={most},by=above,weight={strength}")
    return (Stage(terms=terms, learn=("gates", learn), policy=policy, settings=Settings(rate=rate)),)
