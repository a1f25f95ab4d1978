"""The stages of a healing recipe, one after the other, each gone on with where a former run stopped."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shoal.api.heal_texts import texts_of
from shoal.api.tracked import tell_step
from shoal.data import Data
from shoal.evaluation import Progress
from shoal.executing.bind import require_legal
from shoal.executing.weights import Tensors, used_by
from shoal.fitting.result import Job, Transformed
from shoal.healing.fading import with_removed
from shoal.healing.learner import Learner, learning
from shoal.healing.run_folder import RunFolder
from shoal.healing.shown import Shown, side_of
from shoal.healing.stage import Fit, Recipe, Stage, selection_of, term_of
from shoal.healing.train import Run, TrainedStage, seconds_a_step, train
from shoal.healing.windows import Texts
from shoal.models.evaluating import evaluating
from shoal.models.load import Loaded
from shoal.models.opened import OpenedModel
from shoal.plan import Plan
from shoal.plan.edit import drop
from shoal.plan.steps import decides
from shoal.registry import get
from shoal.spelling import chosen

_RESERVED = 0.85
"""The share of asked minutes that training steps get; the rest is for held-out text."""
_PROBE = 16
"""Windows that are read to time a step."""


@dataclass(frozen=True, kw_only=True)
class HealRun:
    """What all stages share."""

    loaded: Loaded
    stack: str
    stages: Recipe
    teacher: OpenedModel | None
    texts: Callable[[int], Texts]
    """So many windows to train on, with those held out."""
    length: int
    causal: bool
    run: Run
    say: Callable[[str], None]
    progress: Progress | None

    @property
    def per_step(self) -> int:
        """Tokens of an optimiser step."""
        return self.run.windows * self.length


@dataclass(frozen=True)
class Made:
    """What the stages made of a plan."""

    plan: Plan
    weights: dict[str, Any]
    policy: str
    """Who decides at the gates of the plan, as typed; "" for nobody."""
    stages: tuple[dict[str, Any], ...]
    train: Data
    held: Data
    stopped: bool


def run_recipe(run: HealRun, plan: Plan, weights: Tensors, amount: dict[str, Any], kept: RunFolder) -> Made:
    """All stages of the recipe, from `plan` with its `weights`."""
    start, whole = (plan, dict(weights)), plan
    steps = _steps(run, plan, weights, amount, kept)
    trained = max(1, math.ceil(sum(steps) * run.per_step / run.length))
    # a transform is fitted on as many windows as it asks for, however few are trained on
    fitted = max((stage.windows for stage in run.stages if isinstance(stage, Fit)), default=0)
    texts = read = run.texts(max(trained, fitted))
    if fitted > trained:
        texts = replace(read, train=read.train.only(range(min(trained, len(read.train)))))
    order = _least_first(run, plan, texts) if any(isinstance(s, Stage) and s.removed < 1 for s in run.stages) else ()
    said: list[dict[str, Any]] = []
    (current, tensors), policy = start, ""
    for number, stage in enumerate(run.stages, 1):
        done = kept.finished_stage(number)
        if done is not None:
            current, tensors, record = done
            policy = record.get("policy", policy)
            said.append(record)
            continue
        if isinstance(stage, Fit):
            current, tensors, record = _fitted(run, stage, current, tensors, read)
        else:
            current = _cut_to(current, run.stack, whole, order, stage.removed)
            if steps[number - 1] == 0:
                continue
            # a later stage goes on with it, as long as it has something to decide
            told = replace(stage, policy=stage.policy or (policy if decides(current.steps(run.stack)) else ""))
            current, tensors, record = _trained(run, told, number, current, tensors, texts, steps[number - 1], kept)
            policy = record["policy"]
        said.append(record)
        if record.get("stopped"):
            return Made(current, tensors, policy, tuple(said), texts.train, texts.held, stopped=True)
        kept.finish_stage(number, current, tensors, record)
    policy = policy if decides(current.steps(run.stack)) else ""
    return Made(current, used_by(current, tensors), policy, tuple(said), texts.train, texts.held, stopped=False)


def _steps(run: HealRun, plan: Plan, weights: Tensors, amount: dict[str, Any], kept: RunFolder) -> list[int]:
    """Optimiser steps of each stage, 0 for a transform: from tokens, or from minutes by timing each stage."""
    known = kept.found("steps")
    if known is not None:
        return [int(n) for n in known]
    shares = [stage.share if isinstance(stage, Stage) else 0.0 for stage in run.stages]
    total = sum(shares) or 1.0
    if "tokens" in amount:
        found = [round(amount["tokens"] * share / total / run.per_step) for share in shares]
        found = [max(n, 1) if share and amount["tokens"] else n for n, share in zip(found, shares, strict=True)]
    else:
        probe = run.texts(_PROBE)
        found = []
        for stage, share in zip(run.stages, shares, strict=True):
            if isinstance(stage, Fit):
                found.append(0)
                continue
            with _learner(run, stage, plan, weights, probe.train) as learner:
                seconds = seconds_a_step(learner, probe.train, run.run, causal=run.causal)
            found.append(max(1, int(amount["minutes"] * 60 * _RESERVED * share / total / seconds)))
        found = run.run.processes.told(lambda: found)
        run.say(f"{amount['minutes']:g} minutes are {sum(found) * run.per_step:,} tokens here")
    kept.remember("steps", found)
    return found


def _learner(run: HealRun, stage: Stage, plan: Plan, weights: Tensors, data: Data) -> Any:
    return learning(
        run.loaded.opened, plan, weights, [selection_of(one) for one in stage.learn],
        [term_of(one) for one in stage.terms], [term_of(one) for one in stage.own_terms], stack=run.stack, data=data,
        teacher=run.teacher, batch=run.run.batch, seed=run.run.seed, fade=stage.fade, policy=stage.policy,
        shuffle=stage.shuffle,
    )  # fmt: skip


def _fitted(
    run: HealRun, stage: Fit, plan: Plan, weights: Tensors, texts: Texts
) -> tuple[Plan, dict[str, Any], dict[str, Any]]:
    began = time.monotonic()
    entry, options = chosen("transforms", stage.transform)
    data = texts.train.only(range(min(stage.windows, len(texts.train))))
    job = Job(run.loaded.model, data, plan, weights, run.stack, run.run.batch, run.run.seed, run.progress)
    made: Transformed = entry.load()(job, **options)
    said = {"transform": stage.transform, "seconds": time.monotonic() - began, **made.to_dict()}
    run.say(f"{stage.transform}: fitted on {data.ids.numel():,} tokens in {said['seconds']:.0f} s")
    return made.plan, used_by(made.plan, made.weights), said


def _trained(
    run: HealRun, stage: Stage, number: int, plan: Plan, weights: Tensors, texts: Texts, steps: int, kept: RunFolder
) -> tuple[Plan, dict[str, Any], dict[str, Any]]:
    """One stage of training: the plan and tensors that it ends with."""
    data, held = texts_of(run, stage, texts, steps, number, kept, (plan, weights))
    name = f"stage {number} of {len(run.stages)}: {stage}"
    run.say(f"{name}, {steps} steps of {run.per_step:,} tokens")
    folder = kept.stage(number)
    with ExitStack() as after:
        place = (
            folder if folder is not None else Path(after.enter_context(tempfile.TemporaryDirectory(prefix="shoal-")))
        )
        torch.manual_seed(run.run.seed + number)  # what learners draw: the first factor of LoRA
        learner: Learner = after.enter_context(_learner(run, stage, plan, weights, data))
        moving = sum(p.numel() for p in learner.moving_tensors.values())
        run.say(f"{moving:,} numbers learn, {run.loaded.opened.spec.params:,} has the whole model")
        done = train(
            learner, (data, held), stage.settings, steps, run.run, folder=place, keep=folder is not None,
            causal=run.causal, tell=_teller(run, name, number, steps), resume=folder is not None,
        )  # fmt: skip
        made, tensors = learner.finished()
        probe = texts.held.ids[:1, : min(64, run.length)]
        live = _last_state(learner, probe)
    found = _shown(run, made, tensors, learner.policy, probe)
    error = float((found.last.float() - live).norm() / live.norm())
    before = kept.found(f"seconds {number}") or 0.0  # of runs that were stopped
    kept.remember(f"seconds {number}", before + done.seconds)
    record = {**_record(stage, done, moving, error), "policy": learner.policy}
    return made, used_by(made, tensors), {**record, "seconds": before + done.seconds}


@torch.no_grad()
def _shown(run: HealRun, plan: Plan, weights: Tensors, policy: str, ids: torch.Tensor) -> Shown:
    """What a plan that has learned shows, bound anew."""
    opened = run.loaded.opened
    legal = require_legal(opened, plan, weights)
    side = side_of(opened, legal, weights, run.stack, policy, lambda: evaluating(opened.model))
    try:
        return side.show(ids, None)
    finally:
        side.remove()


@torch.no_grad()
def _last_state(learner: Learner, ids: torch.Tensor) -> torch.Tensor:
    with evaluating(learner), learner.precision():
        return learner.sides[0].show(ids, None).last.float()


def _record(stage: Stage, done: TrainedStage, moving: int, error: float) -> dict[str, Any]:
    return {
        "stage": str(stage), "told": stage.to_dict(), "moving": moving, "steps": done.steps, "tokens": done.tokens,
        "seconds": done.seconds, "held_before": done.held_before, "held_after": done.held_after,
        "curve": list(done.curve), "stopped": done.stopped, "note": done.note,
        "merged_error": error,
    }  # fmt: skip


def _teller(run: HealRun, name: str, number: int, steps: int) -> Callable[[dict[str, Any], int, int], None]:
    """Says after each evaluation where training stands, with tokens a second and the time left."""
    first: list[tuple[float, int]] = []
    state: dict[str, float] = {}

    def tell(entry: dict[str, Any], done: int, _: int) -> None:
        tell_step(run.run.told, entry, number, run.stages, done)
        if not first:
            first.append((time.monotonic(), done))
        if "loss" in entry:
            state["loss"] = entry["loss"]
        if run.progress is not None:
            run.progress(done * run.per_step, steps * run.per_step, name)
        if "held_loss" not in entry:
            return
        seconds, made, pace = time.monotonic() - first[0][0], done - first[0][1], ""
        if made and seconds:
            left = (steps - done) * seconds / made / 60
            pace = f", {made * run.per_step / seconds:.0f} tokens a second, {left:.1f} minutes left"
        loss = f", loss {state['loss']:.4f}" if "loss" in state else ""
        run.say(f"step {done} of {steps}: held-out loss {entry['held_loss']:.4f}{loss}{pace}")

    return tell


def _least_first(run: HealRun, plan: Plan, texts: Texts) -> tuple[int, ...]:
    """The removed layers, the one with the least block influence first."""
    data = texts.train.only(range(min(8, len(texts.train))))
    scores = get("measures", "block-influence").load()(run.loaded.model, data, stack=run.stack)
    return tuple(sorted(plan.dropped(run.stack), key=lambda layer: scores.values[layer]))


def _cut_to(current: Plan, stack: str, whole: Plan, order: Sequence[int], share: float) -> Plan:
    """`current` in which that share of the layers that `whole` removes is gone."""
    if not order:
        return current
    gone = set(order[: max(1, round(share * len(order)))])
    back = sorted(set(current.dropped(stack)) - gone)
    plan = with_removed(current, stack, back)
    leave = gone - set(plan.dropped(stack))
    return drop(plan, leave, stack=stack) if leave else plan
