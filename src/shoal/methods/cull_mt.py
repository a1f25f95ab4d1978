"""CULL-MT: greedy on the score of the user's own task."""

from __future__ import annotations

from pathlib import Path

from shoal.errors import UsageError
from shoal.evaluation.tasks import load_tasks, score_tasks
from shoal.examples import MethodExamples
from shoal.live import running
from shoal.methods._job import PruningJob
from shoal.plan import Plan
from shoal.scores import Found
from shoal.search.greedy import greedy

SEARCHES = True
EXAMPLES = MethodExamples(needed={"file": "{task}", "items": 2}, chooses_by="place")


def cull_mt(job: PruningJob, *, drop: int, file: Path | None = None, items: int = 100) -> Found:
    """In each round remove the layer without which the task's score falls least; ties go to the likelier answers.

    `file`: last words or multiple choice (see `shoal.evaluation.tasks`), its first `items`. The objective is the share
    of wrong items, plus a thousandth of the mean negative log-likelihood of the right answers, which parts ties.

    Source: Rostami and Dousti 2024 (CULL-MT, arXiv 2411.06506).

    How we differ: any task of such a file instead of a translation score, and healing is a step of its own. Raises
    D450, D451, U574 without a file or a tokenizer.
    """
    if file is None:
        raise UsageError("cull-mt needs the user's task; name its file, as in --set file=task.jsonl", code="U574")
    if job.tokenizer is None:
        raise UsageError("cull-mt reads a task and the model has no tokenizer; load one with it", code="U574")
    tasks = load_tasks(file, limit=items)

    def objective(plan: Plan) -> float:
        with running(job.model, plan):
            found = score_tasks(job.model, job.tokenizer, tasks, batch=max(8, job.batch))
        return 1 - found.accuracy + found.nll / 1000

    return greedy(
        job.plan,
        objective=job.keep(objective, f"cull-mt on {items} items of {tasks.sha256}"),
        drop=drop,
        legal=job.legal,
        stack=job.stack,
        progress=job.progress,
    )
