"""Learning the betas of a schedule from recorded sampling runs, and what a schedule costs in accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.evaluation import Progress
from shoal.fitting.train import frozen
from shoal.models.precision import in_float64
from shoal.reuse.branches import Call, around_forwards, copied
from shoal.reuse.running import SteppedRun, first_tensor, reusing
from shoal.reuse.schedule import ReuseSchedule

LARGEST = 5.0
"""A parameter stays between this and its negative, so that a beta can come back."""


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[list[Call]]:
    """Until the end of the block the list grows by what the model is called with: with one sampling run in the block,
    what `fit_reuse` learns from."""
    calls: list[Call] = []

    def note(forward: Callable[[], Any], call: Call) -> Any:
        calls.append(copied(call))
        return forward()

    with around_forwards([(model, note)]):
        yield calls


@dataclass(frozen=True)
class FittedReuse:
    """A schedule that was learned."""

    schedule: ReuseSchedule
    losses: tuple[float, ...]
    """The mean loss of each epoch."""


def fit_reuse(
    model: nn.Module,
    schedule: ReuseSchedule,
    runs: Sequence[Sequence[Call]],
    *,
    weight: float = 1e-6,
    rate: float = 1e-2,
    epochs: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> FittedReuse:
    """Learn which branches a sampler can reuse in which step; the model stands still.

    For step t that is not full, with y_i what branch i made in the full step before it, branch i hands on
    (1 - beta_ti) y_i + beta_ti b_i(x), beta_ti = sigmoid(a_ti) whatever the input x is; b_i computes in the stream that
    is already mixed. Minimised is the mean of (model mixed - model dense)^2 over the elements of the model's output
    (of several the first) + `weight` sum_i beta_ti, by AdamW without decay on the a_t of one drawn step after the
    other, each once in an epoch and run; a stays in [-5, 5]. Three forwards a step: the full one, the dense and the
    mixed one.

    `schedule` says branches, groups and threshold; its betas are where the a begin. `runs`: for each sampling run what
    the model was called with in each step (`recorded_calls`). Larger `weight`s reuse more: below the threshold goes
    what the output misses less than that.

    Raises U707 for numbers that cannot be learned with, U708 for runs of other lengths, U709 for branches that cannot
    be reused or a loss that is no number.

    Source: Ma et al. 2024 (Learning-to-Cache, arXiv 2406.01733), as in its released code for DiT: MSE to the dense
    output, AdamW without decay, clamped; weights 1e-6 to 5e-6, rates 1e-3 and 1e-2, thresholds 0.1 and 0.9.

    How we differ: states come from recorded runs of the sampler, not from noised images and one step of DDIM, so no
    images are needed; parameters begin at the schedule's betas in place of normal random numbers, so that a result does
    not depend on them.
    """
    _check(schedule, runs, weight, rate, epochs)
    generator = torch.Generator().manual_seed(seed)
    learning = _Learning(model, schedule, weight, rate)
    places = [(calls, step) for calls in runs for step in range(schedule.steps) if not schedule.is_full(step)]
    losses: list[float] = []
    with frozen(model):
        for epoch in range(epochs):
            order = torch.randperm(len(places), generator=generator).tolist()
            losses.append(sum(learning.step(*places[at]) for at in order) / len(places))
            if progress is not None:
                progress(epoch + 1, epochs, "betas")
    return FittedReuse(replace(schedule, betas=learning.betas()), tuple(losses))


@torch.no_grad()
def reuse_error(model: nn.Module, schedule: ReuseSchedule, runs: Sequence[Sequence[Call]]) -> float:
    """How far the model's outputs under `schedule` are from the dense ones on recorded runs: sum of squared differences
    over sum of squares, over all steps. Each step is given what the dense run gave it, so errors do not add up."""
    _check(schedule, runs)
    missed = size = 0.0
    with frozen(model):
        for calls in runs:
            dense = [in_float64(_output(model(*args, **kwargs))) for args, kwargs in calls]
            with reusing(model, schedule):
                for (args, kwargs), wanted in zip(calls, dense, strict=True):
                    missed += float((in_float64(_output(model(*args, **kwargs))) - wanted).square().sum())
                    size += float(wanted.square().sum())
    return missed / size if size else missed


class _MixedRun(SteppedRun):
    """One full step, and one behind it in which what is kept and what is computed are mixed."""

    def __init__(self, schedule: ReuseSchedule, betas: torch.Tensor) -> None:
        super().__init__(schedule)
        self.betas = betas

    def answer(self, step: int, at: int, name: str, forward: Callable[[], Any], call: Call) -> Any:
        out, kept = forward(), self.last_made(name, call)
        beta = self.betas[at].to(first_tensor(name, out).dtype)
        mixed = (1 - beta) * first_tensor(name, kept) + beta * first_tensor(name, out)
        return (mixed, *out[1:]) if isinstance(out, tuple) else mixed


class _Learning:
    """The parameters of the betas, and what moves them."""

    def __init__(self, model: nn.Module, schedule: ReuseSchedule, weight: float, rate: float) -> None:
        self.model, self.schedule, self.weight = model, schedule, weight
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        most = torch.tensor(LARGEST).sigmoid()
        start = schedule.betas.detach().float().clamp(1 - most, most).logit().to(device)
        self.rows = [row.clone().requires_grad_() for row in start]
        self.optimiser = torch.optim.AdamW(self.rows, lr=rate, weight_decay=0.0)

    def step(self, calls: Sequence[Call], step: int) -> float:
        """Move the row of one step; the loss before."""
        row = self.rows[step]
        loss = self._loss(calls[step - step % self.schedule.every], calls[step], row.sigmoid())
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UsageError(
                f"the loss of step {step} is {value}, so no beta can be learned from it; look at what the model makes "
                "of these calls",
                code="U709",
            )
        self.optimiser.zero_grad(set_to_none=True)  # a row without a gradient is not moved
        (row.grad,) = torch.autograd.grad(loss, [row])
        self.optimiser.step()
        with torch.no_grad():
            row.clamp_(-LARGEST, LARGEST)
        return value

    def _loss(self, full: Call, own: Call, betas: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = _output(self.model(*own[0], **own[1])).float()
        with _MixedRun(self.schedule, betas).around(self.model):
            with torch.no_grad():
                self.model(*full[0], **full[1])
            with torch.enable_grad():
                found = _output(self.model(*own[0], **own[1])).float()
                return (found - wanted).square().mean() + self.weight * betas.sum()

    def betas(self) -> torch.Tensor:
        """[steps, branches] on the CPU, 1 in full steps."""
        learned = torch.stack([row.detach().sigmoid() for row in self.rows]).cpu()
        full = torch.tensor([self.schedule.is_full(step) for step in range(self.schedule.steps)])
        return torch.where(full[:, None], 1.0, learned)


def _output(out: Any) -> torch.Tensor:
    """What a model answers, of several tensors the first."""
    while not isinstance(out, torch.Tensor):
        values = list(out.values()) if isinstance(out, Mapping) else list(out) if isinstance(out, tuple | list) else []
        if not values:
            raise UsageError("the model answers no tensor, so nothing can be learned from it", code="U709")
        out = values[0]
    return out


def _check(
    schedule: ReuseSchedule, runs: Sequence[Sequence[Call]], weight: float = 0.0, rate: float = 1.0, epochs: int = 1
) -> None:
    if weight < 0 or rate <= 0 or epochs < 1:
        raise UsageError(
            f"betas cannot be learned with weight={weight:g}, rate={rate:g}, epochs={epochs}; give a weight of 0 or "
            "more, and a rate and epochs above 0",
            code="U707",
        )
    lengths = {len(calls) for calls in runs}
    if lengths != {schedule.steps}:
        found = ", ".join(map(str, sorted(lengths))) or "no"
        raise UsageError(
            f"the schedule has {schedule.steps} steps, and the recorded runs have {found}; record runs of the "
            "same sampler",
            code="U708",
        )
    if schedule.steps < 2:
        raise UsageError("a sampling run of one step has nothing to reuse", code="U708")
