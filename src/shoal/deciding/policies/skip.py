"""Skip: a set of layers that generated tokens, or all, do without."""

from __future__ import annotations

import random as randomness
from typing import Literal

from shoal.deciding.gating import fill_for, with_gates
from shoal.deciding.policy import Policy, Schedule
from shoal.deciding.policy_options import layer_list
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Spec

Phase = Literal["both", "prefill", "decode"]

EXAMPLES = PolicyExamples(
    deciding=(
        "skip:random=2",
        "skip:random=1,fill=mask",
        "skip:listed=0,phase=decode",
    ),
    always={
        "skip:listed=1": "0,2-3",
        "skip:early=2": "2-3",
        "skip:middle=2": "0,3",
        "skip:late=1,fill=project": "0-2",
        "skip:every=2": "0,2",
        "skip:listed=0,3,fill=mask": "1-2",
    },
    refused=(
        Refusal("skip nothing", "skip", "U583", "0 are given"),
        Refusal("skip two ways", "skip:early=1,late=1", "U583", "2 are given"),
        Refusal("skip all", "skip:random=4", "U583", "none of 4"),
        Refusal("skip what is not there", "skip:listed=7", "U581", "layer 7"),
        Refusal("skip half a layer", "skip:listed=1a", "U584", "1a"),
        Refusal("no fill where one is needed", "skip:random=1,fill=none", "U582", "fill=project"),
    ),
)


def skip(
    plan: Plan,
    spec: Spec,
    *,
    listed: str = "",
    early: int = 0,
    middle: int = 0,
    late: int = 0,
    every: int = 0,
    random: int = 0,
    random_seed: int = 0,
    phase: Phase = "both",
    fill: Literal["auto", "none", "project", "copy", "mask"] = "auto",
) -> Policy:
    """Skip listed, early, middle, late, every n-th or random layers, in the prompt, in generated tokens or in both.

    x_{l+1} = x_l for l in S and layer_l(x_l) elsewhere. S: `listed` (3-5,7), the first `early`, the `middle` or the
    last `late` layers of the plan, those whose place (from 1) is a multiple of `every`, or `random` many, drawn anew
    for each column from `random_seed` (so that a cached and an uncached pass draw the same). Exactly one of them is
    given. A set that is fixed, or left out of generated tokens alone, needs no KV fill: nobody reads what was not
    written (fill=auto proves it for every column and otherwise takes project). phase=prefill does need one.

    Source: the kinds of skipping that surveys of dynamic depth list (skip the rest, early, middle, every n-th, random,
    listed); layer drop at random: Fan et al. 2020 (arXiv 1909.11556).

    How we differ: none of them is trained for here. Raises U583 when not exactly one set is named.
    """
    layers = plan.layers()
    given = {
        "listed": listed != "", "early": early > 0, "middle": middle > 0, "late": late > 0, "every": every > 0,
        "random": random > 0,
    }  # fmt: skip
    if sum(given.values()) != 1:
        raise UsageError(
            f"skip needs exactly one of {', '.join(given)}, and {sum(given.values())} are given; write skip:late=4",
            code="U583",
        )
    most = max(early, middle, late, random)
    if most >= len(layers):
        raise UsageError(f"skip would leave none of {len(layers)} layers; skip fewer than that", code="U583")
    start = (len(layers) - middle) // 2
    fixed = {
        "listed": layer_list(listed) if listed else (),
        "early": layers[:early],
        "middle": layers[start : start + middle],
        "late": layers[len(layers) - late :],
        "every": layers[every - 1 :: every] if every else (),
        "random": (),
    }[next(name for name, is_given in given.items() if is_given)]
    made = _Skip(plan, frozenset(fixed), layers if random else (), random, random_seed, phase)
    rule = fill_for(made, fill)
    made.plan = with_gates(plan, spec, made.gated, "skip", rule)
    return made


class _Skip(Schedule):
    def __init__(
        self, plan: Plan, fixed: frozenset[int], layers: tuple[int, ...], number: int, seed: int, phase: Phase
    ) -> None:
        super().__init__(plan)
        self.fixed, self.layers, self.number, self.seed, self.phase = fixed, layers, number, seed, phase
        self.settled = 64 if number else 0
        self.gated = tuple(layers) if number else tuple(sorted(fixed))

    def skipped(self, column: int, generated: bool) -> frozenset[int]:
        if self.phase == ("prefill" if generated else "decode"):
            return frozenset()
        if self.number:
            return frozenset(randomness.Random(f"{self.seed}/{column}").sample(self.layers, self.number))
        return self.fixed
