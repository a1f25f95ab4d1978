"""A few layers less at a time."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.healing.stage import Recipe, Settings, Stage


def iterative(*, rounds: int = 3, learn: str = "near", rate: float = 3e-4) -> Recipe:
    """In rounds more and more of the removed layers go, and after each the rest is distilled from the whole model.

    Of the plan's removed layers those that matter least by block influence go first.

    Source: iterative layer-wise distillation (2025, arXiv 2511.05085) and IteRABRe (Wibowo et al. 2025,
    arXiv 2503.06291).

    How we differ: which layers go is the plan's choice, made beforehand.
    """
    if rounds < 1:
        raise UsageError(f"iterative: rounds={rounds} is none; write rounds=3", code="U502")
    settings = Settings(rate=rate)
    return tuple(
        Stage(terms=("logit-kd",), learn=(learn,), share=1 / rounds, removed=(n + 1) / rounds, settings=settings)
        for n in range(rounds)
    )
