"""What a plan's tensors make of the state before a run and behind it; see `shoal.plan.around`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from shoal.errors import PlanError
from shoal.executing.depth_sum import Behind, depth_sum
from shoal.executing.looked_up import Converted, TensorsOf
from shoal.executing.weights import Tensors
from shoal.plan import Run
from shoal.plan.around import EMBEDDED, around_run, states_read
from shoal.plan.steps import Step, runs


class AroundRun:
    """The tensors around one run, looked up at each call. States are [batch, tokens, hidden]."""

    def __init__(self, run: Run, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """`tensors`: by name the mapping that holds it under that name."""
        self.run, self.tensors = run, tensors
        self.reads = sorted(states_read(tensors))
        self._converted = Converted()

    def front(self, hidden: torch.Tensor, behind: Behind) -> torch.Tensor:
        """What the run is given: keeps * x + sum of reads.N h_N + shift. Raises P170 where a state that it reads was
        not made in this forward."""
        keeps, shift, read = self._tensor("keeps", hidden), self._tensor("shift", hidden), []
        for layer in self.reads:
            if layer not in behind:
                where = "the embeddings" if layer == EMBEDDED else f"layer {layer}"
                raise PlanError(
                    f"layer {self.run.layer} reads the state behind {where}, so its step cannot run alone, as fits and "
                    f"losses block by block ask; leave out the tensor reads.{layer}",
                    code="P170",
                )
            share = self._tensor(f"reads.{layer}", hidden)
            assert share is not None  # it is named in `reads`
            read.append((share, behind[layer]))
        found = depth_sum(hidden, keeps, read)
        return found if shift is None else found + shift

    def behind(self, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """The state behind the run, of the one that it was given and the one that it made."""
        change, weight = self._tensor("change", left), self._tensor("mixer.weight", left)
        if weight is not None:
            change = (nn.functional.linear(entered, weight, self._tensor("mixer.bias", left)).tanh() + 1) / 2
        return left if change is None else entered + change * (left - entered)

    def _tensor(self, name: str, like: torch.Tensor) -> torch.Tensor | None:
        if name not in self.tensors:
            return None
        return self._converted(name, self.tensors[name][name], like.device, like.dtype)


class AroundRuns:
    """The runs of one stack's plan that have tensors around them, and the states that they read."""

    def __init__(self, steps: tuple[Step, ...], weights: Tensors, layer: Callable[[int], Any]) -> None:
        """`layer`: the model's by its base index."""
        self._runs = {run: found for run in runs(steps) if (found := _around(run, weights, layer)) is not None}
        self.reads = {layer for one in self._runs.values() for layer in one.reads}
        """The layers whose states they read, `EMBEDDED` for the embeddings."""

    def of(self, run: Run) -> AroundRun | None:
        """Those around `run`; None where there are none."""
        return self._runs.get(run)


def _around(run: Run, weights: Tensors, layer: Callable[[int], Any]) -> AroundRun | None:
    if not run.ids:
        return None
    real = layer(run.layer)
    there = {name for name, _ in (*real.named_parameters(remove_duplicate=False), *real.named_buffers())}
    found: dict[str, Mapping[str, torch.Tensor]] = {}
    for weights_id in run.ids:  # what a later one holds stands over what an earlier one does
        own = TensorsOf(weights_id, weights)
        found |= around_run(dict.fromkeys(own, own), there)
    return AroundRun(run, found) if found else None
