"""Heads and lenses of exits that learn."""

from __future__ import annotations

from typing import Literal

from shoal.errors import UsageError
from shoal.examples import RecipeExamples
from shoal.healing.stage import Recipe, Settings, Stage

EXAMPLES = RecipeExamples(plan="0-1,!after-1=lens-1?exit,3/project,!after-3=lens-3?exit,4/project")


def exit_heads(
    *,
    labels: float = 0.0,
    by: Literal["uniform", "aligned"] = "uniform",
    temperature: float = 1.0,
    which: str = "all",
    learn: str = "",
    rate: float = 1e-3,
) -> Recipe:
    """What the plan's exits have of their own (lenses, matrices: `shoal fit-exits`) learns what the end of it says.

    The loss is (1 - `labels`) KL to the end, meaned over exits (`exit-kd`) + `labels` times the cross-entropy at the
    exits and the end, those that count being weighted `by` uniform or aligned (`exit-loss`). The model stands still:
    what the plan says at its end is what it was. `learn` names what moves beside the heads, as lora; the end is held to
    the whole model then (`logit-kd`). `which` as `exit-kd` takes it. Thresholds are chosen afterwards (`shoal
    calibrate`); probes stay what they were fitted to be.

    Source: labels=1 is the second stage of Xin et al. 2020 (DeeBERT, arXiv 2004.12993), with `by` aligned and a `learn`
    the loss of Zhou et al. 2020 (PABEE, arXiv 2006.04152), sum_j j L_j / sum_j j; labels=0 on a model that stands still
    is that of Balcony (arXiv 2503.05005) and of DyCE's exits (Wang et al. 2024, arXiv 2403.01695).

    How we differ: an exit has a lens and a matrix, and no layer of its own, where Balcony trains one for each.
    """
    if not 0 <= labels <= 1:
        raise UsageError(f"exit-heads: labels={labels:g} is outside [0, 1]; write labels=0.5", code="U502")
    terms = []
    if labels < 1:
        terms.append(f"exit-kd:temperature={temperature},which={which},weight={1 - labels}")
    if labels > 0:
        terms.append(f"exit-loss:at=exits,by={by},which={which},weight={labels}")
    moving = ("plan", learn) if learn else ("plan",)
    held = ("logit-kd",) if learn else ()
    return (Stage(terms=(*terms, *held), learn=moving, settings=Settings(rate=rate)),)
