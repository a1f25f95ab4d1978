"""Layers that collapse into one another again and again, and how near the final state stays to the dense one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

import torch

from shoal.errors import UsageError
from shoal.evaluation.distances import one_minus_cosine
from shoal.executing.bind import bind
from shoal.executing.inputs import forward_without_head
from shoal.fitting.merge import combined
from shoal.fitting.result import Job, Transformed
from shoal.models.evaluating import evaluating
from shoal.plan import Step
from shoal.plan import drop as drop_layers
from shoal.plan.select import whole_run

Shares = Mapping[int, float]
"""A layer's matrices as a sum over layers of the base: theta = sum_j shares[j] theta_j."""


@dataclass(frozen=True)
class Collapsed:
    """A model so far: the layers that run, those that are gone, and what each merged layer is made of."""

    alive: tuple[int, ...]
    gone: tuple[int, ...] = ()
    shares: Mapping[int, Shares] = field(default_factory=dict)

    def merged(self, place: int, count: int) -> Collapsed:
        """With theta_l + sum_k (theta_(l+k) - theta_l) for the layer l at `place` and the `count` behind it, merged
        ones as they are by now."""
        first, taken = self.alive[place], self.alive[place + 1 : place + 1 + count]
        sums: dict[int, float] = {}
        for layer, factor in ((first, 1.0 - len(taken)), *((other, 1.0) for other in taken)):
            for base, share in self.shares.get(layer, {layer: 1.0}).items():
                sums[base] = sums.get(base, 0.0) + factor * share
        shares = {layer: own for layer, own in self.shares.items() if layer not in taken} | {first: sums}
        return Collapsed(tuple(layer for layer in self.alive if layer not in taken), (*self.gone, *taken), shares)

    def transformed(self, job: Job, name: str) -> Transformed:
        """`job`'s plan with what is left, and the tensors of the merged layers. Raises U556 for layers of two kinds."""
        weights: dict[str, torch.Tensor] = {}
        for layer, shares in self.shares.items():
            weights |= combined(job.model, name, layer, shares, job.stack)
        plan = drop_layers(job.plan, self.gone, stack=job.stack) if self.gone else job.plan
        steps: list[Step] = []
        for step in plan.steps(job.stack):
            run = whole_run(step)
            merged = run is not None and run.layer in self.shares
            steps.append(replace(run, weights=f"{name}-{run.layer}") if run is not None and merged else step)
        return Transformed(plan.with_steps(tuple(steps), job.stack), weights)


class StateSimilarity:
    """How like the dense model's final hidden states those of another plan are, on the first `sequences` of a job's
    text: the mean over sequences of the cosine of [length * hidden], padding left out."""

    def __init__(self, job: Job, sequences: int) -> None:
        self.job = job
        self.batches = list(islice(job.data.batches(1), sequences))
        self.dense = self._final()

    def of(self, made: Transformed) -> float:
        """The similarity of a plan with its weights; -inf where it is not a number."""
        with bind(self.job.model, made.plan, made.weights).running():
            states = self._final()
        turns = [float(one_minus_cosine(a, b)) for a, b in zip(self.dense, states, strict=True)]
        mean = 1 - math.fsum(turns) / len(turns)
        return -math.inf if math.isnan(mean) else mean

    def of_collapsed(self, state: Collapsed, name: str) -> float:
        """The same of a collapsed model; -inf where its layers are of two kinds."""
        try:
            return self.of(state.transformed(self.job, name))
        except UsageError as error:
            if error.code != "U556":
                raise
            return -math.inf

    @torch.no_grad()
    def _final(self) -> list[torch.Tensor]:
        with evaluating(self.job.model, gradients=True):
            states = ((forward_without_head(self.job.model, ids, mask), mask) for ids, mask in self.batches)
            return [(s[0] if mask is None else s[0][mask[0].bool()]).float().flatten() for s, mask in states]
