"""First the places of the holes, then the whole plan."""

from __future__ import annotations

from typing import Literal

from shoal.healing.stage import Fit, Recipe, Settings, Stage


def restore(
    *,
    first: Literal["block-local", "refit"] = "block-local",
    local: float = 0.5,
    learn: str = "near",
    rate: float = 3e-4,
) -> Recipe:
    """Block-local distillation beside the removed spans, or the closed-form `refit`, then distillation of the whole.

    `local` is the share of the tokens of the first stage, where it is one; `learn` and `rate` are those of the second.

    Source: the two stages of Puzzle, Bercovich et al. 2024 (arXiv 2411.19146).
    """
    settings = Settings(rate=rate)
    last = Stage(
        terms=("logit-kd",), learn=(learn,), share=1 - local if first == "block-local" else 1, settings=settings
    )
    if first == "refit":
        return (Fit(transform="refit"), last)
    return (Stage(terms=("block-local",), learn=("near",), share=local, settings=settings), last)
