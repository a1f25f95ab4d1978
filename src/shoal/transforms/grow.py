"""Grow: a deeper model from a plan, by copies of its layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.merge import arc, blended
from shoal.fitting.result import Job, Transformed
from shoal.fitting.silent import Silencer
from shoal.plan import Run, Step, format_steps
from shoal.plan.select import whole_run

NEEDS_PLAN = False
EXAMPLES = TransformExamples(
    refused=(
        ((), {"every": 0}, "U664"),
        ((), {"style": "solar", "cut": 9}, "U664"),
        ((), {"style": "solar", "init": "mean"}, "U664"),
    )
)


def grow(
    job: Job,
    *,
    style: Literal["llama-pro", "solar", "stack", "interleave"] = "llama-pro",
    every: int = 4,
    cut: int | None = None,
    init: Literal["zeros", "copy", "mean", "slerp"] | None = None,
) -> Transformed:
    """Add layers to the plan, of which nothing needs to be removed; all styles give a stock checkpoint.

    Of n steps, whole layers: `llama-pro` puts behind each `every`-th one a copy of it whose output matrices (o_proj and
    down_proj, found by probing) are zero, so that it adds nothing and the logits stay the plan's, bit for bit; it is
    there to be trained. `interleave` does the same with `init`: zeros; copy, the layer again as it is; mean, (W_i +
    W_(i-1)) / 2 of its tensors and those of the layer before it, norms among them; slerp, the point half way on the arc
    between them (the first layer is copied). `solar` runs the first n - `cut` steps and then the last n - `cut`, 2 (n -
    `cut`) in all; a cut of 8 of 32 is 0-23,8-31, and without one a quarter is cut. `stack` runs all of it twice. Every
    copy has KV of its own.

    Source: Wu et al. 2024 (LLaMA Pro, arXiv 2401.02415), Kim et al. 2023 (SOLAR, arXiv 2312.15166), Tan et al. 2024
    (DLO, arXiv 2407.11030: `interleave` and its initialisations), Gong et al. 2019 (progressive stacking, ICML 2019:
    `stack`).

    How we differ: nothing is trained here (`shoal heal` trains); DLO's routers are not among it; its released code
    drops all but the first tensor of each layer where it stacks. Raises U664 for numbers that add no layer, options of
    another style, steps that are no whole layers with their own weights, and layers that cannot be made silent.
    """
    _require(style, cut, init)
    steps = job.plan.steps(job.stack)
    if style in ("solar", "stack"):
        taken = 0 if style == "stack" else max(1, len(steps) // 4) if cut is None else cut
        if not (style == "stack" or 0 < taken < len(steps)):
            raise UsageError(
                f"a cut of {taken} of {len(steps)} steps leaves no layers to put on one another; give 1 to "
                f"{len(steps) - 1}",
                code="U664",
            )
        grown = (*steps[: len(steps) - taken], *steps[taken:])
        return Transformed(job.plan.with_steps(grown, job.stack), job.weights, notes=(_said(steps, grown),))
    if not 1 <= every <= len(steps):
        raise UsageError(
            f"a copy behind every {every} of {len(steps)} steps adds no layer; give 1 to {len(steps)}", code="U664"
        )
    return _interleaved(job, every, init or ("zeros" if style == "llama-pro" else "copy"))


def _interleaved(job: Job, every: int, init: str) -> Transformed:
    steps = job.plan.steps(job.stack)
    weights = dict(job.weights)
    silencer = Silencer(job) if init == "zeros" else None
    grown: list[Step] = []
    for place, step in enumerate(steps):
        grown.append(step)
        if (place + 1) % every:
            continue
        run = _whole(step)
        before = whole_run(steps[place - 1]) if place else None
        added, own = run, dict[str, torch.Tensor]()
        if silencer is not None:
            added = replace(run, weights=f"grow-{run.layer}")
            own = silencer.zeros(run.layer, f"grow-{run.layer}")
        elif init in ("mean", "slerp") and before is not None:
            added = replace(run, weights=f"grow-{run.layer}")
            rule = (lambda a, b: (a + b) / 2) if init == "mean" else (lambda a, b: arc(a, b, 0.5))
            own = blended(job.model, "grow", run.layer, before.layer, rule, job.stack)
        grown.append(added)
        weights |= own
        job.tell(place + 1, len(steps), "grow")
    plan = job.plan.with_steps(tuple(grown), job.stack)
    return Transformed(plan, weights, notes=(_said(steps, tuple(grown)),))


def _whole(step: Step) -> Run:
    run = whole_run(step)
    if run is None:
        raise UsageError(
            f"grow copies whole layers with their own weights, and {format_steps((step,))} is none; change every",
            code="U664",
        )
    return run


def _said(before: tuple[Step, ...], after: tuple[Step, ...]) -> str:
    return f"{len(before)} steps have become {len(after)}"


def _require(style: str, cut: int | None, init: str | None) -> None:
    """Raise U664 for options of another style."""
    if cut is not None and style != "solar":
        raise UsageError(f"grow by {style} cuts nothing; leave cut out, or use style=solar", code="U664")
    if init is not None and style != "interleave":
        raise UsageError(f"grow by {style} has one way to begin; leave init out, or use style=interleave", code="U664")
