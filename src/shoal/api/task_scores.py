"""Task sets and their scores: Shoal scores a .jsonl file itself, and lm-eval scores everything else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shoal.evaluation import Progress
from shoal.evaluation.lm_eval import LmEvalTasks, load_lm_eval, score_lm_eval
from shoal.evaluation.tasks import Tasks, TaskScore, load_tasks, score_tasks

TaskSet = Tasks | LmEvalTasks


def load_task_sets(names: Iterable[str | Path], *, limit: int | None = None) -> tuple[TaskSet, ...]:
    """What each name stands for: a .jsonl file (see `load_tasks`), or a task, a group or a .yaml file of lm-eval.

    `limit`: the first so many items of each. Raises `DataError` D450 to D453, `UsageError` U575 without lm-eval.
    """
    return tuple(load_tasks(name, limit=limit) if _ours(name) else load_lm_eval(str(name), limit) for name in names)


def task_scores(
    model: Any, tokenizer: Any, asked: Iterable[TaskSet], *, batch: int = 8, progress: Progress | None = None
) -> dict[str, TaskScore]:
    """Score by name, one for each task of a group, of the model as it runs now."""
    found: dict[str, TaskScore] = {}
    for task_set in asked:
        if isinstance(task_set, Tasks):
            found[task_set.name] = score_tasks(model, tokenizer, task_set, batch=batch, progress=progress)
        else:
            found |= {one.name: one for one in score_lm_eval(model, tokenizer, task_set, batch=batch)}
    return found


def _ours(name: str | Path) -> bool:
    path = Path(name).expanduser()
    return path.suffix == ".jsonl" or (path.is_file() and path.suffix not in (".yaml", ".yml"))
