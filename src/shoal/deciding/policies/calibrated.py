"""Calibrated: an own threshold at every exit, from a file of `shoal calibrate` or typed in."""

from __future__ import annotations

import torch

from shoal.deciding.decisions import Decision, logical_and
from shoal.deciding.exit_view import ExitView
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import exits_of, with_exits
from shoal.deciding.policy import Policy
from shoal.deciding.policy_file import Level, PolicyFile, load_policy
from shoal.deciding.signals import Signal
from shoal.errors import UsageError
from shoal.examples import PolicyExamples
from shoal.plan import Exit, Plan, Spec
from shoal.plan.sources import Fill

EXAMPLES = PolicyExamples(
    deciding=("calibrated:at=0:0.02+2:0.01",),
)


def calibrated(
    plan: Plan,
    spec: Spec,
    *,
    file: str = "",
    level: str = "",
    at: str = "",
    by: Signal = "probability",
    head: str = "base",
    prefill: bool = False,
    fill: Fill = "project",
) -> Policy:
    """Leave at the first exit whose own threshold is reached (file=policy.json, or at=14:0.97+20:0.8).

    A token leaves behind the first layer l with s_l >= t_l, s as for `exit`. `file` is what `shoal calibrate` wrote: it
    brings the thresholds, the signal, the head, the fill and whether prompts run whole, and refuses another model or
    plan; `level` chooses among its levels (default: the first), and `policy.use(level)` switches while the model runs.
    With `at` the thresholds are typed in, LAYER:THRESHOLD joined by +, and nothing is promised.

    Source: thresholds chosen for a promised risk: Schuster et al. 2022 (CALM, arXiv 2207.07061); one for each exit, as
    a table to switch by: Wang et al. 2024 (DyCE, arXiv 2403.01695).

    How we differ: CALM has one threshold for all exits; DyCE promises nothing. Raises U604 for thresholds that cannot
    be read, U605 for a file of another model or plan, U606 for a level that is not there.
    """
    if bool(file) == bool(at):
        raise UsageError(
            "calibrated takes its thresholds from a file (file=policy.json) or from at=14:0.97+20:0.8; give one of the "
            "two",
            code="U604",
        )
    if at:
        found = Level("typed", _typed(at))
        placed = with_exits(plan, spec, found.thresholds, fill, head)
        return Calibrated(placed, (found,), by, prefill)
    read = load_policy(file)
    if not isinstance(read, PolicyFile):
        raise UsageError(
            f"{file} has no thresholds, as shoal heal wrote it; give it itself, --policy {file}", code="U604"
        )
    read.require(plan, file)
    chosen = read.level(level)
    placed = with_exits(plan, spec, read.exits, read.fill, read.head)  # type: ignore[arg-type]
    made = Calibrated(placed, read.levels, read.by, read.prefill)
    made.tensors = read.weights
    made.use(chosen.name)
    return made


class Calibrated(Policy):
    """Thresholds by layer, and levels to switch between."""

    def __init__(self, plan: Plan, levels: tuple[Level, ...], by: str, prefill: bool) -> None:
        super().__init__(plan)
        self.levels, self.by, self.prefill = levels, by, prefill
        self.now = levels[0]
        self.names = exits_of(plan)

    def use(self, level: str) -> None:
        """From the next forward on, the thresholds of this level. Raises U606."""
        self.now = PolicyFile("", "", "", self.levels).level(level)

    def should_exit(self, step: Exit, forward: ForwardView, view: ExitView) -> Decision:
        threshold = self.now.thresholds.get(self.names[step.name])
        asked = True if self.prefill else forward.decoding(view.hidden.device)
        if threshold is None or asked is False:
            return False
        sure: torch.Tensor = view.read(self.by) >= threshold
        return logical_and(asked, sure)


def _typed(text: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for piece in text.split("+"):
        layer, separator, value = piece.partition(":")
        try:
            number = float(value)
            found[int(layer)] = number
        except ValueError:
            number = float("nan")
        if not separator or not -1 <= number <= 1:
            raise UsageError(
                f"at={text!r:.60} is no list of thresholds; write LAYER:THRESHOLD, thresholds up to 1, joined by +, as "
                "14:0.97+20:0.8",
                code="U604",
            )
    return found
