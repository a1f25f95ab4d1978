"""What every method is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import UsageError
from shoal.evaluation.tasks import Tasks, load_tasks, score_tasks
from shoal.evaluation.translations import Translations, load_translations, score_translations
from shoal.fitting.result import Job, Transformed
from shoal.ledger import Ledger
from shoal.live import running
from shoal.models.kinds import require_answers
from shoal.plan import Plan, Spec
from shoal.plan.steps import runs
from shoal.scores import Budget, Candidate, Found, Legal, Objective
from shoal.transforms.grow import grow

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress


@dataclass(frozen=True, kw_only=True)
class PruningJob(Job):
    """What a transform is given, and what a method may do besides: search plans and judge them. `plan` is where the
    search starts, usually the identity; `data` is nothing at all for a method that says `READS_DATA = False`."""

    spec: Spec
    legal: Legal
    objective: Callable[[Data], Objective]
    """Data -> the cross-entropy of a plan on them, each plan computed once and kept in the journal."""
    keep: Callable[[Objective, str], Objective] = lambda own, name: own
    """A method's own objective and a name that tells what it is computed on -> the same, each plan computed once and
    kept in the journal."""
    memo: Ledger[Any] = field(default_factory=Ledger)
    """What the searches on this model have computed, by what it was computed from; nothing as large as a weight."""
    budget: Budget | None = None
    """What the result may cost, when that was asked for; a method that is given `drop` removes so many layers."""
    tokenizer: Any = None

    def in_round(self, number: int, rounds: int) -> Progress | None:
        """Progress for one of several equal rounds, counted from 0."""
        tell = self.progress
        if tell is None:
            return None
        return lambda done, total, what: tell(number * total + done, rounds * total, what)

    def then(self, transform: Callable[..., Transformed], found: Found, **options: Any) -> Found:
        """`found` with what the transform puts in the place of what was removed, fitted on the calibration text."""
        job = Job(self.model, self.data, found.plan, found.weights, self.stack, self.batch, self.seed, self.progress)
        made = transform(job, **options)
        return replace(found, plan=made.plan, weights=made.weights)

    def grown(self, **options: Any) -> Found:
        """The plan with the layers that the transform `grow` adds. Raises U664 where it is not legal, and as that
        does."""
        found = self.then(grow, Found(self.plan), **options)
        steps = tuple(replace(run, weights=None) for run in runs(found.plan.steps(self.stack)))
        if not self.legal(self.plan.with_steps(steps, self.stack)):
            raise UsageError(
                f"the deeper plan {found.plan!s:.80} is not legal for this model; allow plans that only run live",
                code="U664",
            )
        return replace(found, trace=(Candidate(str(found.plan), math.nan, "as the formula says"),))

    def on_task(self, method: str, file: Path | None, items: int) -> Objective:
        """What is wrong of the first `items` of a task file (see `shoal.evaluation.tasks`), kept in the journal.

        Of translations, {source, target} a line, 1 - BLEU / 100 over the tokenizer's own tokens; otherwise the share of
        wrong items; plus a thousandth of the mean negative log-likelihood of the right answers, which parts ties.
        Raises D450, D451, U574 without a file or a tokenizer, M322 for a model that writes no text.
        """
        if file is None:
            raise UsageError(f"{method} needs the user's task; name its file, as in --set file=task.jsonl", code="U574")
        if self.tokenizer is None:
            raise UsageError(
                f"{method} reads a task and the model has no tokenizer that can be read; load one with it", code="U574"
            )
        require_answers(self.model, method)
        task = load_translations(file, limit=items) or load_tasks(file, limit=items)
        return self.keep(partial(_wrong, self, task), f"{method} on {items} items of {task.sha256}")


def _wrong(job: PruningJob, task: Tasks | Translations, plan: Plan) -> float:
    batch = max(8, job.batch)
    with running(job.model, plan):
        if isinstance(task, Translations):
            value, nll = score_translations(job.model, job.tokenizer, task, batch=batch)
            return 1 - value / 100 + nll / 1000
        found = score_tasks(job.model, job.tokenizer, task, batch=batch)
    return 1 - found.accuracy + found.nll / 1000


Task = PruningJob
"""The former name, which the files of users may import."""
