"""Task sets and their scores: Shoal scores a .jsonl file itself, and lm-eval scores everything else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.data.spelled import told_apart
from shoal.evaluation import Progress
from shoal.evaluation.lm_eval import LmEvalTasks, load_lm_eval, score_lm_eval
from shoal.evaluation.tasks import Tasks, TaskScore, load_tasks, score_tasks

TaskSet = Tasks | LmEvalTasks


def load_task_sets(names: Iterable[str | Path], *, limit: int | None = None) -> tuple[TaskSet, ...]:
    """What each name stands for: a .jsonl file (see `load_tasks`), or a task, a group or a .yaml file of lm-eval.

    `limit`: the first so many items of each. Raises `DataError` D450 to D453, `UsageError` U575 without lm-eval.
    """
    asked = list(names)
    called = told_apart(map(str, asked), _short)
    return tuple(
        replace(load_tasks(name, limit=limit), name=called[str(name)])
        if _ours(name)
        else load_lm_eval(str(name), limit)
        for name in asked
    )


def task_scores(
    model: Any, tokenizer: Any, asked: Iterable[TaskSet], *, batch: int = 8, progress: Progress | None = None
) -> dict[str, TaskScore]:
    """Score by name, one for each task of a group, of the model as it runs now. Where another task of lm-eval has the
    name already, that of the file or group is added."""
    found: dict[str, TaskScore] = {}
    for task_set in asked:
        if isinstance(task_set, Tasks):
            scores = [score_tasks(model, tokenizer, task_set, batch=batch, progress=progress)]
        else:
            scores = score_lm_eval(model, tokenizer, task_set, batch=batch)
        for score in scores:
            taken = found.get(score.name, score) != score
            one = replace(score, name=f"{score.name} of {task_set.name}") if taken else score
            found[one.name] = one
    return found


def _short(name: str, parts: int) -> str:
    """A file by the last parts of its path, without its suffix; a task of lm-eval by its name."""
    path = Path(name).expanduser()
    return Path(*path.parts[-parts:]).with_suffix("").as_posix() if _ours(name) else name


def _ours(name: str | Path) -> bool:
    path = Path(name).expanduser()
    return path.suffix == ".jsonl" or (path.is_file() and path.suffix not in (".yaml", ".yml"))
