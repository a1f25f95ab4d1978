"""Distillation from the whole model."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def logit_kd(*, learn: str = "lora:rank=16", rate: float = 1e-3, temperature: float = 1.0, beta: float = 0.0) -> Recipe:
    """KL of the whole model's next-token distribution to that of the plan; `learn` says what moves.

    The teacher is the same model with the plan paused, so nothing else is loaded. With as many tokens it brings back
    less of the text that is trained on than labels do, and more of every other. With `learn` near or all a rate of 3e-4
    suits better.

    Source: Muralidharan et al. 2024 (Minitron, arXiv 2407.14679); as the last stage of Puzzle: Bercovich et al. 2024
    (arXiv 2411.19146).
    """
    terms = (f"logit-kd:temperature={temperature},beta={beta}",)
    return (Stage(terms=terms, learn=(learn,), settings=Settings(rate=rate)),)
