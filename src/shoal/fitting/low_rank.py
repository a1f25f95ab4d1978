"""The best approximation of a matrix by two factors, for what it is given or for itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from shoal.executing.inputs import run_stack
from shoal.fitting.result import Job
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.examine import LayerFacts
from shoal.models.linear import is_linear
from shoal.models.opened import open_model
from shoal.models.precision import float64_device, in_float64
from shoal.models.stacks import Stack
from shoal.plan import Run


class Moments:
    """Second moments x^T x [in, in] and means [in] of what linear modules are given, over the tokens that count, in
    float64."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.sums: dict[str, torch.Tensor] = {}
        self._totals: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self.mask: torch.Tensor | None = None
        """[batch, tokens] of the batch that runs; None counts all."""

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Meanwhile what the modules are given is counted."""
        handles = [module.register_forward_pre_hook(partial(self._add, name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        if self.mask is not None and x.shape[: self.mask.dim()] == self.mask.shape:
            x = x[self.mask.bool().to(x.device)]
        x = in_float64(x.reshape(-1, x.shape[-1])).to(float64_device(x.device))
        none = torch.zeros((), dtype=x.dtype, device=x.device)
        self.sums[name] = self.sums.get(name, none) + x.T @ x
        self._totals[name] = self._totals.get(name, none) + x.sum(0)
        self._counts[name] = self._counts.get(name, 0) + len(x)

    def mean(self, name: str) -> torch.Tensor:
        """What a module is given on average, [in]."""
        return self._totals[name] / max(1, self._counts[name])


def linear_modules(stack: Stack, facts: Sequence[LayerFacts], runs: Iterable[Run]) -> dict[str, nn.Module]:
    """The linear modules of what `runs` call, by LAYER.NAME, each once."""
    found = {}
    for run in runs:
        parts = facts[run.layer].parts
        inside = ("",) if run.part == "layer" else getattr(parts, run.part, ("no such part",))
        for name, module in stack.layer(run.layer).named_modules():
            if is_linear(module) and name.startswith(inside):
                found[f"{run.layer}.{name}"] = module
    return found


def input_moments(job: Job, modules: dict[str, nn.Module], *, planned: bool = True) -> dict[str, torch.Tensor]:
    """The second moments [in, in] of what each module is given over the text of the job: under its plan, or not
    `planned` in the whole model."""
    return moments_of(job, modules, planned=planned).sums


def moments_of(job: Job, modules: dict[str, nn.Module], *, planned: bool = True) -> Moments:
    """The same with the means."""
    opened, found = open_model(job.model), Moments(modules)
    plan = running(opened, job.plan, job.weights) if planned else nullcontext()
    with torch.no_grad(), evaluating(opened.model), plan, found.seen():
        for ids, mask in job.data.batches(job.batch):
            found.mask = mask
            run_stack(opened.model, opened.stack(job.stack), ids, mask)
    return found


def two_factors(
    weight: torch.Tensor, rank: int, moments: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """left [out, rank], right [rank, in] that make |(W - left right) C^(1/2)| smallest, and its share of |W C^(1/2)|.

    W is `weight` [out, in], C the `moments` [in, in] of what it multiplies; without them C is the unit matrix, and the
    error is that of W alone (Eckart and Young). C gets a millionth of its mean diagonal, so that it has an inverse.
    """
    w = in_float64(weight)
    root = inverse = None
    if moments is not None:
        c = moments.to(w.device, w.dtype)
        c = c + torch.eye(len(c), dtype=c.dtype, device=c.device) * c.diagonal().mean().clamp(min=1e-30) * 1e-6
        values, vectors = torch.linalg.eigh(c)
        values = values.clamp(min=values.max() * 1e-12)
        root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    u, s, v = torch.linalg.svd(w if root is None else w @ root, full_matrices=False)
    error = float(s[rank:].norm() / s.norm().clamp(min=1e-30))
    right = v[:rank] if inverse is None else v[:rank] @ inverse
    return (u[:, :rank] * s[:rank]).float().cpu(), right.float().cpu(), error
