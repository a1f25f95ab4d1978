"""CULL-MT: greedy on the score of the user's own task."""

from __future__ import annotations

from pathlib import Path

from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
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
    objective = job.on_task("cull-mt", file, items)
    names = [name for name, _ in job.plan.stacks] if job.stack is None else [job.stack]
    return greedy(
        job.plan,
        objective=objective,
        drop=drop,
        legal=job.legal,
        stack=names if len(names) > 1 else job.stack,
        progress=job.progress,
    )
