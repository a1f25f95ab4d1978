"""Routers that learn which tokens a layer changes."""

from __future__ import annotations

from typing import Literal

from shoal.healing.stage import Recipe, Settings, Stage, routed


def dlo(
    *, capacity: float = 0.8, layers: str = "", scope: Literal["layer", "all"] = "layer", labels: float = 1.0,
    rate: float = 1e-2, learn: str = "lora:rank=16,rate=5e-4",
) -> Recipe:  # fmt: skip
    """A gate for each token at each layer learns whether the layer changes the token; model and gates learn together.

    The loss is cross-entropy + `labels` x `similarity-labels`: the `capacity` share of tokens that a layer turns most
    shall run it. `layers` (3-28) have gates; without them all but the first.

    Source: Tan et al. 2024 (DLO, arXiv 2407.11030). Its expansion comes before: shoal fuse --with
    grow:style=interleave.

    How we differ: LoRA learns where all tensors do there.
    """
    policy = routed(layers=layers)
    terms = ("cross-entropy", f"similarity-labels:capacity={capacity},scope={scope},weight={labels}")
    return (Stage(terms=terms, learn=("gates", learn), policy=policy, settings=Settings(rate=rate)),)
