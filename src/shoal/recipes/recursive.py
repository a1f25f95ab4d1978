"""Tied layers, and what relaxes their ties, learn what the untied model knew."""

from __future__ import annotations

from shoal.examples import RecipeExamples
from shoal.healing.stage import Recipe, Settings, Stage

EXAMPLES = RecipeExamples(plan="0-1,3:own,4")


def recursive(*, rate: float = 3e-4, temperature: float = 1.0) -> Recipe:
    """KL to the whole model while shared matrices and the additions of each run learn, for plans with ties.

    For what `shoal fuse --with tie:... --with relax:rank=64` wrote: the matrices that runs share, with their low-rank
    additions, are the plan's own tensors, and all of them move.

    Source: the uptraining of Bae et al. 2024 (Relaxed Recursive Transformers, arXiv 2410.20672), with distillation from
    the model before its layers were tied.
    """
    terms = (f"logit-kd:temperature={temperature}",)
    return (Stage(terms=terms, learn=("plan",), settings=Settings(rate=rate)),)
