"""Copies of layers that add nothing: which tensors must be zero for that, found and proved by running the layer."""

from __future__ import annotations

from dataclasses import replace

import torch

from shoal.data import Data
from shoal.errors import UsageError
from shoal.fitting.holes import Pair
from shoal.fitting.result import Job
from shoal.fitting.writers import PROBE_TOKENS, Prober
from shoal.plan import Run
from shoal.plan.steps import PartName


class Silencer:
    """Runs single layers on a few tokens with tensors set to zero."""

    def __init__(self, job: Job) -> None:
        few = Data(job.data.ids[:1, :PROBE_TOKENS], None, job.data.info)
        self.prober = Prober(Pair(replace(job, data=few, weights={})))
        self.stack = self.prober.inputs.stack

    def zeros(self, layer: int, weights_id: str) -> dict[str, torch.Tensor]:
        """Under `weights_id` the tensors, all zero, with which `layer` hands its input on bit for bit: those that write
        what its attention and its mlp add.

        Behind a norm, which takes a scale away again, they are the last matrix of the part without which it adds
        nothing. Raises U664 for a layer of which no such tensors are known: without parts, quantised, not in memory.
        """
        own: dict[str, torch.Tensor] = {}
        parts: tuple[PartName, ...] = ("attention", "mlp")
        for part in parts:
            for name in self._names(layer, part):
                own[f"{weights_id}.{name}"] = torch.zeros_like(self.stack.layer(layer).get_parameter(name).detach())
        if not self._silent(Run(layer, weights=weights_id), own):
            raise UsageError(
                f"layer {layer} has no tensors of zeros that would make a copy of it add nothing; copy it as it is "
                "(style=interleave,init=copy)",
                code="U664",
            )
        return own

    def _names(self, layer: int, part: PartName) -> list[str]:
        if writers := self.prober.writers(layer, part):
            return [writer.name for writer in writers]
        fact = self.prober.inputs.facts.layers[layer]
        if fact.parts is None:
            return []
        inside = tuple(f"{child}." for child in getattr(fact.parts, part))
        own = [(n, p) for n, p in self.stack.layer(layer).named_parameters() if n.startswith(inside) and p.dim() >= 2]
        for name, parameter in reversed(own):
            zero = {f"silent.{name}": torch.zeros_like(parameter)}
            if self._silent(Run(layer, part, weights="silent"), zero):
                return [name]
        return []

    @torch.no_grad()
    def _silent(self, run: Run, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether the run hands on a random state as it is, bit for bit."""
        stream = self.prober.inputs.stream()
        start = stream.states[0]
        drawn = torch.randn(start.shape, generator=torch.Generator().manual_seed(run.layer)).to(start)
        stream.states = [drawn.clone()]
        return bool(tensors) and torch.equal(stream.run(0, run, tensors), drawn)
