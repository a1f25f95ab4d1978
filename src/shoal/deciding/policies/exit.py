"""Exit: the rest of the layers is left out, always behind one layer or once the model is sure."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from shoal.deciding.decisions import Decision, logical_and
from shoal.deciding.exit_view import ExitView
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import exits_of, with_exits
from shoal.deciding.policy import Policy
from shoal.deciding.policy_options import exit_layers, share
from shoal.deciding.signals import Signal
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Exit, Plan, Spec
from shoal.plan.sources import Fill

EXAMPLES = PolicyExamples(
    deciding=(
        "exit:confidence=0.05,first=0",
        "exit:confidence=0.02,first=0,by=margin,fill=copy",
        "exit:confidence=0.08,first=0,by=certainty,fill=mask",
        "exit:confidence=0.6,first=0,by=saturation,fill=defer",
        "exit:after=1,fill=defer",
    ),
    never=(
        "exit:confidence=1,first=0",
        "exit:confidence=1,first=0,by=margin,fill=mask",
    ),
    always={
        "exit:after=1,prefill=true": "0-1",
        "exit:after=2,prefill=true,fill=mask": "0-2",
        "exit:after=0,prefill=true,fill=copy": "0",
    },
    refused=(
        Refusal("neither or both", "exit", "U585", "exactly one"),
        Refusal("confidence above 1", "exit:confidence=1.1", "U586", "confidence=1.1"),
        Refusal("confidence below 0", "exit:confidence=-1", "U586", "confidence=-1"),
        Refusal("exit behind no layer", "exit:after=9", "U581", "layer 9"),
        Refusal("exit behind a dropped layer", "exit:after=1", "U581", "layer 1", plan="0,2-3"),
        Refusal("no place for exits", "exit:confidence=0.5,first=7", "U584", "first=7"),
    ),
)


def exit(  # noqa: A001 - the file's name is the policy's
    plan: Plan,
    spec: Spec,
    *,
    after: int | None = None,
    confidence: float | None = None,
    by: Signal = "probability",
    first: int | None = None,
    every: int = 1,
    layers: str = "",
    head: str = "base",
    prefill: bool = False,
    fill: Fill = "project",
) -> Policy:
    """Leave behind one layer, always (after=N) or at the first exit where the model is confident (confidence=0.9).

    The state of a token that leaves goes to the model's final norm and head (or to `head`, whose tensors are called
    HEAD-LAYER). With `after` the layers 0..N run, N 0-based. With `confidence` = c a token leaves at the first exit
    with s >= c, s in [0, 1]: by=probability max_v p(v); margin p(1) - p(2), the two largest; certainty 1 - H(p) / ln V;
    saturation cos(x_l, x_{l-1}); probe sigmoid(w x_l / rms(x_l) + b), the chance that the exit is right, by tensors
    that `shoal fit-exits` makes. The last two need no head. Exits are behind every `every`-th layer from `first` on
    (default: the middle), or behind `layers` (8,12,20-24). Prompts run whole unless prefill=true. `fill`: what the
    layers that were left out store (docs/dynamic.md).

    Source: confidence: Schuster et al. 2022 (CALM, arXiv 2207.07061), entropy: Xin et al. 2020 (DeeBERT, arXiv
    2004.12993), fixed exits: Elhoushi et al. 2024 (LayerSkip, arXiv 2404.16710).

    How we differ: the threshold does not fall with the position; models need not be trained for it; entropy is divided
    by its maximum, so that more is surer for every signal. Raises U585 unless exactly one of after and confidence is
    given, U586 for a threshold outside [0, 1].
    """
    if (after is None) == (confidence is None):
        raise UsageError(
            "exit leaves always (after=8) or when it is sure (confidence=0.9); give exactly one of the two", code="U585"
        )
    if after is not None:
        placed = with_exits(plan, spec, [after], fill, head)
        return _Always(placed, _asked(placed, [after]), prefill)
    assert confidence is not None
    at = exit_layers(plan, layers=layers, first=first, every=every)
    placed = with_exits(plan, spec, at, fill, head)
    asked = _asked(placed, at if layers or first is not None else exits_of(placed).values())
    return _WhenSure(placed, asked, share("confidence", confidence), by, prefill)


def _asked(plan: Plan, layers: Iterable[int]) -> frozenset[str]:
    """The exits of `plan` behind `layers`: a plan may bring exits of its own, of which only some are wanted."""
    wanted, there = set(layers), exits_of(plan)
    names = frozenset(name for name, layer in there.items() if layer in wanted)
    if there and not names:
        raise UsageError(
            f"the plan has exits of its own, and none behind {', '.join(map(str, sorted(wanted)))}; name one of "
            f"{', '.join(map(str, sorted(set(there.values()))))}, or give the plan without exits",
            code="U581",
        )
    return names


class _Always(Policy):
    def __init__(self, plan: Plan, asked: frozenset[str], prefill: bool) -> None:
        super().__init__(plan)
        self.asked, self.prefill = asked, prefill

    def should_exit(self, step: Exit, forward: ForwardView, view: ExitView) -> Decision:
        if step.name not in self.asked:
            return False
        return True if self.prefill else forward.decoding(view.hidden.device)


class _WhenSure(Policy):
    def __init__(self, plan: Plan, asked: frozenset[str], threshold: float, by: Signal, prefill: bool) -> None:
        super().__init__(plan)
        self.asked, self.threshold, self.by, self.prefill = asked, threshold, by, prefill

    def should_exit(self, step: Exit, forward: ForwardView, view: ExitView) -> Decision:
        asked = step.name in self.asked and (True if self.prefill else forward.decoding(view.hidden.device))
        if asked is False:
            return False
        sure: torch.Tensor = view.read(self.by) >= self.threshold
        return logical_and(asked, sure)
