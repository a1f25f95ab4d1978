"""Lenses: affine maps that make the state at an exit what the state at the end would have been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, assert_never

import torch

from shoal.data import Data
from shoal.deciding.decisions import Decision
from shoal.deciding.exit_view import ExitView
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import EXIT
from shoal.deciding.policy import Policy
from shoal.errors import UsageError
from shoal.executing.inputs import forward_without_head
from shoal.executing.weights import Tensors
from shoal.fitting.normal import Normal, best_ridge
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.opened import open_model
from shoal.models.precision import in_float64
from shoal.plan import Exit, Map, Parallel, Plan, Run, Step
from shoal.plan.select import exits

HELD = 4
"""Every so many sequences one is not fitted on, but chooses the ridge."""
SINK = 10.0
"""A token whose state is this many times as long as the median's says nothing about others."""
END = "end"


def fit_lenses(
    model: Any,
    plan: Plan,
    weights: Tensors | None,
    data: Data,
    *,
    batch: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, torch.Tensor]:
    """HEAD.lens [hidden, hidden] and HEAD.lens_bias [hidden], float32, for the head of every exit of `plan`.

    W, b minimise the sum over tokens of |W x + b - y|^2 / |y|^2 + r |W - I|^2, x [hidden] the state at the exit, y that
    behind the last step of the plan, both before the final norm; r of `RIDGES` is the best on every fourth sequence.
    Relative, because a norm follows. The first token of a sequence and attention sinks (`SINK`) do not count.
    `weights`: what else the plan names.

    Source: Yom Din et al. 2023 (arXiv 2303.09435, linear shortcuts), the closed form of the tuned lens (Belrose et al.
    2023, arXiv 2303.08112), which is trained on the KL instead. How we differ: the ridge draws towards the identity,
    which is no lens at all. Cost: one pass without the head, and for each exit four matrices [hidden, hidden] in
    float64. Raises U622 for several residual streams, U554 when no token counts, P13x for exits that cannot be decided.
    """
    hidden = open_model(model).spec.stack("decoder").hidden
    heads = {step.name: step.head for step in exits(plan.steps())}
    # the heads have no tensors yet, and the last state is read at an exit, too
    plan = plan.with_steps((*_with_base_heads(plan.steps()), Exit(END, gate=EXIT)))
    seen, sums, done = _Seen(plan), dict[str, tuple[Normal, Normal]](), 0
    for ids, mask in data.batches(batch):
        seen.states.clear()
        with running(model, plan, weights, policy=seen), evaluating(model):
            forward_without_head(model, ids, mask)
        final = seen.states.pop(END)
        if final.dim() != 3 or final.shape[-1] != hidden:
            raise UsageError(
                f"{type(model).__name__} hands on several residual streams, for which there is no lens; take exits "
                "with the model's own head",
                code="U622",
            )
        keep = _counted(final, mask)
        for name, state in seen.states.items():
            pair = sums.setdefault(heads[name], (_normal(state), _normal(state)))
            for row in range(len(keep)):
                held = len(data) >= HELD and (done + row) % HELD == HELD - 1
                _add(pair[held], state[row][keep[row].to(state.device)], final[row][keep[row]])
        done += len(keep)
        if progress is not None:
            progress(done, len(data), "fitting lenses")
    found: dict[str, torch.Tensor] = {}
    for head, (fitted, held_back) in sums.items():
        nothing = torch.eye(hidden, hidden + 1, dtype=torch.float64, device=fitted.xx.device)
        _, solved, _ = best_ridge(fitted, held_back, bias=False, towards=nothing)
        found[f"{head}.lens"] = solved[:, :-1].float().cpu().contiguous()
        found[f"{head}.lens_bias"] = solved[:, -1].float().cpu().contiguous()
    return found


def _with_base_heads(steps: tuple[Step, ...]) -> Iterator[Step]:
    for step in steps:
        match step:
            case Exit():
                yield replace(step, head="base")
            case Run() | Map() | Parallel():
                yield step
            case _:
                assert_never(step)


class _Seen(Policy):
    """Nobody leaves; the state at every exit is kept."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.states: dict[str, torch.Tensor] = {}

    def should_exit(self, step: Exit, forward: ForwardView, view: ExitView) -> Decision:
        self.states[step.name] = view.hidden
        return False


def _counted(final: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """bool [batch, tokens]"""
    real = torch.ones(final.shape[:2], dtype=torch.bool, device=final.device)
    real = real if mask is None else mask.to(final.device).bool()
    norms = final.float().norm(dim=-1)
    return real & (real.cumsum(-1) > 1) & (norms < SINK * norms[real].median())


def _normal(like: torch.Tensor) -> Normal:
    return Normal(like.shape[-1] + 1, like.shape[-1], like.device)


def _add(sums: Normal, x: torch.Tensor, y: torch.Tensor) -> None:
    x, y = in_float64(x), in_float64(y)
    y = y.to(x.device)  # the layers of one model may be on several devices
    scale = 1 / y.norm(dim=-1, keepdim=True)
    sums.add(torch.cat([x, torch.ones_like(scale)], -1) * scale, y * scale)
