"""Unified layer skipping: the same layers for every generated token, as many as a speed-up leaves."""

from __future__ import annotations

from typing import Literal

from shoal.deciding.gating import fill_for, with_gates
from shoal.deciding.policy import Policy, Schedule
from shoal.deciding.policy_options import spread
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Spec

EXAMPLES = PolicyExamples(
    deciding=("unified",),
    refused=(Refusal("speed-up of nothing", "unified:speedup=4", "U587", "leaves 1 of 4"),),
)


def unified(plan: Plan, spec: Spec, *, speedup: float = 2.0, layout: Literal["even", "released"] = "even") -> Policy:
    """Run the same L / speedup layers for every generated token; the prompt runs whole.

    K, the layers that run: layout=even: round(i (L-1) / (n-1)) for i = 0..n-1 with n = floor(L / speedup).
    layout=released: {0, L-1} and from 1 on every layer whose place is a multiple of floor(L / (n-1)) until n are kept.
    Every layer that decodes has read the prompt, so no KV fill is needed, and a batch decides as one: this is real
    time saved.

    Source: Liu et al. 2024 (arXiv 2404.06954).

    How we differ: the released rule leaves most layers at one end when the speed-up is small (1.5 of 30 layers keeps
    0-18 and 29), so even is the default; its fine-tuning is the recipe unified-tune. Raises U587 for a speed-up that
    leaves under two layers.
    """
    layers = plan.layers()
    number = int(len(layers) / speedup) if speedup >= 1 else 0
    if number < 2:
        raise UsageError(
            f"a speed-up of {speedup:g} leaves {number} of {len(layers)} layers; choose from 1 to {len(layers) / 2:g}",
            code="U587",
        )
    places = spread(len(layers), number) if layout == "even" else _released(len(layers), number)
    made = _Unified(plan, frozenset(layers) - {layers[place] for place in places})
    rule = fill_for(made, "auto")
    made.plan = with_gates(plan, spec, sorted(made.left_out), "unified", rule)
    return made


def _released(depth: int, number: int) -> list[int]:
    kept, interval = {0, depth - 1}, int(depth / (number - 1))
    for place in range(1, depth - 1):
        if len(kept) < number and place % interval == 0:
            kept.add(place)
    return sorted(kept)


class _Unified(Schedule):
    def __init__(self, plan: Plan, left_out: frozenset[int]) -> None:
        super().__init__(plan)
        self.left_out = left_out

    def skipped(self, column: int, generated: bool) -> frozenset[int]:
        return self.left_out if generated else frozenset()
