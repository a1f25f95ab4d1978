"""Distances that keep their digits when they are small: angles between states, divergences between distributions.

Each is written as a sum of terms that are never negative, none of which is the difference of two nearly equal numbers.
All are computed in the dtype of what is given, at least float32, and are exactly 0 for two equal arguments.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize


def one_minus_cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1 - cos of the angle between x and y over the last dimension, [..., n] each to [...].

    Half the squared distance of the unit vectors; 1 minus a float32 cosine has no digit left at 1e-7.
    """
    u, v = _units(x, y)
    return (u - v).square().sum(-1) / 2


def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The angle between x and y over the last dimension in radians, [..., n] each to [...].

    2 atan2(|u - v|, |u + v|) for the unit vectors u and v; arccos loses half its digits near 0 and near pi.
    """
    u, v = _units(x, y)
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))


def kl_divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats over the last dimension, logits [..., vocab] to [...].

    With d = log q - log p it is the sum over v of p (exp(d) - 1 - d), since p and q both sum up to 1. The usual sum of
    -p d has terms of both signs that cancel to about d^2 / 2, so in float32 a KL of 5e-5 keeps two digits of it; here
    it keeps six. d is the difference of the logits minus that of their normalisers, whose own rounding cancels.
    A token that p rules out (-inf) adds its q, and one that only q rules out makes the result inf.
    """
    a, b = at_least_float32(p_logits), at_least_float32(q_logits)
    log_p, log_q = a.logsumexp(-1, keepdim=True), b.logsumexp(-1, keepdim=True)
    # both -inf: nothing is moved; -inf in p alone: p d is 0, so d must be finite
    d = (b - a).sub_(log_q - log_p).nan_to_num_(0.0, posinf=torch.finfo(a.dtype).max, neginf=-torch.inf)
    p, q = (a - log_p).exp_(), (b - log_q).exp_()
    # q - p = +-max(p, q) (1 - exp(-|d|)) cannot overflow, as p exp(d) does for tokens that p hardly knows
    gained = torch.maximum(p, q, out=q).mul_(d.abs().neg_().expm1_()).copysign_(d)
    return gained.sub_(p.mul_(d)).sum(-1)


def jensen_shannon(p: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """JS(p, r) in nats of distributions over the last dimension, [..., n] each to [...].

    With the mean m and s = (p - r) / (p + r) it is half the sum of m ((1 + s) log(1 + s) + (1 - s) log(1 - s)); for
    small s, where these two cancel to s^2, the bracket is written as log(1 - s^2) + 2 s atanh(s).
    """
    p, r = at_least_float32(p), at_least_float32(r)
    total = p + r
    s = torch.where(total > 0, (p - r) / total, 0.0)
    far = torch.xlogy(1 + s, 1 + s) + torch.xlogy(1 - s, 1 - s)
    near = torch.log1p(-s.square()) + 2 * s * torch.atanh(s)
    return (total * torch.where(s.abs() < 0.5, near, far)).sum(-1) / 4


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or as it is when it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _units(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return normalize(at_least_float32(x), dim=-1), normalize(at_least_float32(y), dim=-1)
