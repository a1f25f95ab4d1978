"""One model of many numbers of loops."""

from __future__ import annotations

from shoal.examples import RecipeExamples
from shoal.healing.stage import Recipe, Settings, Stage, labels_and_kd

EXAMPLES = RecipeExamples(plan="0,1x2,3,4")


def looped(*, menu: str = "", labels: float = 0.5, learn: str = "all", rate: float = 3e-4) -> Recipe:
    """Training with numbers of loops that are drawn (see the policy `loops`), so that each of a `menu` is usable.

    The loss is `labels` x cross-entropy + (1 - `labels`) x KL to the whole model, whose layers run once. For a plan
    that repeats layers: --plan "0-9,[10-19]x4,20-29", or what `shoal fuse --with loop:...` wrote.

    Source: Geiping et al. 2025 (recurrent depth, arXiv 2502.05171), McLeish et al. 2025 (loops put into pretrained
    models, arXiv 2511.07384).

    How we differ: the loops are those of the plan, without an adapter between input and state of a loop unless `shoal
    fuse --with loop:inject=...` put one there; see the policy for the draws.
    """
    policy = f"loops:menu={menu}" if menu else "loops"
    return (Stage(terms=labels_and_kd(labels), learn=(learn,), policy=policy, settings=Settings(rate=rate)),)
