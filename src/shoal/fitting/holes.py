"""Where a plan lacks something of the dense model, and both streams of hidden states side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import torch

from shoal.errors import ModelError, UsageError
from shoal.fitting.result import Fit, Job, Transformed
from shoal.plan import Exit, Map, Parallel, Plan, Run, Step
from shoal.plan.notation import map_weights
from shoal.plan.steps import PartName
from shoal.recording.layer_inputs import LayerInputs


@dataclass(frozen=True, slots=True)
class Hole:
    """Layers first..last (or one `part` of one layer) that do not run; `position` is their place in the steps."""

    position: int
    first: int
    last: int
    part: PartName = "layer"

    def __str__(self) -> str:
        span = f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        return span + {"layer": "", "attention": "a", "mlp": "m"}[self.part]

    @property
    def weights(self) -> str:
        """The id of the stand-in's tensors: for whole layers the one that a map has unless the plan says otherwise."""
        return map_weights(self.first, self.last) if self.part == "layer" else f"map-{self.first}-{self.part}"


def find_holes(plan: Plan, what: str, stack: str | None = None) -> tuple[Hole, ...]:
    """What `plan` lacks, in order. Raises U552 unless its steps run layers upwards, each once: only then is it clear
    which dense state belongs behind each step. Raises U553 when it lacks nothing."""
    found: list[Hole] = []
    steps, due = plan.steps(stack), 0
    for position, step in enumerate(steps):
        first, last, part = _extent(step, what, plan)
        second = part == "mlp" and position > 0 and steps[position - 1] == Run(first, "attention")
        if second:
            found.pop()
        elif first < due:
            raise _refusal(what, plan)
        elif first > due:
            found.append(Hole(position, due, first - 1))
        if part == "mlp" and not second:
            found.append(Hole(position, first, first, "attention"))
        if part == "attention":
            found.append(Hole(position + 1, first, first, "mlp"))
        due = last + 1
    if due < plan.depth(stack):
        found.append(Hole(len(steps), due, plan.depth(stack) - 1))
    if not found:
        raise UsageError(f"{what} stands in for removed layers, and the plan {plan} removes none", code="U553")
    return tuple(found)


def places_behind(plan: Plan, holes: tuple[Hole, ...], stack: str | None = None) -> tuple[Hole, ...]:
    """`holes`, and behind the first of them every whole layer that runs with the base's tensors: a place where nothing
    is missing, but where the state is no longer the dense one. In order."""
    first, taken = holes[0].position, {hole.position for hole in holes}
    own = [
        Hole(at + 1, step.layer, step.layer)
        for at, step in enumerate(plan.steps(stack))
        if at >= first and at + 1 not in taken and isinstance(step, Run) and step == Run(step.layer)
    ]
    return tuple(sorted((*holes, *own), key=lambda one: one.position))


def _extent(step: Step, what: str, plan: Plan) -> tuple[int, int, PartName]:
    match step:
        case Run() if not step.layer_sources and step.tie is None:
            return step.layer, step.layer, step.part
        case Map():
            return step.first, step.last, "layer"
        case Run() | Parallel() | Exit():
            raise _refusal(what, plan)
        case _:
            assert_never(step)


def _refusal(what: str, plan: Plan) -> UsageError:
    return UsageError(
        f"{what} needs a plan whose layers run upwards, each once and with its own KV, not {plan}; only drop layers",
        code="U552",
    )


class Pair:
    """The dense and the pruned stream on the same batches; each moves only forwards."""

    def __init__(self, job: Job, *, skip_first: int = 0, outlier: float = float("inf")) -> None:
        """`skip_first`: tokens at the start of each sequence that do not count. `outlier`: a token whose norm in the
        pruned stream is more than so many times the median's does not count either."""
        self.job, self.outlier = job, outlier
        self.inputs = LayerInputs(job.model, job.data, stack=job.stack, batch=job.batch)
        for start, real in zip(self.inputs.first_states, self.inputs.real, strict=True):
            if start.dim() != 3 or start.shape[:2] != real.shape:
                raise ModelError(
                    f"the layers hand on a state {list(start.shape)} for {list(real.shape)} tokens, and a stand-in "
                    "needs one hidden state for each token; drop layers without one",
                    code="M316",
                )
        self.dense, self.pruned = self.inputs.stream(), self.inputs.stream(job.plan)
        self.steps = job.plan.steps(job.stack)
        self.at, self.cursor = 0, 0
        self.kept = self.inputs.token_masks(skip_first)
        total = len(self.kept)
        self.held = set(range(total - total // 4, total)) if total > 3 else set()
        """Numbers of the batches that are held back from the fit."""

    def prune_to(self, position: int) -> None:
        """Take the pruned stream through the steps before `position`, as the plan has them."""
        while self.cursor < position:
            self.pruned.advance(self.steps[self.cursor], self.job.weights)
            self.cursor += 1

    def skip_step(self) -> None:
        """The next step of the plan has been run in another form already."""
        self.cursor += 1

    def dense_to(self, layer: int) -> None:
        """Take the dense stream to the input of `layer`."""
        while self.at < layer:
            self.dense.advance(Run(self.at))
            self.at += 1

    def targets(self, hole: Hole) -> list[torch.Tensor]:
        """The dense states behind `hole`, [batch, length, hidden] each."""
        if hole.part != "attention":
            self.dense_to(hole.last + 1)
            return self.dense.states
        self.dense_to(hole.first)
        with torch.no_grad():
            return [self.dense.run(n, Run(hole.first, "attention")) for n in range(len(self.dense))]

    def limit(self) -> float:
        """The norm above which a token of the pruned stream is an outlier here."""
        norms = torch.cat(
            [x.float().norm(dim=-1).cpu()[real] for x, real in zip(self.pruned.states, self.inputs.real, strict=True)]
        )
        return self.outlier * float(norms.median())

    def counted(self, limit: float) -> list[torch.Tensor]:
        """For each batch the tokens that count, bool [batch, length]."""
        return [
            kept.to(x.device) & (x.float().norm(dim=-1) <= limit)
            for kept, x in zip(self.kept, self.pruned.states, strict=True)
        ]


def filled(
    pair: Pair, holes: tuple[Hole, ...], fit: Callable[[Hole], tuple[dict[str, torch.Tensor], Fit]], what: str
) -> Transformed:
    """The plan of `pair` with a map in each of its `holes`: `fit` gives the map's tensors, asked while the pruned
    stream stands in front of the hole, and `what` they are is told as progress."""
    job, steps, fits = pair.job, list[Step](), list[Fit]()
    weights = dict(job.weights)
    for number, hole in enumerate(holes):
        steps += pair.steps[pair.cursor : hole.position]
        pair.prune_to(hole.position)
        tensors, found = fit(hole)
        weights |= tensors
        fits.append(found)
        steps.append(Map(hole.first, hole.last, hole.weights))
        pair.pruned.advance(steps[-1], tensors)
        job.tell(number + 1, len(holes), what)
    steps += pair.steps[pair.cursor :]
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights, tuple(fits))
