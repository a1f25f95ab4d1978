"""The job that every transform is given, and the result that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from shoal.plan import Plan
from shoal.record import plain

if TYPE_CHECKING:
    import torch

    from shoal.data import Data
    from shoal.evaluation import Progress


@dataclass(frozen=True)
class Job:
    """A model, calibration text, and the plan that is to be made better."""

    model: Any
    data: Data
    plan: Plan
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors that the plan names already."""
    stack: str | None = None
    batch: int = 1
    seed: int = 0
    progress: Progress | None = None

    def tell(self, done: int, total: int, stage: str) -> None:
        """Report progress, if somebody listens."""
        if self.progress is not None:
            self.progress(done, total, stage)


@dataclass(frozen=True, slots=True)
class Fit:
    """How well one stand-in does: mean squared error per element of the hidden state against the dense model's, over
    the tokens that count. `drop`: with nothing in its place; `stand_in`: with it."""

    site: str
    drop: float
    stand_in: float
    held_drop: float | None = None
    """The same on sequences that were not fitted; None when all were."""
    held_stand_in: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Transformed:
    """A plan with the tensors it names, and how well each stand-in fits."""

    plan: Plan
    weights: Mapping[str, torch.Tensor]
    fits: tuple[Fit, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, tensors as shapes."""
        return {
            "plan": str(self.plan),
            "weights": {name: list(tensor.shape) for name, tensor in self.weights.items()},
            "fits": [plain(asdict(fit)) for fit in self.fits],
            "notes": list(self.notes),
        }
