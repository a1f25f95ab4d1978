"""What `prune` found, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shoal.api.assess import Bench, Evaluation
from shoal.data import Data
from shoal.models.load import Loaded
from shoal.plan import Cost, Plan, Spec
from shoal.record import Record, plain
from shoal.scores import Candidate, Found


@dataclass(frozen=True)
class Pruned:
    """What `prune` found. `before` and `after` are costs; evaluation and bench are None when not asked for."""

    loaded: Loaded
    spec: Spec
    plan: Plan
    method: str
    found: Found
    before: Cost
    after: Cost
    data: Data | None
    evaluation: Evaluation | None = None
    bench: Bench | None = None
    price: dict[str, Any] | None = None
    """Of a search within a budget: unit, share asked for, price; for times also the error and the measured share."""
    records: tuple[Record, ...] = field(default=())
    """Of what was done besides: healing."""
    card: tuple[dict[str, Any], ...] = ()
    """Rows of the model card about it."""
    then: tuple[dict[str, Any], ...] = ()
    """What each transform after the method did, with the errors of its stand-ins."""
    files: tuple[dict[str, str], ...] = ()
    """Path and sha256 of the user's own files among the method and the transforms."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json and the records; what is not finite is None."""
        return {
            "method": self.method,
            "plan": str(self.plan),
            "hash": self.plan.hash,
            "dropped": {name: list(self.plan.dropped(name)) for name, _ in self.plan.stacks},
            "data": None if self.data is None else self.data.info.to_dict(),
            "cost": {"dense": self.before.to_dict(), "pruned": self.after.to_dict()},
            "price": plain(self.price),
            "scores": None if self.found.scores is None else self.found.scores.to_dict(),
            "trace": [_candidate(one) for one in self.found.trace],
            "then": list(self.then),
            "weights": {name: list(tensor.shape) for name, tensor in self.found.weights.items()},
            "evaluation": None if self.evaluation is None else self.evaluation.to_dict(),
            "bench": None if self.bench is None else self.bench.to_dict(),
            **({"files": list(self.files)} if self.files else {}),
        }


def _candidate(one: Candidate) -> dict[str, Any]:
    twice = {} if one.twice is None else {"twice": list(one.twice)}
    return {"plan": one.notation, "score": plain(one.score), "note": one.note, **twice}
