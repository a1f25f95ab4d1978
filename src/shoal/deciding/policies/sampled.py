"""Sampled: in training each sequence runs as deep as one entry of a menu; behind it every layer runs."""

from __future__ import annotations

from typing import ClassVar

import torch

from shoal.deciding.decisions import Decision
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import with_gates
from shoal.deciding.learning import sandwich
from shoal.deciding.policy import Grain, Policy
from shoal.deciding.policy_options import spread, whole_numbers
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Run, Spec

EXAMPLES = PolicyExamples(
    never=("sampled", "sampled:menu=1+4"),
    refused=(
        Refusal("a depth that is none", "sampled:menu=0+4", "U587", "menu=0"),
        Refusal("deeper than the plan", "sampled:menu=2+9", "U587", "menu=2"),
        Refusal("no numbers", "sampled:menu=half", "U587", "menu=half"),
        Refusal("a digit that is no number", "sampled:menu=2+²", "U587", "menu=2"),
    ),
)


def sampled(plan: Plan, spec: Spec, *, menu: str = "") -> Policy:
    """In training run sequences at the depths of a `menu`: one at the largest, one at the smallest, others between.

    The first sequence of a micro-batch runs the largest, the second the smallest, each other one a depth that is drawn
    (sandwich rule). `menu` 18+24+30 counts layers (default: half, three quarters and all of the plan); n layers of L
    are those at the places round(i (L - 1) / (n - 1)), so the first and the last are always there. Where nothing is
    trained every layer runs, and what has learned is used with the plan of one depth, `shoal show` draws it.

    Source: the sandwich rule of Yu and Huang 2019 (arXiv 1903.05134); menus of depths: Fan et al. 2019 (LayerDrop,
    arXiv 1909.11556) and Klein et al. 2024 (NAS for pruning, arXiv 2405.02267).

    How we differ: one step runs one depth a sequence and not each sequence at every depth. Raises U587 for a menu that
    names no depth of the plan.
    """
    layers = plan.layers()
    return _Sampled(with_gates(plan, spec, layers, "sampled", "project"), layers, _menu(menu, len(layers)))


class _Sampled(Policy):
    grain: ClassVar[Grain] = "row"
    only_training: ClassVar[bool] = True

    def __init__(self, plan: Plan, layers: tuple[int, ...], menu: tuple[int, ...]) -> None:
        super().__init__(plan)
        self.menu = menu
        self.kept = [frozenset(layers[place] for place in spread(len(layers), depth)) for depth in menu]
        """By entry of the menu the layers that run."""

    def begin(self, forward: ForwardView) -> None:
        if forward.learning is not None and torch.is_grad_enabled():
            forward.notes["entries"] = sandwich(forward.learning, len(self.menu), forward.rows)

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision:
        entries = forward.notes.get("entries")
        if entries is None:
            return True
        runs = torch.tensor([run.layer in self.kept[entry] for entry in entries], device=hidden.device)
        return runs[:, None].expand(-1, forward.tokens)


def _menu(text: str, depth: int) -> tuple[int, ...]:
    """Depths in rising order. Raises U587."""
    if not text:
        return tuple(sorted({max(1, depth // 2), max(1, 3 * depth // 4), depth}))
    found = whole_numbers(text)
    if found is None or not 1 <= found[0] <= found[-1] <= depth:
        raise UsageError(
            f"menu={text} names no depths of a plan of {depth} layers; write numbers of layers, as menu=1+{depth}",
            code="U587",
        )
    return found
