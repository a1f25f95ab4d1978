"""CULL-MT: greedy on the score of the user's own task."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from shoal.errors import UsageError
from shoal.evaluation.tasks import Tasks, load_tasks, score_tasks
from shoal.evaluation.translations import Translations, load_translations, score_translations
from shoal.examples import MethodExamples
from shoal.live import running
from shoal.methods._job import PruningJob
from shoal.models.kinds import require_answers
from shoal.plan import Plan
from shoal.scores import Found
from shoal.search.greedy import greedy

SEARCHES = True
EXAMPLES = MethodExamples(needed={"file": "{task}", "items": 2}, chooses_by="place")


def cull_mt(job: PruningJob, *, drop: int, file: Path | None = None, items: int = 100) -> Found:
    """In each round remove the layer without which the task's score falls least; ties go to the likelier answers.

    `file`: translations, {source, target} a line, or last words or multiple choice (see `shoal.evaluation.tasks`); its
    first `items`. Translations are written greedily and the objective is 1 - BLEU / 100 over the tokenizer's own tokens
    (`shoal.evaluation.translations.bleu`), otherwise the share of wrong items; plus a thousandth of the mean negative
    log-likelihood of the right answers, which parts ties. Of an encoder-decoder the layers of both stacks may go,
    unless a stack is named; `drop` counts them together.

    Source: Rostami and Dousti 2024 (CULL-MT, arXiv 2411.06506).

    How we differ: BLEU over the model's own tokens instead of spBLEU over those of FLORES-200, any other task of such a
    file too, and healing is a step of its own. Raises D450, D451, U574 without a file or a tokenizer, M322 for a model
    that writes no text.
    """
    if file is None:
        raise UsageError("cull-mt needs the user's task; name its file, as in --set file=task.jsonl", code="U574")
    if job.tokenizer is None:
        raise UsageError(
            "cull-mt reads a task and the model has no tokenizer that can be read; load one with it", code="U574"
        )
    require_answers(job.model, "cull-mt")
    task = load_translations(file, limit=items) or load_tasks(file, limit=items)
    names = [name for name, _ in job.plan.stacks] if job.stack is None else [job.stack]
    return greedy(
        job.plan,
        objective=job.keep(partial(_wrong, job, task), f"cull-mt on {items} items of {task.sha256}"),
        drop=drop,
        legal=job.legal,
        stack=names if len(names) > 1 else job.stack,
        progress=job.progress,
    )


def _wrong(job: PruningJob, task: Tasks | Translations, plan: Plan) -> float:
    """What greedy makes small."""
    batch = max(8, job.batch)
    with running(job.model, plan):
        if isinstance(task, Translations):
            value, nll = score_translations(job.model, job.tokenizer, task, batch=batch)
            return 1 - value / 100 + nll / 1000
        found = score_tasks(job.model, job.tokenizer, task, batch=batch)
    return 1 - found.accuracy + found.nll / 1000
