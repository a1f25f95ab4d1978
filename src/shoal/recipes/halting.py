"""Loops that a token may leave."""

from __future__ import annotations

from shoal.examples import RecipeExamples
from shoal.healing.stage import Recipe, Settings, Stage

EXAMPLES = RecipeExamples(plan="0-1,3,4x2")


def halting(*, tau: float = 0.01, unit: str = "halt", learn: str = "", rate: float = 1e-3) -> Recipe:
    """A halting unit learns how often a token goes through the loops with which the plan ends (see the policy `act`).

    The loss is KL to the whole model + `tau` (N + R), N the loops of a token and R its remainder. `learn` names what
    moves beside the `unit`, as plan (tied matrices and what relaxes them) or lora.

    Source: Graves 2016 (ACT, arXiv 1603.08983).

    How we differ: the teacher is the model before its layers were tied; there labels teach.
    """
    more = (learn,) if learn else ()
    cost = (f"ponder:weight={tau}",) if tau else ()
    return (
        Stage(
            terms=("logit-kd", *cost),
            learn=("gates", *more),
            policy=f"act:unit={unit}",
            settings=Settings(rate=rate),
        ),
    )
