"""The end of the model teaches its exits."""

from __future__ import annotations

import torch

from shoal.errors import UsageError
from shoal.examples import TermExamples
from shoal.healing.exits import check_of_exits, no_exit, open_exits, places_of
from shoal.healing.seen import Seen

TRAINS_WHOLE = True
CHECK_PLAN = check_of_exits("exit-kd", at="exits")

EXAMPLES = TermExamples(text="exit-kd:at=every:1")


def exit_kd(seen: Seen, *, at: str = "exits", which: str = "all", temperature: float = 1.0) -> torch.Tensor:
    """T^2 KL(p_end || p_l), meaned over exits l, summed over the tokens that count.

    p_l = softmax(logits / T) behind layer l, p_end that of the same pass at the end, without gradients. `at` exits: the
    plan's own exits, by their heads or lenses; every:N: behind each N-th layer of the base, by norm and head of the
    model. `which`: as for `exit-loss`.

    Source: Phuong and Lampert 2019 (distillation-based training of multi-exit architectures, ICCV); lenses on exits:
    Belrose et al. 2023 (tuned lens, arXiv 2303.08112).
    """
    if temperature <= 0:
        raise UsageError(f"exit-kd: temperature={temperature:g} must be above 0; write temperature=1", code="U502")
    places = places_of(seen, at, "exit-kd")
    if not places:
        raise no_exit("exit-kd")
    learning = seen.sides[0].learning
    chosen = open_exits(len(places), which, learning.step, learning.progress, "exit-kd")

    def formula(student: torch.Tensor, end: torch.Tensor | None, _: torch.Tensor) -> torch.Tensor:
        assert end is not None
        p, q = (end / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
        return temperature**2 * torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")

    found = [
        seen.over_logits(formula, "exit-kd", teacher=True, behind=states, head=head)
        for states, head in (place() for place, on in zip(places, chosen, strict=True) if on)
    ]
    return torch.stack(found).mean()
