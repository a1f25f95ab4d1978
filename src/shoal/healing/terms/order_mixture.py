"""Each sequence's loss under every order, weighted by how likely the predictor takes it."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy as nll

from shoal.deciding.places import PlacePolicy, gumbel
from shoal.errors import UsageError
from shoal.examples import TermExamples
from shoal.healing.seen import Seen

EXAMPLES = TermExamples(text="order-mixture:noise=false", policy="ordered:orders=1,4+4,1,relax=mixture",
                        learn=("gates",))  # fmt: skip


def order_mixture(
    seen: Seen, *, temperature: float = 20.0, final_temperature: float = 2.0, clamp: float = 0.05, noise: bool = True
) -> torch.Tensor:
    """Cross-entropy as sum_k lambda_k L_k for each sequence: L_k its loss in order k, lambda the Gumbel softmax of p.

    p [orders] is what the policy `ordered:relax=mixture` says of the sequence, c its values held within `clamp` and 1 -
    (orders - 1) `clamp`; lambda = softmax((log c + g) / T), g Gumbel noise (`noise` false: 0), T going geometrically
    from `temperature` to `final_temperature` over the stage. A step costs as many forwards as there are orders, whose
    graphs are held together. On held-out text the value is the loss in the order that each sequence takes.

    Source: Zhu et al. 2021 (IOT, arXiv 2103.03457), by its released code for lambda.

    How we differ: no label smoothing. The script that the authors released says 20 to 2 and gives T a decay rate of 0,
    so T stays 20 there.
    """
    if not 0 < temperature < float("inf") or not 0 < final_temperature < float("inf"):
        raise UsageError(
            f"order-mixture: temperature={temperature:g} to {final_temperature:g} must be above 0; write "
            "order-mixture:temperature=20,final_temperature=2",
            code="U502",
        )
    deciding = seen.sides[0].deciding
    policy = None if deciding is None else deciding.policy
    if not isinstance(policy, PlacePolicy) or policy.options.relax != "mixture":
        raise UsageError(
            "order-mixture compares the orders of the policy ordered:relax=mixture, and another one decides here; use "
            "the recipe iot",
            code="U675",
        )
    if not torch.is_grad_enabled():
        return seen.over_logits(lambda student, _, labels: nll(student, labels, reduction="sum"), "order-mixture")
    p = seen.noted("choices", "order-mixture")[:, :, 0].float()  # [orders, batch]
    if not 0 <= clamp < 1 / len(p):
        raise UsageError(
            f"order-mixture: clamp={clamp:g} leaves no choice among {len(p)} orders; write order-mixture:clamp=0.05",
            code="U502",
        )
    learning = seen.sides[0].learning
    warm = temperature * (final_temperature / temperature) ** learning.progress
    logits = p.clamp(clamp, 1 - (len(p) - 1) * clamp).log()
    if noise:
        logits = logits + gumbel(logits.shape, learning.generator).to(logits)
    shares = (logits / warm).softmax(0)
    losses = torch.stack([_by_row(one) for one in (seen, *(seen.once_more(choice=k) for k in range(1, len(p))))])
    return (shares * losses).sum()


def _by_row(seen: Seen) -> torch.Tensor:
    """The summed cross-entropy of each row, [batch]."""
    rows = torch.arange(len(seen.ids), device=seen.ids.device)[:, None]

    def of(row: int) -> torch.Tensor:
        return seen.over_logits(
            lambda student, _, labels: nll(student, labels, reduction="sum"), "order-mixture", columns=rows == row
        )

    return torch.stack([of(row) for row in range(len(rows))])
