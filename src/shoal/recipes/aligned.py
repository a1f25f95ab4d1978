"""Every exit learns, later ones more."""

from __future__ import annotations

from typing import Literal

from shoal.healing.stage import Recipe, Settings, Stage


def aligned(
    *,
    by: Literal["aligned", "uniform"] = "aligned",
    which: str = "rotate:8",
    learn: str = "lora:rank=16",
    rate: float = 5e-4,
) -> Recipe:
    """Cross-entropy at all exits at once, that behind layer l with the weight 2 l / (L (L + 1)), or all alike.

    `which` rotate:R reads each R-th exit, other ones in each step; all reads each one in each step.

    Source: aligned: Jiang et al. 2024 (multi-exit models with a single classifier, arXiv 2406.14479); uniform: Dabre
    et al. 2020 (tied-multi transformers, arXiv 2002.08614), over the depths of one stack.

    How we differ: LoRA learns where all tensors do there.
    """
    terms = (f"exit-loss:by={by},which={which}",)
    return (Stage(terms=terms, learn=(learn,), settings=Settings(rate=rate)),)
