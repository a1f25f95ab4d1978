"""The layers beside each removed span learn what the span did."""

from __future__ import annotations

from typing import Literal

from shoal.healing.stage import Recipe, Settings, Stage


def block_local(*, width: int = 1, side: Literal["both", "before", "behind"] = "both", rate: float = 3e-4) -> Recipe:
    """The `width` layers before and behind each removed span learn to make what the whole model makes there of the same
    input.

    No gradient crosses a border, and neither the head nor the layers between run backwards: twice as many tokens a
    second as distillation through the whole plan.

    Source: the local stage of Puzzle, Bercovich et al. 2024 (arXiv 2411.19146).
    """
    terms = (f"block-local:width={width},side={side}",)
    return (Stage(terms=terms, learn=(f"near:width={width},side={side}",), settings=Settings(rate=rate)),)
