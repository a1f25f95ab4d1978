"""What the maps that stand in a hole share."""

from __future__ import annotations

import torch

from shoal.fitting.holes import Hole, Pair
from shoal.fitting.normal import Normal
from shoal.fitting.result import Fit


def sums(pair: Pair, hole: Hole, limit: float) -> tuple[Normal, Normal | None]:
    """Normal equations from the pruned states to the dense ones behind `hole`, of fitted and of held sequences."""
    states, targets = pair.pruned.states, pair.targets(hole)
    size = states[0].shape[-1]
    fitted, held = Normal(size, size, states[0].device), Normal(size, size, states[0].device)
    for number, keep in enumerate(pair.counted(limit)):
        one = held if number in pair.held else fitted
        one.add(states[number][keep], targets[number].to(states[number].device)[keep])
    return fitted, held if held.count else None


def limit_tensor(hole: Hole, limit: float) -> dict[str, torch.Tensor]:
    """The tensor that says from which norm on a token is handed on as it is; none without a limit."""
    return {} if limit == float("inf") else {f"{hole.weights}.limit": torch.tensor([limit])}


def judged(
    hole: Hole, fitted: Normal, held: Normal | None, weight: torch.Tensor, bias: torch.Tensor | None, note: str
) -> Fit:
    """Errors of nothing and of the map in the hole."""
    eye = torch.eye(len(weight), dtype=torch.float64, device=weight.device)
    kept: tuple[float | None, float | None] = (
        (None, None) if held is None else (held.error(eye), held.error(weight, bias))
    )
    return Fit(str(hole), fitted.error(eye), fitted.error(weight, bias), *kept, note)
