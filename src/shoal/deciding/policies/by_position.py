"""By position: the later a token stands, the fewer layers it runs."""

from __future__ import annotations

from typing import Literal

from shoal.deciding.gating import fill_for, with_gates
from shoal.deciding.policy import Policy, Schedule
from shoal.deciding.policy_options import hierarchy, spread
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Spec

EXAMPLES = PolicyExamples(
    deciding=(
        "by-position:last=2,length=8",
        "by-position:last=2,length=9,levels=2",
        "by-position:last=2,length=8,layout=even",
    ),
    never=("by-position:last=4",),
    refused=(Refusal("a schedule of no length", "by-position:length=0", "U587", "length=0"),),
)


def by_position(
    plan: Plan,
    spec: Spec,
    *,
    last: int = 0,
    length: int = 512,
    levels: int = 0,
    layout: Literal["lower", "nested", "even"] = "nested",
    prefill: bool = False,
    fill: Literal["auto", "none", "project", "copy", "mask"] = "auto",
) -> Policy:
    """Let the number of layers fall with the column, from all of them to `last` (default: half) at column `length`.

    n(c) = L - round((L - last) min(c, length) / length); with `levels` = k it falls in k equal steps. Which n layers
    run: layout=lower keeps the first and the uppermost n-1 (SkipDecode); nested leaves out every second layer, then
    every second of what is left, never the first and the last (hierarchical); even spreads n over the depth anew.
    lower and nested only ever take layers away, so no KV fill is needed (proved column by column); even needs one.
    Columns count padding, so that a batch decides as one: real time is saved. The prompt runs whole unless
    prefill=true.

    Source: Del Corro et al. 2023 (SkipDecode, arXiv 2307.02628) for lower; Zhu et al. 2024 (hierarchical skip decoding,
    arXiv 2403.14919) for nested with levels.

    How we differ: the second paper's own formula for levels was not to be had, so levels are equal steps and unverified
    against it, and the method `hsd` removes the same layers for good; SkipDecode's models are fine-tuned and its first
    layers are warm-up layers, of which we keep one. Raises U587 for numbers that make no schedule.
    """
    layers = plan.layers()
    least = last or len(layers) // 2
    if not 2 <= least <= len(layers) or length < 1 or levels < 0:
        raise UsageError(
            f"last={least}, length={length} and levels={levels} make no schedule for {len(layers)} layers; give last "
            f"from 2 to {len(layers)}, length from 1 on and levels from 0 on",
            code="U587",
        )
    made = _ByPosition(plan, layers, least, length, levels, layout, prefill)
    rule = fill_for(made, fill)
    gone = made.skipped_at(length) if layout != "even" else frozenset(layers[1:-1])
    made.plan = with_gates(plan, spec, sorted(gone), "by-position", rule)
    return made


class _ByPosition(Schedule):
    def __init__(
        self, plan: Plan, layers: tuple[int, ...], least: int, length: int, levels: int, layout: str, prefill: bool
    ) -> None:
        super().__init__(plan)
        self.layers, self.least, self.length, self.levels, self.prefill = layers, least, length, levels, prefill
        self.settled = length
        self.layout = layout
        self.order = _order(layers, layout)

    def skipped(self, column: int, generated: bool) -> frozenset[int]:
        return self.skipped_at(column) if generated or self.prefill else frozenset()

    def skipped_at(self, column: int) -> frozenset[int]:
        """What a token in `column` skips when it is not spared as part of a prompt."""
        part = min(column, self.length) / self.length
        if self.levels:
            part = int(part * self.levels) / self.levels
        number = round((len(self.layers) - self.least) * part)
        if self.layout == "even":
            kept = spread(len(self.layers), len(self.layers) - number)
            return frozenset(self.layers) - {self.layers[place] for place in kept}
        return frozenset(self.order[:number])


def _order(layers: tuple[int, ...], layout: str) -> list[int]:
    """In which order layers are left out."""
    return list(layers[1:-1]) if layout == "lower" else hierarchy(layers)
