"""What every method is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.plan import Plan, Spec
from shoal.scores import Legal, Objective

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
    stack: str | None = None
    batch: int = 1
    seed: int = 0
    progress: Progress | None = None
