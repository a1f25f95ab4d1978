"""What a decode step takes by the bytes that it moves: this machine's memory, measured in a second, and one overhead.

`time_model` fits times of parts to many timed plans; this asks for one timed model, so it can say beforehand whether
moving fewer bytes pays here, and where it is wrong, something else than the memory takes the time.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch.nn.functional import linear

from shoal.evaluation.scoring import Progress
from shoal.evaluation.speed import speed
from shoal.executing.timing import synchronized_time
from shoal.models.opened import open_model
from shoal.plan import Given, Plan, Shape, Spec
from shoal.plan.moved import Moved, moved
from shoal.plan.tensors import Shapes

SIZES = tuple(2**n for n in range(20, 29))
"""Bytes of the matrices of the probe: 1 MiB to 256 MiB."""
_READ = 2**28
"""Bytes that are read of each size."""


@dataclass(frozen=True)
class Bandwidth:
    """How fast one row times a matrix reads that matrix here."""

    far: float
    """Bytes a second of a matrix much larger than any cache."""
    near: float
    """Bytes a second of the size that is read fastest."""
    cache_bytes: int
    """The largest size that is read faster than the geometric mean of the two; 0 where all sizes are read alike."""
    rates: dict[int, float]
    """Bytes a second by bytes of the matrix."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bandwidth(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, columns: int = 1024) -> Bandwidth:
    """Multiply one row with matrices [rows, columns] of growing size and time the best of several repeats of each."""
    place = torch.device(device)
    row = torch.ones(1, columns, dtype=dtype, device=place)
    rates: dict[int, float] = {}
    with torch.no_grad():
        for size in SIZES:
            rows = max(1, size // (columns * row.element_size()))
            matrix = torch.ones(rows, columns, dtype=dtype, device=place)
            taken = []
            for _ in range(max(3, _READ // size)):
                start = synchronized_time(place)
                linear(row, matrix)
                taken.append(synchronized_time(place) - start)
            rates[size] = matrix.nbytes / sorted(taken)[len(taken) // 4]  # a shared machine is slower, never faster
    return _of(rates)


def _of(rates: dict[int, float]) -> Bandwidth:
    far, near = rates[max(rates)], max(rates.values())
    held = [size for size, rate in rates.items() if rate >= sqrt(far * near)]
    return Bandwidth(far, near, max(held) if near > 1.2 * far else 0, rates)


@dataclass(frozen=True)
class StepTime:
    """seconds = bytes from memory / far + bytes from the cache / near + parts x what one part takes besides."""

    bandwidth: Bandwidth
    per_part: float
    """Seconds."""
    dense: float
    """Seconds of the dense step, measured."""
    spec: Spec
    shape: Shape
    dtype: str

    def moved(self, plan: Given, weights: Shapes | None = None) -> Moved:
        """The bytes of one plan, with this machine's cache."""
        cache = self.bandwidth.cache_bytes
        return moved(plan, self.spec, self.shape, dtype=self.dtype, cache_bytes=cache, weights=weights)

    def seconds(self, plan: Given, weights: Shapes | None = None) -> float:
        """Predicted seconds of one step."""
        return _memory_seconds(self.bandwidth, found := self.moved(plan, weights)) + self.per_part * found.parts

    def share(self, plan: Given, weights: Shapes | None = None) -> float:
        """Predicted share of the dense step's time: below 1 the plan pays."""
        return self.seconds(plan, weights) / self.seconds(Plan.identity(self.spec))

    def without_cache(self) -> StepTime:
        """The same for a processor whose cache holds nothing from one run to the next: one that others use, too."""
        return replace(self, bandwidth=replace(self.bandwidth, cache_bytes=0))


def _memory_seconds(rates: Bandwidth, found: Moved) -> float:
    return found.total / rates.far + found.near / rates.near


def fitted_step_time(
    model: Any,
    *,
    context: int = 128,
    new: int = 16,
    batch: int = 1,
    pairs: int = 3,
    progress: Progress | None = None,
) -> StepTime:
    """Measure this machine's memory, time `new` decode steps of the model behind `context` random tokens, `pairs`
    times, and let what the bytes do not explain be the overhead of its parts. Raises U510, U514, U515 as `speed` does.
    """
    opened = open_model(model)
    dtype = str(opened.model.dtype).removeprefix("torch.")
    shape = Shape(batch=batch, prompt=context, context=context + new // 2)
    rates = bandwidth(opened.device, opened.model.dtype, max(stack.hidden for stack in opened.spec.stacks))
    found = speed({"dense": lambda: nullcontext(opened.model)}, prompt=context, new=new, batch=batch, pairs=pairs,
                  progress=progress)  # fmt: skip
    dense = found.variants[0].decode.median
    return step_time_of(rates, dense, opened.spec, shape, dtype)


def step_time_of(rates: Bandwidth, dense: float, spec: Spec, shape: Shape, dtype: str) -> StepTime:
    """The same from a dense step that was timed elsewhere: `dense` seconds at `shape.context` tokens."""
    without = StepTime(rates, 0.0, dense, spec, shape, dtype)
    whole = without.moved(Plan.identity(spec))
    per_part = max(0.0, dense - _memory_seconds(rates, whole)) / max(1, whole.parts)
    return StepTime(rates, per_part, dense, spec, shape, dtype)
