"""Lenses: affine maps that make the state behind an exit what the state behind the last layer would have been."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoal.data import Data
from shoal.errors import UsageError
from shoal.evaluation.scoring import evaluating
from shoal.fitting.normal import Normal, best_ridge
from shoal.models.inspect import inspect
from shoal.run.observe import observe

HELD = 4
"""Every so many sequences one is not fitted on, but chooses the ridge."""
SINK = 10.0
"""A token whose state is this many times as long as the median's says nothing about others."""


def fit_lenses(
    model: Any,
    data: Data,
    layers: Sequence[int],
    *,
    name: str = "lens",
    batch: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, torch.Tensor]:
    """NAME-LAYER.lens [hidden, hidden] and NAME-LAYER.lens_bias [hidden], float32, for an exit behind each layer.

    W, b minimise the sum over tokens of |W x + b - y|^2 / |y|^2 + r |W - I|^2, x [hidden] the state behind the layer, y
    that behind the last layer which runs, both before the final norm; r of `RIDGES` is the best on every fourth
    sequence. Relative, because a norm follows. The first token and attention sinks (`SINK`) do not count.
    Source: Yom Din et al. 2023 (arXiv 2303.09435, linear shortcuts), the closed form of the tuned lens (Belrose et al.
    2023, arXiv 2303.08112), which is trained on the KL instead. How we differ: the ridge draws towards the identity,
    which is no lens at all. Works under a running plan. Cost: one pass without the head, and for each exit two matrices
    [hidden, hidden] in float64. Raises U622 for layers that do not run or that come last, U554 when no token counts.
    """
    hidden = inspect(model).stack("decoder").hidden
    states: dict[int, torch.Tensor] = {}
    last: list[int] = []
    sums: dict[int, tuple[Normal, Normal]] = {}
    done, mask_now = 0, None

    def watch(index: int, _: torch.Tensor, out: torch.Tensor) -> None:
        states[index] = out
        last[:] = [index]

    def settle() -> None:
        nonlocal done
        if not states:
            return
        _require(layers, last[0], states, hidden)
        keep = _counted(states[last[0]], mask_now)
        for layer in layers:
            for row in range(len(keep)):
                pair = sums.setdefault(layer, (_normal(states[layer]), _normal(states[layer])))
                held = len(data) >= HELD and (done + row) % HELD == HELD - 1
                _add(pair[held], states[layer][row][keep[row]], states[last[0]][row][keep[row]])
        done += len(keep)
        states.clear()
        if progress is not None:
            progress(done, len(data), "fitting lenses")

    def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        nonlocal mask_now
        settle()
        mask_now = mask

    with evaluating(model):
        observe(model, data.batches(batch), watch, before=before)
        settle()
    weights: dict[str, torch.Tensor] = {}
    for layer, (fitted, held) in sums.items():
        nothing = torch.eye(hidden, hidden + 1, dtype=torch.float64, device=fitted.xx.device)
        _, found, _ = best_ridge(fitted, held, bias=False, towards=nothing)
        weights[f"{name}-{layer}.lens"] = found[:, :-1].float().cpu().contiguous()
        weights[f"{name}-{layer}.lens_bias"] = found[:, -1].float().cpu().contiguous()
    return weights


def _require(layers: Sequence[int], last: int, states: dict[int, torch.Tensor], hidden: int) -> None:
    for layer in layers:
        if layer not in states or layer == last:
            ran = "comes last, where the head reads anyway" if layer == last else "does not run"
            raise UsageError(f"layer {layer} {ran}; name earlier layers of the plan for exits with a lens", code="U622")
    if states[last].shape[-1] != hidden:
        raise UsageError(
            f"the layers hand on several residual streams of {hidden}, for which there is no lens; leave it out",
            code="U622",
        )


def _counted(final: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """bool [batch, tokens]"""
    real = torch.ones(final.shape[:2], dtype=torch.bool, device=final.device)
    real = real if mask is None else mask.to(final.device).bool()
    norms = final.float().norm(dim=-1)
    return real & (real.cumsum(-1) > 1) & (norms < SINK * norms[real].median())


def _normal(like: torch.Tensor) -> Normal:
    # float64 is not to be had on every accelerator
    device = like.device if like.device.type in ("cpu", "cuda") else torch.device("cpu")
    return Normal(like.shape[-1] + 1, like.shape[-1], device)


def _add(sums: Normal, x: torch.Tensor, y: torch.Tensor) -> None:
    x, y = (state.to(device=sums.xx.device, dtype=torch.float64) for state in (x, y))
    scale = 1 / y.norm(dim=-1, keepdim=True)
    sums.add(torch.cat([x, torch.ones_like(scale)], -1) * scale, y * scale)
