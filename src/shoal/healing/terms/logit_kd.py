"""Distillation of the next-token distribution."""

from __future__ import annotations

import math

import torch

from shoal.errors import UsageError
from shoal.healing.repeats import repeats
from shoal.healing.seen import Seen

NEEDS_TEACHER = True


def logit_kd(seen: Seen, *, temperature: float = 1.0, beta: float = 0.0, top: int = 0, fresh: int = 0) -> torch.Tensor:
    """T^2 D(p || q) for each token that counts: the teacher's distribution p against the student's q at temperature T.

    p = softmax(teacher / T), q = softmax(student / T), [tokens, vocabulary] each. `beta` 0: forward KL(p || q), which
    covers all that the teacher may say; 1: reverse KL(q || p), which leaves out what the student cannot; between: the
    generalised Jensen-Shannon divergence beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.
    `top` k: only the k likeliest tokens of the teacher, both sides renormalised over them (0: all). `fresh` n: tokens
    that end an n-gram which stands earlier in their row do not count (0: all count); where the plan has written a loop
    the teacher, which reads it, goes on with it too. Gradients have the same size at every T by the factor T^2.

    Source: Hinton et al. 2015 (arXiv 1503.02531); the divergence in between: Agarwal et al. 2023 (GKD, arXiv
    2306.13649). As the healing of pruned models: Muralidharan et al. 2024 (Minitron, arXiv 2407.14679).
    """
    if not (0 < temperature < math.inf and 0 <= beta <= 1 and top >= 0 and fresh >= 0):
        raise UsageError(
            f"logit-kd: temperature={temperature:g} must be above 0, beta={beta:g} from 0 to 1, and top={top} and "
            f"fresh={fresh} not below 0; write logit-kd:temperature=2",
            code="U502",
        )

    def formula(student: torch.Tensor, teacher: torch.Tensor | None, _: torch.Tensor) -> torch.Tensor:
        assert teacher is not None
        if top:
            teacher, chosen = teacher.topk(min(top, teacher.shape[-1]), -1)
            student = student.gather(-1, chosen)
        p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
        return temperature**2 * _divergence(p, q, beta)

    columns = ~repeats(seen.ids, fresh) if fresh else None
    return seen.over_logits(formula, "logit-kd", teacher=True, columns=columns)


def _divergence(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """Of log probabilities [tokens, vocabulary], summed over the tokens."""
    if beta == 0:
        return _kl(p, q)
    if beta == 1:
        return _kl(q, p)
    m = torch.logsumexp(torch.stack([p + math.log(beta), q + math.log1p(-beta)]), 0)
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """sum p (log p - log q), where a token with p = 0 adds nothing."""
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
