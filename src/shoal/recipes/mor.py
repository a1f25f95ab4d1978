"""Loops that only some tokens go through again."""

from __future__ import annotations

from shoal.examples import RecipeExamples
from shoal.healing.stage import Recipe, Settings, Stage

EXAMPLES = RecipeExamples(plan="0,1x2,3,4")


def mor(
    *, capacity: float = 0.5, labels: float = 1.0, learn: str = "lora:rank=16,rate=5e-4", rate: float = 1e-3
) -> Recipe:
    """A gate at each layer that a plan repeats: the `capacity` share of a row's tokens goes through it again.

    The loss is KL to the whole model + `labels` x `capacity-labels`, as in the recipe mod; keys and values of a
    repeated run are those of the tokens that made it alone. For a plan with loops or ties: --plan
    "0-9,[10-19]x2,20-29", or what `shoal fuse --with tie:...` wrote (with `learn` plan).

    Source: Bae et al. 2025 (Mixture-of-Recursions, arXiv 2507.10524): expert-choice routing with keys and values by
    recursion.

    How we differ: each repeated layer asks a gate of its own, where the paper asks once for each loop, and a token that
    left a loop out may run a later one; a pretrained model is the teacher, where the paper trains from random numbers.
    """
    policy = f"routed:relax=top-k,capacity={capacity},scale=true,fill=mask,layers=again"
    terms = ("logit-kd", f"capacity-labels:capacity={capacity},weight={labels}")
    return (Stage(terms=terms, learn=("gates", learn), policy=policy, settings=Settings(rate=rate)),)
