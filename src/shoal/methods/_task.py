"""What every method is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shoal.fitting.result import Job, Transformed
from shoal.plan import Plan, Spec
from shoal.scores import Budget, Found, Legal, Objective

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress


@dataclass(frozen=True)
class Task:
    """A model and what a method may do with it."""

    model: Any
    data: Data
    """Calibration sequences; nothing at all for a method that says `READS_DATA = False`."""
    plan: Plan
    """Where the search starts, usually the identity."""
    spec: Spec
    legal: Legal
    objective: Callable[[Data], Objective]
    """Data -> the cross-entropy of a plan on them, each plan computed once and kept in the journal."""
    keep: Callable[[Objective, str], Objective] = lambda own, name: own
    """A method's own objective and a name that tells what it is computed on -> the same, each plan computed once and
    kept in the journal."""
    stack: str | None = None
    batch: int = 1
    seed: int = 0
    budget: Budget | None = None
    """What the result may cost, when that was asked for; a method that is given `drop` removes so many layers."""
    progress: Progress | None = None
    tokenizer: Any = None

    def then(self, transform: Callable[..., Transformed], found: Found, **options: Any) -> Found:
        """`found` with what the transform puts in the place of what was removed, fitted on the calibration text."""
        job = Job(self.model, self.data, found.plan, found.weights, self.stack, self.batch, self.seed, self.progress)
        made = transform(job, **options)
        return replace(found, plan=made.plan, weights=made.weights)
