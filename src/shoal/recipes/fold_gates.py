"""A mask over layers is learned, and what it closes is removed."""

from __future__ import annotations

from typing import Literal

from shoal.healing.stage import Fit, Recipe, Settings, Stage


def fold_gates(
    *, target: float = 0.8, strength: float = 100.0, gates: float = 0.5, rate: float = 5e-2,
    part: Literal["layer", "halves"] = "layer", recover: str = "lora:rank=16,rate=5e-4",
) -> Recipe:  # fmt: skip
    """Input-free gates learn which layers go, hardening on the way; then closed ones are removed, and LoRA recovers.

    The loss of the first stage, a `gates` share of the tokens, is KL to the whole model + `strength` (d - `target`)^2,
    d the share of the layers that run. The result is a plan without gates, which a stock class may hold.

    Source: gates of Liu et al. 2024 (FoldGPT, arXiv 2407.00928); masks for each layer: Shi et al. 2024 (ILA, arXiv
    2410.17875).

    How we differ: FoldGPT's gates rank blocks, and those that go are fused into groups (method foldgpt).
    """
    policy = f"routed:grain=none,relax=gumbel,part={part},temperature=2,final_temperature=0.1"
    terms = ("logit-kd", f"density:target={target},weight={strength}")
    settings = Settings(rate=rate)
    return (
        Stage(terms=terms, learn=("gates",), policy=policy, share=gates, settings=settings),
        Fit(transform="close-gates"),
        Stage(terms=("logit-kd",), learn=(recover,), share=1 - gates, settings=settings),
    )
