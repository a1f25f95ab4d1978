"""ACT: adaptive computation time over the loops of a plan; what a token answers is the mean of its loops' states."""

from __future__ import annotations

import torch

from shoal.deciding.decisions import Soft
from shoal.deciding.exit_view import ExitView
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import with_exits_at
from shoal.deciding.policy import Policy
from shoal.deciding.policy_options import share
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Exit, Plan, Spec, Step
from shoal.plan.select import exits, run_of
from shoal.plan.sources import Fill
from shoal.plan.steps import decides

EXAMPLES = PolicyExamples(
    plan="0x4",
    deciding=("act:bias=0", "act:bias=0,fill=mask", "act:bias=-0.5,fill=defer"),
    never=("act:bias=-200", "act:bias=-200,threshold=1,fill=mask"),
    always={"act:threshold=0": "0", "act:threshold=0,fill=mask": "0", "act:bias=200": "0"},
    refused=(
        Refusal("no loops", "act", "U683", "0-3 does not end with the same layers"),
        Refusal("layers behind the loops", "act", "U683", "0,1x2,3 does not end", plan="0,1x2,3"),
        Refusal("a threshold above 1", "act:threshold=1.1", "U586", "threshold=1.1", plan="0x4"),
        Refusal("a unit and a bias", "act:unit=halt,bias=0", "U685", "bias=0", plan="0x4"),
        Refusal("a unit that is not given", "act:unit=halt", "P112", "halt", plan="0x4"),
    ),
)
BIAS = 1.0
"""Of a halting unit that has not learned anything."""


def act(
    plan: Plan,
    spec: Spec,
    *,
    unit: str = "",
    bias: float | None = None,
    threshold: float = 0.99,
    fill: Fill = "project",
) -> Policy:
    """Loop until a token's halting probabilities add up to the threshold; its answer is the mean of its loops' states.

    For the state x_n [hidden] behind loop n: p_n = sigmoid(w . x_n + b). A token leaves behind loop N, the first with
    p_1 + ... + p_N >= `threshold` (1 - epsilon), and behind the last loop at the latest. Final norm and head read sum_n
    a_n x_n with a_n = p_n for n < N and a_N = 1 - (p_1 + ... + p_(N-1)), the remainder, so the weights a add up to 1.
    Prompts halt as generated tokens do. Loops are what the plan ends with several times: two of 0-14,0-14, three of
    0-9,10,10,10; layers before them run for all. A run with the matrices of another (15=0) counts as that one. A plan
    that brings exits of its own is asked there. `unit` names the plan's tensors UNIT.halting [hidden], w, and
    UNIT.halting_bias [1], b, one unit for all loops; without one w is 0 and b is `bias` (default 1), the unit before
    training: all tokens make the same number of loops. Where every p_n is 0, as with bias=-200, the weight of the last
    loop is exactly 1: the logits are those of the plan without the policy, bit for bit. Tokens that halted still give
    the other loops keys and values: with fill=project those of the state with which they left, the paper's "its state
    is simply copied".

    Source: Graves 2016 (arXiv 1603.08983, section 2); for each token of a Transformer: Dehghani et al. 2018
    (Universal Transformers, arXiv 1807.03819).

    How we differ: nothing is trained here, and no ponder cost is added to a loss; no step embedding is added in front
    of a loop. The released code (tensor2tensor) reads the halting unit in front of each step and not behind it, leaves
    only above the threshold, goes on changing the states of tokens that halted (fill=defer does so), drops the
    remainder where the steps run out, so that the weights add up to less than 1, and in its basic form
    subtracts the weights from the state (previous_state * 1 - update_weights). Raises U683 for a plan that does not end
    with loops, U586 for a threshold outside [0, 1], U685 for a bias beside a unit, U684 for a unit without its tensors.
    """
    if unit and bias is not None:
        raise UsageError(
            f"bias={bias:g} is for a policy without a unit, and {unit} has a bias of its own ({unit}.halting_bias); "
            "leave one of the two out",
            code="U685",
        )
    limit = share("threshold", threshold)
    if not decides(plan.steps()):
        ends = _loop_ends(plan)
        found = {at: [Exit(f"loop-{n}", unit or "base", "act")] for n, at in enumerate(ends[:-1], 1)}
        plan = with_exits_at(plan, spec, found, fill)
    return _ACT(plan, BIAS if bias is None else bias, limit)


class _ACT(Policy):
    by = "halting"

    def __init__(self, plan: Plan, bias: float, threshold: float) -> None:
        super().__init__(plan)
        self.bias, self.threshold = bias, threshold

    def start(self, spec: Spec) -> dict[str, torch.Tensor]:
        """A halting unit for each name, with the bias of one that has not learned."""
        units = {step.head for step in exits(self.plan.steps())} - {"base"}
        hidden = spec.stack().hidden
        made = {f"{unit}.halting": torch.zeros(hidden) for unit in sorted(units)}
        return made | {f"{unit}.halting_bias": torch.tensor([self.bias]) for unit in sorted(units)}

    def should_exit(self, step: Exit, forward: ForwardView, view: ExitView) -> Soft:
        if step.head == "base":
            bias = torch.full((1, forward.tokens), self.bias, dtype=torch.float32, device=view.hidden.device)
            probability = bias.sigmoid()
        else:
            probability = view.read("halting")
        if forward.learning is not None:
            forward.learning.note("halting", probability.expand(forward.rows, forward.tokens))
        before = forward.notes.get("halting")
        reached = probability if before is None else before.to(probability.device) + probability
        forward.notes["halting"] = reached
        return Soft(reached >= self.threshold, probability)


def _loop_ends(plan: Plan) -> list[int]:
    """The position of the last step of each loop: of what a plan ends with several times the longest end, in its
    shortest loops. Raises U683 where nothing is repeated."""
    made = [_matrices(step) for step in plan.steps()]
    found: tuple[int, int] = (0, 0)
    for size in range(1, len(made) // 2 + 1):
        same = 0  # steps, from the end, that are those of the loop behind them
        while same + size < len(made) and made[-1 - same] == made[-1 - same - size]:
            same += 1
        covered = size * (same // size + 1)
        if same >= size and covered > found[0]:
            found = covered, size
    covered, size = found
    if not covered:
        raise UsageError(
            f"act halts between loops, and the plan {plan} does not end with the same layers twice; give one that "
            "does, such as 0-14,0-14, or one with exits, such as 0-9,!first?act,10-19/project",
            code="U683",
        )
    return list(range(len(made) - covered + size - 1, len(made), size))


def _matrices(step: Step) -> object:
    """What two steps have in common that run the same matrices: the part, and whose they are."""
    run = run_of(step)
    return step if run is None else (run.part, run.layer if run.tie is None else run.tie)
