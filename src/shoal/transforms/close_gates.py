"""Gates that read nothing become a static plan."""

from __future__ import annotations

from dataclasses import replace

import torch

from shoal.deciding.gate_adapter import UP
from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.result import Job, Transformed
from shoal.plan import Run, Step

EXAMPLES = TransformExamples(role="other", refused=(((1,), {}, "U712"),))


def close_gates(job: Job, *, threshold: float = 0.5) -> Transformed:
    """Remove the runs behind gates that are closed for every token, and open the others for good.

    A gate is read that is its bias alone (GATE.bias [1] without a GATE.weight): closed where sigmoid(bias) is not above
    `threshold`. What is left is a plan without gates, which computes what the gated one did, bit for bit.

    Source: the last step of masks that are learned and then cut: Liu et al. 2024 (FoldGPT, arXiv 2407.00928).

    How we differ: nothing is merged. Raises U712 for a plan without gates, and for a gate that reads its input or has
    an adapter.
    """
    steps: list[Step] = []
    closed: list[int] = []
    seen = False
    for step in job.plan.steps(job.stack):
        if not isinstance(step, Run) or step.gate is None:
            steps.append(step)
            continue
        seen = True
        bias = job.weights.get(f"{step.gate}.bias")
        if bias is None or f"{step.gate}.weight" in job.weights:
            raise UsageError(
                f"the gate {step.gate} decides by what it reads, so its layer is neither in nor out; train gates that "
                "read nothing (routed:grain=none)",
                code="U712",
            )
        if f"{step.gate}.{UP}" in job.weights:
            raise UsageError(
                f"the gate {step.gate} leads through an adapter where it is closed, for which a plan without gates has "
                "no place; train gates without one (routed:adapter=0)",
                code="U712",
            )
        if float(torch.sigmoid(bias.float())) > threshold:
            steps.append(replace(step, gate=None, kv=replace(step.kv, fill=None)))
        else:
            closed.append(step.layer)
    if not seen:
        raise UsageError(
            f"the plan {job.plan} has no gates to close; train some first (shoal heal --recipe fold-gates)", code="U712"
        )
    said = f"closed: {', '.join(map(str, closed)) or 'none'}"
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), dict(job.weights), notes=(said,))
