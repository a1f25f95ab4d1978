"""A cascade over the items of a task: a cheap plan answers what it is sure of, the others go on to the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from shoal.errors import UsageError
from shoal.evaluation.scoring import Progress
from shoal.evaluation.staged import NEVER, Stages
from shoal.evaluation.tasks import Tasks, option_scores

Stage = Callable[[], AbstractContextManager[Any]]
"""Yields the model while one plan of the cascade runs on it."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What one plan says of each item."""

    choice: np.ndarray
    """int [items]: the likeliest option; -1 where the model gave no number."""
    sure: np.ndarray
    """float64 [items]: the probability of that option among all, softmax over their log-likelihoods as wholes."""

    def wrong(self, tasks: Tasks) -> np.ndarray:
        """bool [items]."""
        found: np.ndarray = self.choice != np.array([item.gold for item in tasks.items])
        return found


@dataclass(frozen=True, eq=False)
class Cascaded:
    """What a cascade said of each item, and by which plan."""

    answers: Answers
    stage: np.ndarray
    """int [items]: the number of the plan whose answer it is."""
    asked: tuple[int, ...]
    """Items that each plan has read."""
    seconds: float


def require_choices(tasks: Any) -> Tasks:
    """The items, each with a choice among several options. Raises U702 for those of lm-eval and for last words."""
    if not isinstance(tasks, Tasks) or any(len(item.options) < 2 for item in tasks.items):
        raise UsageError(
            f"{tasks.name}: a cascade needs items with several choices, of which a plan can say how sure it is; name a "
            ".jsonl file of {query, choices, gold}",
            code="U702",
        )
    return tasks


def answers(model: Any, tokenizer: Any, tasks: Tasks, *, batch: int = 8, progress: Progress | None = None) -> Answers:
    """The likeliest option of each item by the model as it runs now, and how sure it is of it."""
    choice, sure = [], []
    for options in option_scores(model, tokenizer, tasks, batch=batch, progress=progress):
        scores = np.array([one.logprob for one in options])
        best = int(scores.argmax())
        known = not np.isnan(scores).any()
        choice.append(best if known else -1)
        sure.append(1 / np.exp(scores - scores[best]).sum() if known else 0.0)
    return Answers(np.array(choice), np.array(sure))


def stages_of(recorded: Sequence[Answers], tasks: Tasks, costs: Sequence[float]) -> Stages:
    """Recorded answers of all plans, cheap ones first, as stages. `costs`: of reading an item by each, as a share of
    the last one's. Asking a plan costs, whether its answer is taken or not."""
    wrong = np.stack([one.wrong(tasks) for one in recorded])
    ends = np.array([0.0] * (len(recorded) - 1) + [costs[-1]])
    share = np.full(len(tasks.items), 1 / len(tasks.items))
    return Stages(np.stack([one.sure for one in recorded[:-1]]), wrong, ends, np.array(costs[:-1]), share)


def run_cascade(
    stages: Sequence[Stage],
    tokenizer: Any,
    tasks: Tasks,
    thresholds: Sequence[float],
    *,
    batch: int = 8,
    progress: Progress | None = None,
) -> Cascaded:
    """Ask the plans one after the other: an item is answered by the first that is at least as sure as its threshold,
    and by the last one where none is. A plan whose threshold is infinite is not asked.

    Source: Li et al. 2015 (a convolutional neural network cascade for face detection, CVPR), Yang et al. 2016 (cascaded
    rejection classifiers, CVPR).

    How we differ: there a stage rejects what is no object, and what it keeps goes on; here each stage may give any
    answer that it is sure of, and one model makes the stages, as plans of its layers.
    """
    count, start = len(tasks.items), perf_counter()
    choice, sure, stage = np.full(count, -1), np.zeros(count), np.full(count, -1)
    left, asked = np.arange(count), []
    for number, (context, threshold) in enumerate(zip(stages, (*thresholds, -np.inf), strict=True)):
        if threshold == NEVER or not len(left):
            asked.append(0)
            continue
        asked.append(len(left))
        with context() as model:
            some = replace(tasks, items=tuple(tasks.items[item] for item in left))
            found = answers(model, tokenizer, some, batch=batch, progress=progress)
        done = found.sure >= threshold
        choice[left[done]], sure[left[done]], stage[left[done]] = found.choice[done], found.sure[done], number
        left = left[~done]
    return Cascaded(Answers(choice, sure), stage, tuple(asked), perf_counter() - start)
