"""Layers that fade out."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def fade(*, learn: str = "lora:rank=16", rate: float = 1e-3) -> Recipe:
    """Distillation while what is removed fades out: out = x + w (f(x) - x), w from 1 to 0 over the first half.

    The first step is the whole model, and the second half trains the plan as it will be.

    Source: progressive module replacing, Xu et al. 2020 (BERT-of-Theseus, arXiv 2002.02925).

    How we differ: a layer's change is scaled down; there whole modules are replaced at random, more and more often.
    """
    return (Stage(terms=("logit-kd",), learn=(learn,), fade=True, settings=Settings(rate=rate)),)
