"""Only the layers that matter most learn."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def top_layers(*, count: int = 4, by: str = "block-influence", term: str = "logit-kd", rate: float = 3e-4) -> Recipe:
    """Distillation, or any `term`, of the `count` layers of the plan that the measure `by` scores highest.

    Source: ALaST (Devoto et al. 2024, arXiv 2408.08670); ILA (Shi et al. 2024, arXiv 2410.17875).

    How we differ: they train on labels, and choose anew while they train.
    """
    return (Stage(terms=(term,), learn=(f"top:count={count},by={by}",), settings=Settings(rate=rate)),)
