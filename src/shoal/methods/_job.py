"""What every method is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shoal.fitting.result import Job, Transformed
from shoal.plan import Spec
from shoal.scores import Budget, Found, Legal, Objective

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


Task = PruningJob
"""The former name, which the files of users may import."""
