"""How much of the depth a policy uses."""

from __future__ import annotations

from typing import Literal

import torch

from shoal.errors import UsageError
from shoal.examples import TermExamples
from shoal.healing.seen import Seen
from shoal.plan.price import layers_run
from shoal.plan.steps import runs

EXAMPLES = TermExamples(text="density:target=0.5", policy="routed", learn=("gates",))


def density(
    seen: Seen,
    *,
    target: float = 0.8,
    by: Literal["square", "abs", "above", "linear", "tokens"] = "square",
    each: bool = False,
) -> torch.Tensor:
    """F(d) for each token that counts: d is the share of the plan's layers that tokens run on average.

    d = (layers without a gate + sum over gates of size x mean gate) / layers; a gate is 0 or 1 (a share for relax=soft,
    and of neurons or bits for `widths` and `fractional`), and the size of a half is 1/2. F by square: (d - `target`)^2;
    abs: |d - target|; above: the square where d is above the target, else 0; linear: d itself, without a target;
    tokens, without one too: the mean of the squares of each token's own share. `each`: not d as a whole but every
    gate's own mean is held to the target, and F is the mean over gates. d is that of the step before (`Averages`), so
    that the gradient does not depend on how a step is cut into micro-batches.

    Source: square: Zeng et al. 2023 (SkipLayer, arXiv 2311.15436); each: the target rates of Veit and Belongie 2017
    (ConvNet-AIG, arXiv 1711.11503); linear: the skip penalty of Jain et al. 2024 (FiRST, arXiv 2410.12513); tokens: Luo
    et al. 2025 (FlexiDepth, arXiv 2503.23798).
    """
    if not 0 < target <= 1:
        raise UsageError(f"density: target={target:g} is no share of the layers; write density:target=0.8", code="U502")
    gates = seen.noted("gates", "density")[:, seen.counts].float()  # [gates, tokens]
    if not each:
        gates = _depths(seen, gates)
    if by == "tokens":
        return gates.square().mean(0).sum()
    d = seen.averages.of(f"density {each} {target}", gates, 1.0)[:, None]
    value, slope = _formula(d, target, by)
    # the value of F(d), with the gradient that it has for each token
    return (value + slope * (gates - gates.detach())).mean(0).sum()


def _depths(seen: Seen, gates: torch.Tensor) -> torch.Tensor:
    """The share of the layers that each token runs, [1, tokens]."""
    deciding = seen.sides[0].deciding
    assert deciding is not None
    steps = runs(seen.plan.steps(seen.stack))
    half = 0.5 if deciding.policy.leaves_out == "mlp" else 1.0
    sizes = [half * layers_run((run,)) for run in steps if run.gate is not None]
    total = layers_run(tuple(runs(seen.plan.steps(seen.stack))))
    share = gates.new_tensor(sizes)[:, None] / total
    return ((1 - share.sum()) + (share * gates).sum(0))[None]


def _formula(d: torch.Tensor, target: float, by: str) -> tuple[torch.Tensor, torch.Tensor]:
    """F and its slope at d."""
    off = d - target
    if by == "linear":
        return d, torch.ones_like(d)
    if by == "abs":
        return off.abs(), off.sign()
    if by == "above":
        off = off.clamp(min=0)
    return off.square(), 2 * off
