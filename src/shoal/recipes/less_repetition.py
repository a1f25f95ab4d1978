"""Distillation, then a stage on the plan's own writing that takes away what starts loops."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.healing.stage import Fit, Recipe, Settings, Stage, labels_and_kd


def less_repetition(
    *,
    weight: float = 0.5,
    own: float = 0.33,
    last: float = 0.5,
    labels: float = 0.5,
    windows: int = 32,
    learn: str = "lora:rank=16",
    rate: float = 1e-3,
) -> Recipe:
    """As `refit-kd` with labels, then a stage that also reads what the plan writes greedily, where loops are unlikely.

    `last` is the share of the tokens of that stage, and `own` the share of them that the plan writes, behind beginnings
    of the text. There the term `unlikelihood` acts, with `weight`, on each token that ends a repeated 4-gram, and the
    KL to the whole model on the others; on the text the stage minimises what the one before did. Those tensors are kept
    that do best on held-out text and on what the plan writes behind its beginnings: perplexity alone does not decide.
    `windows` 0 leaves the closed form out.

    Source: the sequence-level objective of Welleck et al. 2019 (arXiv 1908.04319).

    How we differ: the plan writes once, before the stage, not in each step; and see the term.
    """
    if not (weight > 0 and 0 < own < 1 and 0 < last <= 1):
        raise UsageError(
            f"less-repetition: weight={weight:g} must be above 0, own={own:g} above 0 and below 1 and last={last:g} "
            "above 0 and at most 1; write less-repetition:weight=0.5",
            code="U502",
        )
    terms, settings = labels_and_kd(labels), Settings(rate=rate)
    first = Stage(terms=terms, learn=(learn,), share=1 - last, settings=settings)
    second = Stage(
        terms=terms, own_terms=("logit-kd:fresh=4", f"unlikelihood:weight={weight}"), learn=(learn,), share=last,
        data=(("text", 1 - own), ("own", own)), temperature=0.0, settings=settings,
    )  # fmt: skip
    fit = (Fit(transform="refit:every=true", windows=windows),) if windows else ()
    return (*fit, *((first,) if last < 1 else ()), second)
