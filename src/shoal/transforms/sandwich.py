"""Sandwich: more attention at the bottom, more mlp at the top."""

from __future__ import annotations

from dataclasses import replace

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.result import Job, Transformed
from shoal.plan import Run, Step
from shoal.plan.select import whole_run

NEEDS_PLAN = False
EXAMPLES = TransformExamples(refused=(((), {"coefficient": 9}, "U664"), ((), {"coefficient": -1}, "U664")))


def sandwich(job: Job, *, coefficient: int | None = None) -> Transformed:
    """Run the attentions and the mlps of the plan's layers in the order s^k (sf)^(n - k) f^k.

    s is an attention, f an mlp, n the number of layers and k the `coefficient`: first k attentions, then n - k times an
    attention and an mlp, then k mlps; each of the two kinds keeps its own order. Nothing is removed or added,
    parameters and FLOPs stay. k = 0 is the plan as it was; without a `coefficient` it is 6 of 16, the paper's best.
    Live only: a stock layer has both parts.

    Source: Press et al. 2020 (Improving Transformer Models by Reordering their Sublayers, arXiv 1911.03864).

    How we differ: the paper trains models of this order from the start; a trained one is worse for being put into it.
    Raises U664 for a coefficient outside 0 to n and for steps that are no whole layers with their own weights and KV,
    P105 (where the plan is checked) for layers without parts.
    """
    steps = job.plan.steps(job.stack)
    whole = [run for step in steps if (run := whole_run(step)) is not None and run.plain]
    count = len(steps)
    k = count * 6 // 16 if coefficient is None else coefficient
    if len(whole) != count or not 0 <= k <= count:
        raise UsageError(
            f"a sandwich with the coefficient {k} cannot be made of {count} steps, {len(whole)} of them whole layers "
            f"with their own weights; give 0 to {count}, and a plan of such layers",
            code="U664",
        )
    order = [replace(run, part="attention") for run in whole[:k]]
    for attention, mlp in zip(whole[k:], whole, strict=False):
        order += [replace(attention, part="attention"), replace(mlp, part="mlp")]
    order += [replace(run, part="mlp") for run in whole[count - k :]]
    return Transformed(job.plan.with_steps(_joined(order), job.stack), job.weights)


def _joined(order: list[Run]) -> tuple[Step, ...]:
    """With an attention and the mlp of the same layer behind it as that layer."""
    joined: list[Step] = []
    for run in order:
        if run.part == "mlp" and joined and joined[-1] == Run(run.layer, "attention"):
            joined[-1] = Run(run.layer)
        else:
            joined.append(run)
    return tuple(joined)
