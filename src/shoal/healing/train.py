"""One stage of training, from the first step or a checkpoint to the tensors that held-out text likes best."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from shoal.data import Data
from shoal.errors import UsageError, first_line, is_out_of_memory, note
from shoal.healing.learner import Learner
from shoal.healing.processes import Processes
from shoal.healing.stage import Settings
from shoal.healing.trainer import HealTrainer, NotFiniteError, Pace, Tell, arguments, last_checkpoint
from shoal.healing.windows import Windows, collated
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.report.tracking import Tracked


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a stage is run on this machine; none of it changes what is computed but for `batch` and `accumulate`."""

    batch: int = 2
    """Windows in a forward."""
    accumulate: int = 1
    """Forwards in a step."""
    seed: int = 0
    save_every: float = 60.0
    """Seconds between two checkpoints."""
    told: Tracked = field(default_factory=Tracked)
    """Who is told of each step besides: tensorboard, wandb, ..."""
    stop: Callable[[], bool] = lambda: False
    """Asked after each step."""
    processes: Processes = field(default_factory=Processes)
    """Those that share the work: each reads `batch` x `accumulate` windows in a step."""

    @property
    def windows(self) -> int:
        """Of an optimiser step, in all processes."""
        return self.batch * self.accumulate * self.processes.count


@dataclass(frozen=True)
class TrainedStage:
    """What a stage did."""

    steps: int
    """Optimiser steps that were made."""
    tokens: int
    """Read in them, padding included."""
    seconds: float
    """Of this process; a stage that was gone on with took more in all."""
    curve: tuple[dict[str, Any], ...] = field(repr=False)
    """Losses by step."""
    held_before: float
    held_after: float
    """The objective on held-out text at the start and for what was kept."""
    stopped: bool
    """Whether it was told to stop before its end."""
    note: str = ""


def train(
    learner: Learner, texts: tuple[Data, Data], settings: Settings, steps: int, run: Run, *, folder: Path, keep: bool,
    causal: bool, tell: Tell, resume: bool = False,
) -> TrainedStage:  # fmt: skip
    """Train `learner` for so many steps on the first of `texts`; it ends with what the second, held out, likes best,
    which may be its start.

    `folder` holds checkpoints where `keep` says so; with `resume` the newest one is gone on from. Raises U674 where
    memory is too small.
    """
    held = held_loss(learner, texts[1], causal=causal, batch=run.batch, processes=run.processes)
    place = last_checkpoint(folder) if resume else None
    start = learner.copies()
    windows, rest = Windows(texts[0], causal=causal), Windows(texts[1], causal=causal)
    args = arguments(
        folder, settings, steps=steps, batch=run.batch, accumulate=run.accumulate, seed=run.seed,
        device=device_of(learner.model), fresh=place is None,
        every=settings.steps_between(steps, steps * run.windows, len(rest)),
    )  # fmt: skip
    pace = Pace(
        run.save_every if keep else None, run.stop, evaluates=bool(settings.evaluations), processes=run.processes,
        averages=learner.averages,
    )  # fmt: skip
    trainer = HealTrainer(
        learner, held, settings, tell, run.processes, args=args, train_dataset=windows, eval_dataset=rest,
        data_collator=collated,
        optimizers=_optimiser(learner, settings, steps),
        callbacks=[pace],
    )  # fmt: skip
    began, said = time.monotonic(), ""
    try:
        trainer.train(resume_from_checkpoint=None if place is None else str(place))
    except NotFiniteError as error:
        said = f"the loss was not a number at step {error.step}; what held-out text liked best before is kept"
        note(said)
        if trainer.best is None:
            learner.put(start)
    except (MemoryError, RuntimeError) as error:
        _refuse_memory(error, run)
        raise
    if trainer.best is not None:
        learner.put(trainer.best)
    elif settings.evaluations and not pace.stopped:
        learner.put(start)
    history = tuple(trainer.state.log_history)
    looked = [entry["held_loss"] for entry in history if "held_loss" in entry]
    done = trainer.state.global_step
    return TrainedStage(
        done,
        done * run.windows * texts[0].info.length,
        time.monotonic() - began,
        tuple(_plain(entry) for entry in history if "train_runtime" not in entry),
        looked[0] if looked else float("nan"),
        min(looked, default=float("nan")),
        pace.stopped and done < steps,
        said,
    )


def held_loss(
    learner: Learner, data: Data, *, causal: bool, batch: int, processes: Processes | None = None
) -> Callable[[], float]:
    """Computes the objective on held-out windows, per token that counts; each process takes a share of the batches."""
    group = processes or Processes()
    windows = Windows(data, causal=causal)
    items = windows.counted()

    def loss() -> float:
        total = 0.0
        device = device_of(learner.model)
        with evaluating(learner):
            for at in range(group.rank * batch, len(windows), group.count * batch):
                rows = collated([windows[n] for n in range(at, min(at + batch, len(windows)))])
                found = learner(**{name: tensor.to(device) for name, tensor in rows.items()}, num_items_in_batch=items)
                total += float(found["loss"])
        return group.summed(total)

    return loss


def seconds_a_step(learner: Learner, data: Data, run: Run, *, causal: bool, steps: int = 3) -> float:
    """Wall clock of one step, over a few that change nothing."""
    windows, device = Windows(data, causal=causal), device_of(learner.model)
    rows = collated([windows[n % len(windows)] for n in range(run.batch)])
    batch = {name: tensor.to(device) for name, tensor in rows.items()}
    times = []
    with torch.random.fork_rng():
        learner.train()
        for _ in range(steps):
            began = time.monotonic()
            learner(**batch)["loss"].backward()
            times.append(time.monotonic() - began)
    for parameter in learner.moving_tensors.values():
        parameter.grad = None
    return sorted(times)[len(times) // 2] * run.accumulate


def _optimiser(learner: Learner, settings: Settings, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW with its schedule; each learner's tensors are a group with its own rate."""
    groups = [
        {"params": list(moving.parameters.values()), "lr": settings.rate if moving.rate is None else moving.rate}
        for moving in learner.movings
    ]
    optimiser = torch.optim.AdamW(groups, lr=settings.rate, betas=settings.betas, weight_decay=settings.decay)
    return optimiser, LambdaLR(optimiser, lambda step: settings.factor(step, steps))


def _refuse_memory(error: Exception, run: Run) -> None:
    if is_out_of_memory(error):
        raise UsageError(
            f"memory is too small for {run.batch} windows at a time ({first_line(error, 120)}); use --batch 1 with "
            f"--accumulate {run.batch * run.accumulate}, or shorter windows (--length)",
            code="U674",
        ) from None


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in sorted(entry) if name != "epoch"}
